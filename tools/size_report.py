"""Report the sizes of Python files and functions; fail if a file is past the hard limit.

`--all` shows every file; without it, only what is past a soft limit.
"""

import ast
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOFT_FILE, HARD_FILE, SOFT_FUNCTION = 400, 700, 60


def python_files() -> list[Path]:
    """The project's own Python files, relative to its root."""
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    return [f for f in files if f.parts[0] not in ("build", "site") and not f.parts[0].startswith(".")]


def functions(path: Path, text: str) -> list[tuple[int, str]]:
    """(lines, where) of every function in the file."""
    return [
        (node.end_lineno - node.lineno + 1, f"{path}:{node.lineno} {node.name}")
        for node in ast.walk(ast.parse(text, str(path)))
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    ]


def main() -> int:
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in python_files()}
    files = [(text.count("\n"), str(path)) for path, text in texts.items()]
    long_functions = [row for path, text in texts.items() for row in functions(path, text) if row[0] > SOFT_FUNCTION]
    soft = 0 if "--all" in sys.argv[1:] else SOFT_FILE

    for lines, where in sorted([row for row in files if row[0] > soft] + long_functions, reverse=True):
        print(f"{lines:6} {where}{'  past the hard limit' if (lines, where) in files and lines > HARD_FILE else ''}")
    sizes = [lines for lines, _ in files]
    print(f"{len(sizes)} files, {sum(sizes)} lines, median {statistics.median(sizes):.0f}, longest {max(sizes)}")
    return max(sizes) > HARD_FILE


if __name__ == "__main__":
    sys.exit(main())
