"""The tables of docs/stagger.md, of the results of bench/decode.py."""

from __future__ import annotations

import re
from statistics import mean
from typing import Any

from tables import Report, markdown, origin

Row = dict[str, Any]
STACKS = "stacks, "  # rows of their own table begin so


def decode(report: Report) -> str:
    """Microseconds of a step, what staggering gains, and the floors."""
    done = {name: row for name, row in report["rows"].items() if "times" in row}
    rows: dict[str, Row] = {name: done[name] for name in sorted(done, key=_width_and_batch)}
    study = rows.pop("study", None)
    stacks = {name.removeprefix(STACKS): rows.pop(name) for name in [*rows] if name.startswith(STACKS)}
    asked = [
        [name, one["best"], f"{1 / one['most']:.2f}", f"{1 / one['ratio']:.2f}"]
        for name, row in rows.items()
        for one in row["asked"]
        if one["ratio"]
    ]
    parts = [origin(report), _table(rows), markdown(["row", "variant", "gain asked", "gain found"], asked)]
    if stacks:
        parts += ["Two and four stacks with layers of their own, window 128:", _table(stacks)]
    if study:
        parts += ["The models of the training study, one sequence:", _of_study(study)]
    return "\n\n".join(parts)


def _table(rows: dict[str, Row]) -> str:
    variants = list(dict.fromkeys(variant for row in rows.values() for variant in row["times"]))
    lines = [[variant, *(_cell(row, variant) for row in rows.values())] for variant in variants]
    return markdown(["microseconds of a step (floor)", *rows], lines)


def _of_study(row: Row) -> str:
    lines = [[name, f"{1e6 * mean(times):.0f}", f"{row['gain'][name]:.2f}"] for name, times in row["times"].items()]
    return markdown(["variant", "microseconds of a step", "gain"], lines)


def _width_and_batch(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)][::-1]


def _cell(row: Row, variant: str) -> str:
    """A time, by how much it is less than the original's, and the floor."""
    if variant not in row["times"]:
        return ""
    own, original = mean(row["times"][variant]), mean(row["times"]["original"])
    gain = "" if variant == "original" else f", {original / own:.2f}x"
    return f"{1e6 * own:.0f}{gain} ({1e6 * row['floors'][variant]:.0f})"
