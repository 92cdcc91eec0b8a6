"""Files: the texts of a dump, and how they reach a folder whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from errno import EISDIR
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from depthc.codegen.dump.report import report_html
from depthc.codegen.python.text import python_text
from depthc.codegen.state_map import state_map
from depthc.ir.errors import DepthError, DumpError
from depthc.ir.program import Program
from depthc.passes.stages import Stage

REPORT = "report.html"


@dataclass(frozen=True)
class Dump:
    """The files of a dump.

    Attributes:
        files: texts by file name.
        missing: why a file could not be made, by its name.
    """

    files: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def dump_of(stages: Sequence[Stage], title: str, error: DepthError | None = None) -> Dump:
    """The files of some stages: for each the IR (.depth), runnable Python, the MLIR twin, the state-dict map (.json).

    A file that cannot be made (torch-mlir is not installed, say) is left out, and the report says why.

    Args:
        title: of the report, behind the name of the model: the recipe.
        error: of the pass that failed after the last stage.
    """
    dump = Dump()
    for stage in stages:
        for suffix, text in texts_of(stage, stages[0].program).items():
            name = f"{stage.name}.{suffix}"
            try:
                dump.files[name] = text()
            except DepthError as refused:
                dump.missing[name] = str(refused)
    if error is not None:
        dump.files[f"{stages[-1].number + 1:02}_error.txt"] = f"{error}\n"
    dump.files[REPORT] = report_html(stages, title, dump.missing)
    return dump


def texts_of(stage: Stage, captured: Program) -> Mapping[str, Callable[[], str]]:
    """What makes the files of a stage, by suffix."""
    program = stage.program
    return {
        "depth": lambda: f"{program}\n",
        "py": lambda: python_text(program, f"{program.name} after {stage.number}. {stage.title}"),
        "mlir": program.mlir,
        "json": lambda: _lines(state_map(program, captured)),
    }


def _lines(found: Mapping[str, Any]) -> str:
    """A state map as JSON with a line a parameter."""
    rows = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in found["parameters"].items())
    head, tail = ",\n".join(rows), json.dumps(found["unread"])
    return f'{{\n "parameters": {{\n{head}\n }},\n "unread": {tail}\n}}\n'


def write(dump: Dump, folder: str | Path) -> Path:
    """Put the files into a folder, which is made if it is not there; files of the same name are replaced.

    Everything is written into a folder of its own first, so that a full disk leaves nothing half-written.

    Raises:
        DumpError: the folder cannot be written.
    """
    target = Path(folder).absolute()
    made = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        made = Path(mkdtemp(prefix=".depthc-dump-", dir=target))
        for name, text in dump.files.items():
            (made / name).write_text(text, encoding="utf-8", newline="\n")
        if taken := [name for name in dump.files if (target / name).is_dir()]:
            raise IsADirectoryError(EISDIR, f"{taken[0]} is a folder there")
        for name in dump.files:
            os.replace(made / name, target / name)
    except OSError as error:
        what, found = "the dump cannot be written", error.strerror or str(error)
        raise DumpError(what, where=str(target), found=found, remedy="name a folder that you may write") from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
    return target
