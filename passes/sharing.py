"""Sharing: which layer of a stack becomes which slot, and which layers the values of a slot come from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

SHARINGS = ("cycle", "sequence", "middle_cycle", "middle_sequence", "cycle_rev")
INITS = ("stepwise", "average", "lower", "upper", "random", "random_layers")


def legal_loops(sharing: str, layers: int) -> tuple[int, ...]:
    """Every number of loops that divides the layers.

    Example:
        >>> legal_loops("middle_cycle", 8)
        (1, 2, 3, 6)
    """
    inner = layers - 2 if sharing.startswith("middle") else layers
    return tuple(n for n in range(1, inner + 1) if inner % n == 0)


@dataclass(frozen=True)
class Sharing:
    """Slots of `layers` layers under `loops` loops; where they do not divide, layers are left out, evenly spread.

    Example:
        >>> Sharing("middle_cycle", 8, 3).slots
        (0, 1, 2, 1, 2, 1, 2, 3)
        >>> Sharing("cycle_rev", 6, 3).slots
        (0, 1, 1, 0, 0, 1)
    """

    kind: str
    layers: int
    loops: int

    @property
    def middle(self) -> bool:
        """Whether the first and the last layer keep parameters of their own."""
        return self.kind.startswith("middle")

    @property
    def period(self) -> int:
        """Layers that are shared: b in MoR's notation."""
        return (self.layers - 2 if self.middle else self.layers) // self.loops

    @property
    def unique(self) -> int:
        """Slots: layers with parameters of their own."""
        return self.period + (2 if self.middle else 0)

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The layers that stay, by their place in the original stack."""
        count, last = self.period * self.loops, self.layers - 1
        if self.middle:
            return (0, *_spread(1, last - 1, count), last)
        return _spread(0, last, count)

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The slot of every layer that stays."""
        inner = [self._slot(i) for i in range(self.period * self.loops)]
        return (0, *(1 + slot for slot in inner), self.unique - 1) if self.middle else tuple(inner)

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
        if self.middle and slot in (0, self.unique - 1):
            return (0,) if slot == 0 else (self.layers - 1,)
        if init == "average":
            return tuple(layer for layer, own in zip(self.kept, self.slots, strict=True) if own == slot)
        first, last = (1, self.layers - 2) if self.middle else (0, self.layers - 1)
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
