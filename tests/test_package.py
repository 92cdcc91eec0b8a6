"""The package as a whole: what it offers, what importing it costs, and that its rooms keep their order."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
import torch

import depthc

from .optional import needs_torch_mlir, rest_needs_torch_mlir

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
# Each room may import from itself and from those before it.
ROOMS = ["depthc.ir", "depthc.passes", "depthc.codegen", "depthc.runtime", "depthc"]
PUBLIC = """Bisection CaptureError CheckpointError Decoder DepthError DumpError Explanation IncrementalError InputError
MlirError OutlineError ParseError Program Recipe RecipeError RoutingError StateDictError SubsetError TargetError
VerifyError bisect capture compile dump explain generate load parse save""".split()
# Whose examples need torch-mlir.
OF_MLIR = """depthc.codegen.mlir.native.native depthc.dumps.dump depthc.ir.mlir.module_of depthc.ir.mlir.types.type_text
depthc.ir.program.Program.mlir""".split()


def modules() -> list[tuple[str, Path]]:
    """(name, file) of every module of the package."""
    found = []
    for package, folder in PACKAGES.items():
        for file in sorted((ROOT / folder).glob("*.py")):
            found.append((package if file.stem == "__init__" else f"{package}.{file.stem}", file))
    return found


def imports(name: str, file: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import in the file, wherever it stands."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            # `from depthc import ir` names a room as well as `from depthc.ir import x` does.
            names = [f"{source}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, target if target in PACKAGES else source) for target in names)


def room(name: str) -> int:
    """Index in ROOMS of the room that a module belongs to."""
    return next(i for i, package in enumerate(ROOMS) if name == package or name.startswith(f"{package}."))


def in_fresh_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd="/", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_public_surface() -> None:
    assert sorted(depthc.__all__) == sorted(PUBLIC)


@pytest.mark.slow
def test_import_loads_neither_top_level_rooms_nor_optional_libraries() -> None:
    unwanted = ["ir", "passes", "codegen", "transformers", "torch_mlir", "triton"]
    loaded = in_fresh_python(f"import depthc, sys; print([m for m in {unwanted} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_every_package_folder_is_listed() -> None:
    inits = {init.parent for folder in PACKAGES.values() for init in (ROOT / folder).rglob("__init__.py")}
    assert inits == {ROOT / folder for folder in PACKAGES.values()}
    assert sorted(PACKAGES) == sorted(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize(("name", "file"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_dependencies_point_downward(name: str, file: Path) -> None:
    for line, target in imports(name, file):
        where = f"{file.relative_to(ROOT)}:{line} imports {target}"
        top = target.split(".")[0]
        assert f"depthc.{top}" not in ROOMS, f"{where}; say depthc.{target}"
        # The command line builds the models that it is given the name of; nothing else knows of the library.
        assert top != "transformers" or name == "depthc.targets", f"{where}; structure decides, not the library"
        if top == "depthc":
            assert room(target) <= room(name), f"{where}, which is above it"


def test_imports_are_read_in_every_form(tmp_path: Path) -> None:
    file = tmp_path / "capture.py"
    file.write_text(
        "import torch.fx\n"
        "from depthc.passes.tie import Tie\n"
        "from depthc import codegen\n"
        "def f():\n"
        "    from . import program\n"
        "    from ..passes import loop\n"
    )
    found = ["torch.fx", "depthc.passes.tie", "depthc.codegen", "depthc.ir", "depthc.passes"]
    assert list(imports("depthc.ir.capture", file)) == list(enumerate(found[:3], 1)) + list(enumerate(found[3:], 5))


@pytest.mark.parametrize("name", depthc.__all__)
def test_public_names_are_documented(name: str) -> None:
    value = getattr(depthc, name)
    assert inspect.getdoc(value)
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        assert any(test.examples for test in doctest.DocTestFinder().find(value)), f"depthc.{name} has no example"


def has_example(file: Path) -> bool:
    """Whether a docstring of the file has an example that is run."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return any(">>>" in line and "+SKIP" not in line for line in lines)


@pytest.mark.parametrize("name", [name for name, file in modules() if has_example(file)])
def test_examples_in_docstrings(name: str) -> None:
    tests = [test for test in doctest.DocTestFinder().find(importlib.import_module(name), name) if test.examples]
    assert tests
    for test in sorted(tests, key=lambda test: test.name in OF_MLIR):
        if test.name in OF_MLIR:
            rest_needs_torch_mlir()
        assert not doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/concepts.md",
        "docs/capture.md",
        "docs/ir.md",
        "docs/doors.md",
        "docs/dumps.md",
        "docs/kernels.md",
        pytest.param("docs/mlir.md", marks=needs_torch_mlir),
        "docs/quickstart.md",
        "docs/recipes.md",
        "docs/altup.md",
        "docs/stagger.md",
        "docs/saving.md",
        "docs/telemetry.md",
        "docs/training.md",
    ],
)
def test_pages_run(page: str) -> None:
    """The code blocks of a page, which continue each other."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    code = compile("\n".join(blocks), page, "exec")
    with torch.random.fork_rng():
        exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("page", pages.TABLES)
def test_tables_are_those_of_the_results(page: str) -> None:
    assert pages.current(page) == (pages.DOCS / page).read_text(encoding="utf-8"), "run python bench/pages.py"
