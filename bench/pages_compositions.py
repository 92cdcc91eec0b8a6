"""The tables of which passes follow each other, from bench/results/compositions.json."""

from __future__ import annotations

from typing import Any

from tables import Report, markdown, origin
from zoo_table import Notes, escape, shown

TITLES = {
    "layers": "On the model's layers (*given*: the model)",
    "loop": "Behind `{}` (*given*: the tied model)",
}


def compositions(report: Report) -> str:
    """A table for what is given, a row for the first pass and a column for the second; longer recipes; the reasons."""
    notes, parts = Notes(), [origin(report)]
    for given, recipe in report["given"].items():
        parts += [TITLES[given].format(recipe) + ":", _pairs(report, given, notes)]
    rows = [row for row in report["rows"] if not row["given"]]
    head = ["recipe", "", "parameters", "token by token"]
    parts += ["Longer recipes:", markdown(head, [[f"`{escape(row['recipe'])}`", *_cells(row, notes)] for row in rows])]
    return "\n\n".join([*parts, "\n".join(notes.listing())])


def _pairs(report: Report, given: str, notes: Notes) -> str:
    found = {(row["first"], row["second"]): row for row in report["rows"] if row["given"] == given}
    names = list(report["options"])
    rows = [[f"`{first}`", *(_verdict(found[first, second], notes) for second in names)] for first in names]
    return markdown(["first, then", *(f"`{name}`" for name in names)], rows)


def _verdict(row: dict[str, Any], notes: Notes) -> str:
    """Legal and equal to what, or the number of the reason."""
    if not row["legal"]:
        return notes.mark(f"{row['reason']}; found: {row['found']}. Remedy: {row['remedy']}")
    equal = "legal" if not row["equals"] else f"= {row['equals'][0]}" if row["given"] else f"= `{row['equals'][0]}`"
    return escape(equal) + ("" if row["steps"] else f", whole only {notes.mark(row['reason'])}")


def _cells(row: dict[str, Any], notes: Notes) -> list[str]:
    verdict = _verdict(row, notes)
    if not row["legal"]:
        return [verdict, "-", "-"]
    return [verdict, str(row["gradients"]), shown(row["gap"]) if row["steps"] else "-"]
