"""Positions: where a program gives tokens their places.

A position is an integer value that counts up along a token axis whatever the arguments hold: an `arange`, or a slice of
a stored table of them. It is found by its values at two lengths, not by the op that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.ops import op_name
from depthc.ir.masks.cones import Choice, Evaluation, Site, Unknown, cone_of, inside, sites_of
from depthc.ir.program import Program, Segment

_LENGTHS = (19, 31)


@dataclass(frozen=True)
class Position:
    """One value that counts tokens.

    Attributes:
        where: the segment, or the block, whose body makes it.
        node: the op that makes it; what follows from it by adding constants is not listed again.
        size: the name of the token axis's length.
        dim: the dimension that counts.
        start: the first token's place.
        writes: the names under which the program reads it, or a reshaped or shifted copy of it.
    """

    where: str
    node: fx.Node
    size: str
    dim: int
    start: int
    writes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where}.{self.node.name} = {self.start} + arange({self.size})"


def positions_of(program: Program) -> tuple[Position, ...]:
    """Where tokens get their places: roots of positions in segments and bodies, in execution order.

    Places that an argument gives (`position_ids`), or that are counted from one (a running sum of a padding mask), are
    data and not listed; nor are those of programs with a static length, in which a count is a number like any other.

    Example:
        >>> [str(p) for p in positions_of(program)]  # doctest: +SKIP
        ['prologue.arange_default = 0 + arange(s)']
    """
    sites = sites_of(program)
    names = _token_names(sites)
    found: list[Position] = []
    done: set[int] = set()
    for site in sites:
        if id(site.body) not in done:
            done.add(id(site.body))
            found.extend(_in_site(program, site, names))
    return tuple(found)


def _token_names(sites: list[Site]) -> list[str]:
    """The names of the lengths that layers run over."""
    blocks = {id(s.block.body): s.block for s in sites if s.block is not None}
    found: dict[str, None] = {}
    for block in blocks.values():
        axes = analyse(block)
        found.update((name, None) for name, size in axes.probe.sizes.items() if size == axes.token.size)
    return list(found)


def _in_site(program: Program, site: Site, names: list[str]) -> list[Position]:
    counting: dict[fx.Node, tuple[str, int, int]] = {}
    for node in site.body.nodes:
        if op_name(node) not in ("sym_size", "python::getitem"):
            match = _counts(program, site, node, names)
            if match:
                counting[node] = match
    op = site.op
    results = {w: inside(site, [r], {}) for w, r in zip(op.writes, site.body.results, strict=True) if r in counting}
    return [
        Position(
            op.name if isinstance(op, Segment) else op.block,
            node,
            *counting[node],
            tuple(name for name, cone in results.items() if node in cone),
        )
        for node in counting
        if not any(n in counting for n in node.all_input_nodes)
    ]


def _counts(program: Program, site: Site, node: fx.Node, names: list[str]) -> tuple[str, int, int] | None:
    """The length's name, the counting dimension and the first number of a node that counts tokens."""
    try:
        if cone_of(program, site, [node]).arguments:
            return None
        for name in names:
            seen = {_count(program, site, node, name, length) for length in _LENGTHS}
            if len(seen) == 1 and None not in seen:
                return (name, *seen.pop())  # type: ignore[misc]
    except (Unknown, RuntimeError, IndexError, TypeError, ValueError):  # not a value of sizes alone
        return None
    return None


def _count(program: Program, site: Site, node: fx.Node, name: str, length: int) -> tuple[int, int] | None:
    sizes: Mapping[str, int] = Choice(program).near(name, length, {})
    value = Evaluation(program, sizes, {}).values(site, [node])[0]
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool or not value.numel():
        return None
    start = int(value.flatten()[0])
    place = torch.arange(start, start + sizes[name], dtype=value.dtype)
    for dim, size in enumerate(value.shape):
        if size == len(place) and (value.movedim(dim, -1) == place).all():
            return dim, start
    return None
