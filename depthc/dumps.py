"""Dumps of everything that is compiled in a `with` block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from depthc.ir.errors import DepthError
from depthc.ir.program import Program
from depthc.passes.pipeline import Step
from depthc.passes.recipe import Recipe
from depthc.passes.stages import stages_of


@dataclass
class _Folder:
    path: Path
    taken: set[str] = field(default_factory=set)

    def place(self, name: str) -> Path:
        """A folder of its own for every compilation."""
        names = (name if number == 1 else f"{name}_{number}" for number in count(1))
        found = next(name for name in names if name not in self.taken)
        self.taken.add(found)
        return self.path / found


_FOLDERS: ContextVar[tuple[_Folder, ...]] = ContextVar("depthc_dump", default=())


@contextmanager
def dump(folder: str | Path) -> Iterator[Path]:
    """Dump every model that is compiled inside the block, each into a subfolder named after the model.

    A compilation whose recipe fails leaves the stages before the failure, and the error.

    Raises:
        DumpError: the folder cannot be written.

    Example:
        >>> import tempfile, torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with depthc.dump(folder):
        ...         compiled = depthc.compile(model, "tie", args=(torch.ones(2, 5, 4),), loops=2)
        ...     names = sorted(path.name for path in Path(folder, "Sequential").iterdir())
        >>> [name for name in names if name.startswith("01") or name.endswith("html")]
        ['01_tie.depth', '01_tie.json', '01_tie.mlir', '01_tie.py', 'report.html']
    """
    token = _FOLDERS.set((*_FOLDERS.get(), _Folder(Path(folder))))
    try:
        yield Path(folder)
    finally:
        _FOLDERS.reset(token)


def record(captured: Program, recipe: Recipe, history: Sequence[Step], error: DepthError | None = None) -> None:
    """Write what a compilation did into the folders of the blocks around it."""
    if not _FOLDERS.get():
        return
    from depthc.codegen.dump.files import dump_of, write

    for folder in _FOLDERS.get():
        stages = stages_of(captured, history)
        write(dump_of(stages, str(recipe), error), folder.place(captured.name))
