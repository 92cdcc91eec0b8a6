"""Tables of results as Markdown."""

from __future__ import annotations

from typing import Any

Report = dict[str, Any]


def origin(report: Report) -> str:
    """What a table was measured on and how."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['device']}, {versions}; `{report['command']}`."


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
