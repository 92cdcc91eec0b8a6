"""Figures: what the programs before and after cost, side by side, at a few legal sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from depthc.codegen.dump.words import NO_VALUE, TIMES, short
from depthc.ir.cost.cost import Cost
from depthc.ir.cost.sizes import sizes_of
from depthc.ir.program import Program

LENGTHS = (512, 2048, 8192)
ALIKE = 0.005  # ratios that differ by less are told once


@dataclass(frozen=True)
class Row:
    """One line of the table: what is counted before and after.

    Attributes:
        values: the numbers; None where there are none.
        at_most: whether they are the most that there can be, since the data decide.
    """

    name: str
    values: tuple[int | None, int | None]
    unit: str = ""
    at_most: tuple[bool, bool] = (False, False)

    @property
    def ratio(self) -> float | None:
        """After to before."""
        before, after = self.values
        return after / before if before and after is not None else None


def rows_of(costs: tuple[Cost, Cost], program: Program, layers: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """The table of two costs.

    Args:
        program: the captured one; says which sizes are legal.
        layers: how many layers are applied, and how many stored, each before and after.
    """
    yield from (Row(name, pair) for name, pair in zip(("layers applied", "layers stored"), layers, strict=True))
    before, after = costs
    yield Row("parameters", (before.parameters, after.parameters))
    yield Row("their bytes", (before.parameter_bytes, after.parameter_bytes), "B")
    flops, kept = [], []
    for place in list({tuple(sizes_of(program, length).items()): None for length in LENGTHS}):
        one, other = (cost.at(**cost.among(dict(place))) for cost in costs)
        said, most = ", ".join(f"{name} = {size:,}" for name, size in place), (one.at_most, other.at_most)
        flops.append(Row(f"FLOPs of a forward, {said}", (one.flops, other.flops), "", most))
        kept.append(Row(f"keys and values kept, {said}", (one.cache_bytes, other.cache_bytes), "B", most))
    yield from (*_telling(flops), *_telling(kept))


def _telling(rows: list[Row]) -> list[Row]:
    """The rows of several lengths; only the middle one where they have the same ratio."""
    ratios = [row.ratio for row in rows if row.ratio is not None]
    alike = not ratios or max(ratios) - min(ratios) < ALIKE
    return [rows[len(rows) // 2]] if alike else rows


# HTML


def figures_html(rows: Sequence[Row], costs: tuple[Cost, Cost]) -> Iterator[str]:
    """The table, what its signs mean, and the closed forms."""
    titles = "".join(f'<th scope="col">{title}</th>' for title in ("captured", "after", "ratio"))
    yield f'<div class="wide" tabindex="0"><table>\n<thead><tr><td></td>{titles}</tr></thead>\n<tbody>'
    for row in rows:
        cells = (*(_value(row, n) for n in (0, 1)), _ratio(row))
        yield f'<tr><th scope="row">{escape(row.name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
    yield "</tbody>\n</table></div>"
    if any(any(row.at_most) for row in rows):
        said = "≤: the data decide how many tokens run; the figure is for as many as there can be."
        yield f'<p class="muted"><small>{said}</small></p>'
    reasons = dict.fromkeys(cost.no_cache for cost in costs if cost.no_cache)
    yield from (f'<p class="muted"><small>{NO_VALUE}: {escape(reason)}.</small></p>' for reason in reasons)
    yield _closed_forms(costs)


def _value(row: Row, number: int) -> str:
    value = row.values[number]
    return NO_VALUE if value is None else f"{'≤ ' if row.at_most[number] else ''}{short(value, row.unit)}"


def _ratio(row: Row) -> str:
    """To three digits; 1 where nothing changed, 1.00 where little did."""
    if row.ratio is None:
        return ""
    said = "1" if row.ratio == 1 else f"{row.ratio:.2f}" if 0.995 <= row.ratio < 9.995 else f"{row.ratio:.3g}"
    return f"{'≤ ' if row.at_most == (False, True) else ''}{TIMES}{said}"


def _closed_forms(costs: tuple[Cost, Cost]) -> str:
    """FLOPs and caches as formulas, folded, with what stands in them."""
    items: list[tuple[str, str]] = []
    for title, cost in zip(("captured", "after"), costs, strict=True):
        items.append((f"FLOPs, {title}", str(cost.flops)))
        items += [] if cost.cache_bytes is None else [(f"bytes of keys and values, {title}", str(cost.cache_bytes))]
        items += [(f"{name}, a capacity", str(value)) for name, value in cost.capacities.items()]
        items += [(f"{name}, which the data decide", f"at most {bound}") for name, bound in cost.unknown.items()]
    lines = "\n".join(f"<dt>{escape(name)}</dt><dd><code>{escape(text)}</code></dd>" for name, text in items)
    return f"<details><summary>In closed form</summary>\n<dl>\n{lines}\n</dl>\n</details>"
