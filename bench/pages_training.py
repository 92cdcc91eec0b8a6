"""The tables of docs/training.md and docs/stagger.md, of the results of the training experiment."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from tables import Report, markdown, origin

Row = dict[str, Any]


def training(report: Report) -> str:
    """All tables, with what they are of."""
    rows = report["runs"].values()
    finals = [row for row in rows if row["kind"] == "final" and "failed" not in row]
    by_variant = {row["variant"]: [other for other in finals if other["variant"] == row["variant"]] for row in finals}
    parts = [
        origin(report),
        _about(report),
        _losses(by_variant),
        _routing(by_variant),
        _speed(by_variant, report["speed"]),
    ]
    failed = [f"- {name}: {row['failed']}" for name, row in report["runs"].items() if "failed" in row]
    parts += [_sweep([row for row in rows if row["kind"] == "sweep"])]
    return "\n\n".join([*filter(None, parts), *(["Runs that failed:\n\n" + "\n".join(failed)] if failed else [])])


def _table(head: list[str], lines: list[list[str]]) -> str:
    """A table without columns that nobody fills; nothing, if there are no lines."""
    if not lines:
        return ""
    columns = [column for column in zip(head, *lines, strict=True) if any(column[1:])]
    top, *rest = (list(line) for line in zip(*columns, strict=True))
    return markdown(top, rest)


def _about(report: Report) -> str:
    """The settings that numbers depend on."""
    s, devices = report["settings"], sorted({row["device"] for row in report["runs"].values() if "device" in row})
    text = (
        f"{s['layers']} layers of width {s['width']}, contexts of {s['context']} bytes, {s['batch']} a batch; the"
        f" budget is what vanilla takes for {s['tokens'] / 1e6:.0f} MB; corpus {report['corpus'][:12]}."
    )
    return text if len(devices) < 2 else f"{text} Runs were on {' and '.join(devices)}: speeds are of either."


def _each(rows: Sequence[Row], *path: str) -> list[Any]:
    """A number of every row; none where a row lacks it."""
    found = []
    for row in rows:
        value: Any = row
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found.append(value)
    return found


def _mean(rows: Sequence[Row], *path: str, form: str = ".4f", scale: float = 1.0) -> str:
    found = _each(rows, *path)
    return format(mean(found) * scale, form) if found else ""


def _list(rows: Sequence[Row], *path: str) -> str:
    """A list of shares, entry by entry the mean over the rows."""
    found = [shares for shares in _each(rows, *path) if None not in shares]
    return " ".join(f"{100 * mean(entry):.1f}" for entry in zip(*found, strict=True))


def _losses(variants: dict[str, list[Row]]) -> str:
    seeds = max((len(rows) for rows in variants.values()), default=0)
    lines = []
    for name, rows in variants.items():
        each = [f"{bits:.4f}" for bits in _each(rows, "causal", "bits")]
        cost = mean(row["flops"] / row["tokens"] for row in rows)
        sizes = [f"{rows[0]['parameters'][kind]:,}" for kind in ("unique", "applied")]
        read = _mean(rows, "tokens", form=".1f", scale=1e-6)
        bits = [_mean(rows, "causal", "bits"), *each, *[""] * (seeds - len(each)), _mean(rows, "topk", "bits")]
        lines.append([name, *sizes, f"{rows[0]['rate']:g}", f"{cost / 1e6:.1f}", read, *bits])
    every = [f"seed {row}" for row in range(seeds)]
    head = "variant, parameters, applied, rate, MFLOP a byte, MB read, bits a byte".split(", ")
    return _table([*head, *every, "top-k"], lines)


def _routing(variants: dict[str, list[Row]]) -> str:
    lines = []
    for name, rows in variants.items():
        for rule in ("causal", "topk"):
            if _each(rows, rule, "depths"):
                shares = [_list(rows, rule, what) for what in ("depths", "chosen")]
                shares.append(_list(rows, rule, "accuracy") if rule == "topk" else "")  # else the sign is the choice
                dead = [_mean(rows, rule, what, form=".2f", scale=100) for what in ("dead", "dead_positions")]
                lines.append([f"{name}, {rule}", *shares, *dead])
    head = ["variant, rule", "tokens by depth, %", "chosen, %", "foretold, %", "dead tokens, %", "dead positions, %"]
    return _table(head, lines)


def _speed(variants: dict[str, list[Row]], measured: dict[str, Any]) -> str:
    lines = []
    for name, rows in variants.items():
        alone = [measured.get(name, {})]
        speeds = [_mean(alone, door, "tokens_per_second", form=",.0f") for door in ("bodies", "eager")]
        speed, eager = _mean(rows, "tokens_per_second", form=",.0f") or speeds[0], speeds[1]
        memory = _mean(rows, "peak_memory", form=".1f", scale=1e-9)
        how = ", ".join(sorted({row["compiled"] for row in rows}))
        seconds = _mean(rows, "seconds", form=".0f") if _each(rows, "tokens_per_second") else ""  # else beside others
        lines.append([name, how, speed, eager, seconds, _mean(rows, "steps", form=".0f"), memory])
    head = "variant, compiled, bytes a second, eager, seconds, steps, peak memory in GB".split(", ")
    return _table(head, lines)


def _sweep(rows: Sequence[Row]) -> str:
    """Bits a byte of short runs, on the text for choosing."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["variant"], row["rate"])):
        bits = [_mean([row], rule, "bits") for rule in ("causal", "topk")]
        lines.append([row["variant"], f"{row['rate']:g}", *(["failed", ""] if "failed" in row else bits)])
    return _table(["variant that is tuned", "rate", "bits a byte, causal", "top-k"], lines)
