"""Tandem repeats: the stretches of a sequence that consist of the same period over and over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Repeat:
    """`length` items from `start` on, of which each equals the one `period` items before it."""

    start: int
    period: int
    length: int

    @property
    def stop(self) -> int:
        """One past the last item."""
        return self.start + self.length

    @property
    def partial(self) -> bool:
        """Whether it ends before its second period does."""
        return self.length < 2 * self.period


def best_repeat(
    items: Sequence[str],
    weight: Callable[[int], int],
    preference: Callable[[int], int] = lambda i: 0,
    partial: bool = False,
) -> Repeat | None:
    """The repeat that saves the most weight; among equals the smallest period, then the preferred start.

    Args:
        items: the sequence; equal text is equal.
        weight: of the item at an index.
        preference: of a boundary before the item at an index; larger is better.
        partial: whether a repeat may end before its second period does.

    Example:
        >>> best_repeat("xabababy", weight=lambda i: 1)
        Repeat(start=1, period=2, length=6)
        >>> best_repeat("xabcdaby", weight=lambda i: 1, partial=True)
        Repeat(start=1, period=4, length=6)
    """
    totals = [0]
    for i in range(len(items)):
        totals.append(totals[-1] + weight(i))

    def rank(r: Repeat) -> tuple[int, int, int, int]:
        return totals[r.stop - r.period] - totals[r.start], -r.period, preference(r.start), -r.start

    return max((r for r in _repeats(items) if partial or not r.partial), key=rank, default=None)


def _repeats(items: Sequence[str]) -> Iterator[Repeat]:
    """Every repeat of whole periods, and the partial ones that nothing continues."""
    for period in range(1, len(items)):
        start = 0
        while start + period < len(items):
            stop = start
            while stop + period < len(items) and items[stop] == items[stop + period]:
                stop += 1
            length = stop + period - start
            whole = length // period * period
            if whole > period:
                yield from (Repeat(start + offset, period, whole) for offset in range(length - whole + 1))
            elif stop > start:
                yield Repeat(start, period, length)
            start = stop + 1
