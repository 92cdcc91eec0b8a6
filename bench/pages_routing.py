"""The tables of docs/kernels.md, of the results of bench/routing.py."""

from __future__ import annotations

from statistics import mean
from typing import Any

from routing_plan import ROWS
from tables import Report, markdown, origin

Row = dict[str, Any]
LONGEST = 160  # characters of an error
HEADS = {
    "layer": "Routed layers: milliseconds of the dense layers on as many tokens, and ratios to them.",
    "shared": "A recursion that reads the keys of the first one: milliseconds.",
    "whole": "Training of a whole model: milliseconds a step.",
    "tokens": "Token choice: milliseconds.",
    "graph": "One region in a CUDA graph: microseconds of the dense layer, and those that routing adds.",
    "step": "A training step in a CUDA graph: milliseconds.",
    "op": "Ops by themselves, on several inputs in turn in a CUDA graph: microseconds of one.",
}


def routing(report: Report) -> str:
    """All tables, with what they are of."""
    order = {name: at for at, name in enumerate(ROWS)}
    rows: dict[str, Row] = dict(sorted(report["rows"].items(), key=lambda row: order.get(row[0], len(order))))
    parts = [origin(report), _asked(rows)]
    for kind, head in HEADS.items():
        own = {name: row for name, row in rows.items() if row["settings"]["kind"] == kind and "times" in row}
        if own:
            parts += [head, _times(kind, own)]
    beside = [f"- {name}: {why}" for name, row in rows.items() for why in _missing(row)]
    return "\n\n".join([*parts, *(["Not measured:\n\n" + "\n".join(beside)] if beside else [])])


def _missing(row: Row) -> list[str]:
    """What a row, or variants of it, lack, and why."""
    whole = [f"{how}: {row[how]}" for how in ("failed", "skipped") if isinstance(row.get(how), str)]
    parts = {**row.get("failures", {}), **(row["skipped"] if isinstance(row.get("skipped"), dict) else {})}
    return [why[:LONGEST] for why in (*whole, *(f"{name}: {why}" for name, why in parts.items()))]


def _asked(rows: dict[str, Row]) -> str:
    """What was asked for, and what was found."""
    lines = []
    for name, row in rows.items():
        for one in row.get("asked", []):
            found = "" if one["ratio"] is None else f"{one['ratio']:.3f}"
            lines.append([name, one["peer"], one["best"] or " or ".join(one["of"]), f"{one['most']:.3f}", found])
    return markdown(["row", "peer", "fastest", "asked, at most", "found"], lines)


def _times(kind: str, rows: dict[str, Row]) -> str:
    """A line a row: every variant, how far two runs were apart, and how near the fastest came to the floor."""
    rows = {name: row | {"times": _right(row)} for name, row in rows.items()}
    variants = list(dict.fromkeys(name for row in rows.values() for name in row["times"]))
    lines = []
    for name, row in rows.items():
        times = {variant: mean(runs) for variant, runs in row["times"].items()}
        cells = [_cell(kind, variant, times) for variant in variants]
        spread = f"{100 * max(row['spread'].values(), default=0.0):.1f}"
        floor = f"{max(row['percent_of_floor'].values()):.0f}" if row["percent_of_floor"] else ""
        lines.append([name, str(row["settings"]["chosen"]), *cells, *_beside(row), spread, floor])
    beside = ["GB of the fastest", "of vanilla"] if kind == "whole" else []
    return markdown(["row", "chosen", *variants, *beside, "runs apart, %", "of the floor, %"], lines)


def _right(row: Row) -> dict[str, list[float]]:
    """The times of variants whose results were right."""
    return {name: runs for name, runs in row["times"].items() if name not in row["failures"]}


def _cell(kind: str, variant: str, times: dict[str, float]) -> str:
    """The time of a variant, or what it is beside the dense layers."""
    if variant not in times:
        return ""
    own, dense = times[variant], times.get("dense")
    if variant == "dense" or dense is None or kind not in ("layer", "graph"):
        return f"{own * 1e6:.1f}" if kind in ("graph", "op") else f"{own * 1e3:.3f}"
    return f"{own / dense:.3f}" if kind == "layer" else f"+{(own - dense) * 1e6:.1f}"


def _beside(row: Row) -> list[str]:
    """The memory of a training."""
    if row["settings"]["kind"] != "whole":
        return []
    memory = {name: held for name, held in row["memory"].items() if name not in ("vanilla", "dense", "eager")}
    if not memory or "vanilla" not in row["memory"]:
        return ["", ""]
    name = min(memory, key=lambda one: mean(row["times"].get(one, [float("inf")])))
    return [f"{memory[name] / 1e9:.1f}", f"{memory[name] / row['memory']['vanilla']:.2f}"]
