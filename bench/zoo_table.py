"""The results of the zoo as two Markdown tables, of the programs and of the recipes, between two markers of a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- zoo:begin (made by bench/zoo.py --table; do not edit) -->", "<!-- zoo:end -->"
PROGRAM = {
    "captured": "captured, s",
    "depths": "depths",
    "same": "same length",
    "other": "other length",
    "replay": "layers replayed",
    "ports": "ports and masks",
    "subset": "token subset, fp64",
    "incremental": "incremental",
    "eval": "identity, eval",
    "train": "identity, train",
    "text": "parse(print)",
    "lines": "lines",
    "mlir": "MLIR modules",
}
RECIPES = {
    "mor": "MoR (`mor`), one step",
    "mor_token": "token choice (`mor_token`), one step",
    "mod": "MoD (`mod`), one step",
}
HEADINGS = PROGRAM | RECIPES
STATUSES = {"ok": "legal", "refused": "refused", "failed": "failed"}


class Notes:
    """Numbered reasons: many rows share one, and a table cell has no room for it."""

    def __init__(self) -> None:
        self.reasons: dict[str, int] = {}

    def mark(self, reason: str) -> str:
        number = self.reasons.setdefault(reason, len(self.reasons) + 1)
        return f"[{number}]"

    def listing(self) -> list[str]:
        return [f"{number}. {escape(reason)}" for reason, number in self.reasons.items()]


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def shown(value: Any) -> str:
    """A value in few characters: errors to one digit, `0` only for bitwise equality."""
    if isinstance(value, float) and value != 0 and abs(value) < 0.01:
        return f"{value:.0e}".replace("e-0", "e-")
    if isinstance(value, float):
        return f"{value:.3g}"
    return escape(str(value))


def cell(found: dict[str, Any] | None, notes: Notes) -> str:
    if found is None or found["status"] == "skipped":
        return "-"
    if found["status"] == "refused":
        return f"refused {notes.mark(found['reason'])}"
    if found["status"] == "failed":
        return f"**{shown(found['value'])}**" if "value" in found else f"**failed** {notes.mark(found['reason'])}"
    return shown(found["value"])


def row_line(name: str, row: dict[str, Any], checks: Iterable[str], notes: Notes) -> str:
    title = f"{name}{' *' if row['held_out'] else ''}{' ' + notes.mark(row['stopped']) if row['stopped'] else ''}"
    cells = [cell(row["checks"].get(check), notes) for check in checks]
    return "| " + " | ".join([title, row["kind"], *cells]) + " |"


def rows_table(rows: dict[str, Any], headings: dict[str, str], notes: Notes) -> list[str]:
    """One row an architecture, one column a check."""
    head = ["architecture", "kind", *headings.values()]
    body = [row_line(name, row, headings, notes) for name, row in rows.items()]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body]


def table(report: dict[str, Any]) -> str:
    """The whole generated part of the page."""
    notes, rows = Notes(), report["rows"]
    made = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{len(rows)} architectures, {made}; `{report['command'].strip()}`.",
        "`0` is bitwise equal; bold is a failure; `*` marks architectures held out from the research; a number in",
        "brackets is a typed error or a failure, with its reason below.",
        "",
        *rows_table(rows, PROGRAM, notes),
        "",
        f"The recipes: {'; '.join(counted(rows, name) for name in RECIPES)}.",
        "",
        *rows_table(rows, RECIPES, notes),
        "",
        *notes.listing(),
    ]
    return "\n".join(lines)


def counted(rows: dict[str, Any], check: str) -> str:
    """How many rows of a check are as they must be, refused, failed."""
    found = Counter(row["checks"].get(check, {}).get("status", "skipped") for row in rows.values())
    some = ", ".join(f"{found[status]} {word}" for status, word in STATUSES.items() if found[status])
    return f"`{check}` {some or 'none'}"


def update_page(path: Path, report: dict[str, Any]) -> None:
    """Replace what is between the markers of the page; a page without them gets both at its end."""
    page = path.read_text() if path.exists() else "# The architecture zoo\n"
    if BEGIN not in page:
        page = f"{page.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    path.write_text(f"{before}{BEGIN}\n\n{table(report)}\n\n{END}{after}")
