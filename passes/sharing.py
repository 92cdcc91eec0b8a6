"""Sharing: which layer of a stack becomes which slot, and which layers the values of a slot come from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

SHARINGS = ("cycle", "sequence", "middle_cycle", "middle_sequence", "cycle_rev")
INITS = ("stepwise", "average", "lower", "upper", "random", "random_layers")


def legal_loops(sharing: str, layers: int, keep: tuple[int, int] = (1, 1)) -> tuple[int, ...]:
    """Every number of loops that divides the layers.

    Example:
        >>> legal_loops("middle_cycle", 8)
        (1, 2, 3, 6)
    """
    inner = layers - sum(keep) if sharing.startswith("middle") else layers
    return tuple(n for n in range(1, inner + 1) if inner % n == 0)


def cycles(layers: int) -> Iterator[Sharing]:
    """Every way to apply a cycle of layers more than once: with one layer kept at both ends, with none, then others.

    Example:
        >>> [(way.keep, way.loops) for way in cycles(3)]
        [((0, 0), 3), ((0, 1), 2), ((1, 0), 2)]
    """
    some = sorted(((a, z) for a in range(layers) for z in range(layers - a)), key=sum)
    for keep in dict.fromkeys(((1, 1), *some)):
        kind = "middle_cycle" if any(keep) else "cycle"
        yield from (Sharing(kind, layers, loops, keep) for loops in legal_loops(kind, layers, keep) if loops > 1)


@dataclass(frozen=True)
class Sharing:
    """Slots of `layers` layers under `loops` loops; where they do not divide, layers are left out, evenly spread.

    `keep` says how many layers at the start and at the end stay their own under the "middle" sharings.

    Example:
        >>> Sharing("middle_cycle", 8, 3).slots
        (0, 1, 2, 1, 2, 1, 2, 3)
        >>> Sharing("cycle_rev", 6, 3).slots
        (0, 1, 1, 0, 0, 1)
    """

    kind: str
    layers: int
    loops: int
    keep: tuple[int, int] = (1, 1)

    @property
    def outer(self) -> tuple[int, int]:
        """How many layers at the start and at the end keep parameters of their own."""
        return self.keep if self.kind.startswith("middle") else (0, 0)

    @property
    def period(self) -> int:
        """Layers that are shared: b in MoR's notation."""
        return (self.layers - sum(self.outer)) // self.loops

    @property
    def unique(self) -> int:
        """Slots: layers with parameters of their own."""
        return self.period + sum(self.outer)

    @property
    def _inner(self) -> tuple[int, int]:
        """The first and the last layer that share."""
        return self.outer[0], self.layers - 1 - self.outer[1]

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The layers that stay, by their place in the original stack."""
        first, last = self._inner
        return (*range(first), *_spread(first, last, self.period * self.loops), *range(last + 1, self.layers))

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The slot of every layer that stays."""
        first = self.outer[0]
        inner = (first + self._slot(i) for i in range(self.period * self.loops))
        return (*range(first), *inner, *range(first + self.period, self.unique))

    def _slot(self, i: int) -> int:
        if self.kind.endswith("sequence"):
            return i // self.loops
        at = i % self.period
        return self.period - 1 - at if self.kind == "cycle_rev" and i // self.period % 2 else at

    def sources(self, slot: int, init: str, rounding: str = "", seed: int = 0) -> tuple[int, ...]:
        """The layers of the original stack that a slot's values are made of; several are averaged.

        Example:
            >>> [Sharing("middle_cycle", 8, 3).sources(k, "stepwise") for k in range(4)]
            [(0,), (1,), (6,), (7,)]
        """
        first, last = self._inner
        if not first <= slot < first + self.period:
            return (slot,) if slot < first else (slot + self.layers - self.unique,)
        if init == "average":
            return tuple(layer for layer, own in zip(self.kept, self.slots, strict=True) if own == slot)
        at = slot - first
        match init:
            case "lower" | "random":
                return (first + at,)
            case "upper":
                return (last - self.period + 1 + at,)
            case "random_layers":
                drawn = random.Random(seed).sample(range(first, last + 1), self.period)
                return (sorted(drawn)[at],)
        if self.period == 1:
            return (first,)
        if rounding == "mor":
            return (round(first + at * (last - first) / (self.period - 1)),)
        return (first + at * (last - first) // (self.period - 1),)


def _spread(first: int, last: int, count: int) -> tuple[int, ...]:
    """`count` of the integers from `first` to `last`, evenly spread, ends included: round(linspace)."""
    if count == 1:
        return (first,)
    return tuple(round(first + i * (last - first) / (count - 1)) for i in range(count))
