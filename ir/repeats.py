"""Tandem repeats: the stretches of a sequence that consist of the same period over and over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Repeat:
    """`count` copies of `period` items from `start` on."""

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        """One past the last item."""
        return self.start + self.period * self.count


def best_repeat(
    items: Sequence[str], weight: Callable[[int], int], preference: Callable[[int], int] = lambda i: 0
) -> Repeat | None:
    """The repeat that covers the most weight; among equals the smallest period, then the preferred start.

    Args:
        items: the sequence; equal text is equal.
        weight: of the item at an index.
        preference: of a boundary before the item at an index; larger is better.

    Example:
        >>> best_repeat("xabababy", weight=lambda i: 1)
        Repeat(start=1, period=2, count=3)
    """
    totals = [0]
    for i in range(len(items)):
        totals.append(totals[-1] + weight(i))

    def rank(r: Repeat) -> tuple[int, int, int, int]:
        return totals[r.stop] - totals[r.start], -r.period, preference(r.start), -r.start

    return max(_repeats(items), key=rank, default=None)


def _repeats(items: Sequence[str]) -> Iterator[Repeat]:
    for period in range(1, len(items) // 2 + 1):
        start = 0
        while start + period < len(items):
            stop = start
            while stop + period < len(items) and items[stop] == items[stop + period]:
                stop += 1
            count = (stop - start) // period + 1
            if count >= 2:
                for offset in range(stop + period - start - count * period + 1):
                    yield Repeat(start + offset, period, count)
            start = stop + 1
