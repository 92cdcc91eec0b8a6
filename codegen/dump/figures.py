"""Figures: what the programs before and after cost, side by side, at a few legal sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape

from depthc.codegen.dump.words import short
from depthc.ir import sizes
from depthc.ir.cost.cost import Cost, Figures
from depthc.ir.errors import IncrementalError
from depthc.ir.plans import token_dim
from depthc.ir.program import Program, calls
from depthc.passes.stages import Stage

LENGTHS = (512, 2048, 8192)
TRIES = 512  # lengths below a wanted one that are tried, where guards forbid it


@dataclass(frozen=True)
class Row:
    """One line of the table: the values before and after in words, and their ratio."""

    name: str
    before: str
    after: str
    ratio: float | None


def sizes_of(program: Program, length: int) -> Mapping[str, int]:
    """Legal sizes with every token axis as near to a length as it may be, from below, and all others at their least.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> sizes_of(depthc.capture(model, (torch.ones(2, 5, 4),)), 2048)
        {'b': 1, 's': 2048}
    """
    tokens = _token_sizes(program)
    for tried in range(length, max(0, length - TRIES), -1):
        found = {name: _within(tried if name in tokens else 1, span) for name, span in program.signature.ranges.items()}
        if all(sizes.evaluate(guard, found) for guard in program.signature.guards):
            return found
    return {name: _within(1, span) for name, span in program.signature.ranges.items()}


def _within(size: int, span: tuple[int, int | None]) -> int:
    least, most = span
    return max(least, size if most is None else min(size, most))


def _token_sizes(program: Program) -> set[str]:
    """The size names that the lengths of the stacks are made of."""
    found: set[str] = set()
    for stack in program.stacks:
        for call, _ in calls(stack.ops):
            block = program.blocks[call.block]
            try:
                size = block.body.inputs_of("value")[0].type.shape[token_dim(block)]  # type: ignore[union-attr]
            except IncrementalError:  # what flows through it has no token axis
                continue
            found |= sizes.names(sizes.read(size)) if isinstance(size, str) else set()
    return found


def at(cost: Cost, given: Mapping[str, int]) -> Figures:
    """A cost at sizes of which it may not depend on all."""
    known = {s.name for e in (cost.flops, cost.cache_bytes, *cost.unknown.values()) if e is not None for s in e.free_symbols}
    return cost.at(**{name: size for name, size in given.items() if name in known})


def rows_of(first: Stage, last: Stage, stored: tuple[int, int]) -> Iterator[Row]:
    """The table; `stored` counts the layers with parameters of their own, before and after."""
    depths = [sum(stage.program.depths) for stage in (first, last)]
    yield _row("layers applied", *depths)
    yield _row("layers stored", *stored)
    yield _row("parameters", first.cost.parameters, last.cost.parameters)
    yield _row("bytes of parameters", first.cost.parameter_bytes, last.cost.parameter_bytes, "B")
    places = list({tuple(sizes_of(first.program, n).items()): None for n in LENGTHS})
    pairs = [(place, [at(stage.cost, dict(place)) for stage in (first, last)]) for place in places]
    for place, (before, after) in pairs:
        yield _row(f"FLOPs of a forward, {_said(place)}", before.flops, after.flops, "", (before.at_most, after.at_most))
    for place, (before, after) in pairs:
        most = (before.at_most, after.at_most)
        yield _row(f"keys and values kept, {_said(place)}", before.cache_bytes, after.cache_bytes, "B", most)


def _said(place: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{name} = {size:,}" for name, size in place)


def _row(
    name: str, before: int | None, after: int | None, unit: str = "", most: tuple[bool, bool] = (False, False)
) -> Row:
    ratio = after / before if before and after is not None else None
    said = [f"{'≤ ' if m else ''}{short(n, unit)}" if n is not None else "–" for n, m in zip((before, after), most, strict=True)]
    return Row(name, *said, ratio)


def table_html(rows: list[Row]) -> str:
    """The rows as a table."""
    head = "<thead><tr><th></th><th>captured</th><th>after</th><th>ratio</th></tr></thead>"
    body = "\n".join(
        f"<tr><th>{escape(row.name)}</th><td>{row.before}</td><td>{row.after}</td><td>{_ratio(row.ratio)}</td></tr>"
        for row in rows
    )
    return f'<div class="wide" tabindex="0"><table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"×{ratio:.3g}" if ratio < 9.995 else f"×{ratio:.0f}"


def closed_forms_html(first: Stage, last: Stage) -> str:
    """FLOPs and cache of both programs as formulas, folded, with what stands in them."""
    items = []
    for title, cost in (("captured", first.cost), ("after", last.cost)):
        cache = f"no cache: {cost.no_cache}" if cost.cache_bytes is None else str(cost.cache_bytes)
        items += [(f"FLOPs, {title}", str(cost.flops)), (f"cache bytes, {title}", cache)]
        items += [(f"capacity {name}", str(value)) for name, value in cost.capacities.items()]
        items += [(f"set {name}, {title}", f"the data decide; at most {bound}") for name, bound in cost.unknown.items()]
    lines = "\n".join(f"<dt>{escape(name)}</dt><dd><code>{escape(text)}</code></dd>" for name, text in items)
    return f"<details><summary>In closed form</summary>\n<dl>\n{lines}\n</dl>\n</details>"
