"""Factors of masks: a relation between queries and keys as a product of simple ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["causal", "window", "band", "span", "chunk", "document", "keys", "queries", "tensor"]


@dataclass(frozen=True)
class Factor:
    """One condition on which query may read which key.

    Attributes:
        kind: "causal": no later key. "window": together with causal, the last `of[0]` keys, the own one included.
            "band": keys at a distance of at most `of[0]`. "span": keys from `of[0]` to `of[1]` places after the query,
            None where there is no bound. "chunk": keys in the same chunk of `of[0]` tokens. "document": keys of the
            same document, as the argument `of[0]` says. "keys", "queries": those that the argument switches on.
            "tensor": nothing simpler is known.
        of: its numbers, or the names of arguments.
        counting: of documents: whether the argument counts up by one within each (positions), or is the same (ids).

    Example:
        >>> str(Factor("window", (8,)))
        'window(8)'
    """

    kind: Kind
    of: tuple[Any, ...] = ()
    counting: bool = field(default=False, compare=False, repr=False)

    def __str__(self) -> str:
        name = "window" if self.kind == "span" else self.kind
        return name + (f"({', '.join('inf' if a is None else str(a) for a in self.of)})" if self.of else "")

    @property
    def causal(self) -> bool:
        """Whether it alone keeps queries from reading later keys."""
        return self.kind == "causal" or (self.kind == "span" and self.of[1] is not None and self.of[1] <= 0)

    @property
    def reach(self) -> int | None:
        """How many tokens before a query the furthest key is that it alone leaves; None where there is no bound."""
        if self.kind == "window":
            return int(self.of[0]) - 1
        return -self.of[0] if self.kind == "span" and self.of[0] is not None else None

    def matrix(self, length: int) -> Tensor:
        """The relation among `length` tokens; only of kinds that read no argument."""
        place = torch.arange(length, dtype=torch.int32)
        ahead = place[None, :] - place[:, None]
        match self.kind:
            case "causal":
                return ahead <= 0
            case "window":
                return ahead > -self.of[0]
            case "band":
                return ahead.abs() <= self.of[0]
            case "chunk":
                return place[None, :] // self.of[0] == place[:, None] // self.of[0]
            case "span":
                low, high = self.of
                return (ahead >= (-length if low is None else low)) & (ahead <= (length if high is None else high))
        raise ValueError(f"{self} is not a relation of positions")


def product(factors: Sequence[Factor], queries: int, keys: int) -> Tensor:
    """The relation that several factors make together; none: all pairs."""
    full = torch.ones(queries, keys, dtype=torch.bool)
    for factor in factors:
        full &= factor.matrix(keys)
    return full


def agrees(found: Tensor, expected: Tensor) -> bool:
    """Whether two relations are equal, up to queries without a key: those may read all keys alike, or none."""
    same = (found == expected).all(-1)
    return bool((same | (_trivial(found) & ~expected.any(-1))).all())


def _trivial(found: Tensor) -> Tensor:
    return found.all(-1) | ~found.any(-1)


def fit(found: Tensor) -> tuple[Factor, ...] | None:
    """The factors whose product is a relation [queries, keys]; the simplest there are."""
    if not found.any():
        return None
    return next((f for f in _candidates(found) if agrees(found, product(f, *found.shape))), None)


def _candidates(found: Tensor) -> Iterator[tuple[Factor, ...]]:
    """Products that might be the relation, simple ones first."""
    yield ()
    queries, keys = found.shape
    if queries != keys or queries < 3:
        return
    causal = Factor("causal")
    yield (causal,)
    spans = list(dict.fromkeys(_spans(found)))
    yield from spans
    place = torch.arange(1, keys)
    broken = (~found[place, place - 1] & ~_trivial(found)[1:]).nonzero()
    if len(broken):
        chunk = Factor("chunk", (int(broken[0]) + 1,))
        yield from ((*span, chunk) for span in ((), (causal,), *spans))


def _spans(found: Tensor) -> Iterator[tuple[Factor, ...]]:
    """Products with the nearest and the furthest key as bounds, or without one of them where that is all the same."""
    place = torch.arange(found.shape[0], dtype=torch.int32)
    ahead = (place[None, :] - place[:, None])[found & ~_trivial(found)[:, None]]
    if not len(ahead):
        return
    low, high = int(ahead.min()), int(ahead.max())
    yield from (_span(None, high), _span(low, None), _span(low, high))


def _span(low: int | None, high: int | None) -> tuple[Factor, ...]:
    if high == 0:
        return (Factor("causal"),) if low is None else (Factor("causal"), Factor("window", (1 - low,)))
    if low is not None and low == -(high or 0):
        return (Factor("band", (high,)),)
    return (Factor("span", (low, high)),)


# What arguments do to a relation.

Trial = tuple[Tensor, Tensor]
"""The values of an argument along the keys, and the relation that they lead to."""


def explain(name: str, base: Tensor, trials: Sequence[Trial], by_value: bool = True) -> tuple[Factor, ...] | None:
    """The factors by which an argument takes pairs away from a relation; None if no simple ones do in all trials.

    Args:
        base: the relation under values that take nothing away.
        by_value: whether a key's own value says if it is on; else (lengths, say) only whole columns are asked for.
    """
    square = base.shape[0] == base.shape[1] and by_value
    for same in (None, _equal, _consecutive) if square else (None,):
        flags = _Flags(base, by_value)
        if all(flags.take(values, found, same) for values, found in trials):
            off = [Factor("keys", (name,))] if flags.keys else []
            off += [Factor("queries", (name,))] if flags.queries else []
            document = Factor("document", (name,), counting=same is _consecutive)
            factors = (*((document,) if same else ()), *off)
            return factors or None
    return None


def _equal(values: Tensor) -> Tensor:
    """Documents are runs of tokens with equal ids, wherever they are."""
    return values[:, None] == values[None, :]


def _consecutive(values: Tensor) -> Tensor:
    """Documents are runs in which positions count up by one."""
    return _equal(torch.nn.functional.pad(torch.diff(values) != 1, (1, 0)).cumsum(0))


class _Flags:
    """Which values switch keys and queries off, as far as trials have shown."""

    def __init__(self, base: Tensor, by_value: bool) -> None:
        self.base, self.by_value = base, by_value
        self.on: dict[float, bool] = {}
        self.keys = self.queries = False

    def take(self, values: Tensor, found: Tensor, same: Any) -> bool:
        """Take a trial in; False if it does not fit."""
        base = self.base & same(values) if same else self.base
        told = ~_trivial(found)[:, None]
        gone = (told & base & ~found).any(0)
        off_alike = (found == base).all(-1) & ~(base & ~gone).any(-1)  # all keys are off, which is as if none was
        told &= ~off_alike[:, None]
        kept = (told & base & found).any(0)
        if (told & found & ~base).any() or (gone & kept).any():
            return False
        for value, off in zip(values[gone | kept].tolist(), gone[gone | kept].tolist(), strict=True):
            if self.by_value and self.on.setdefault(value, not off) == off:
                return False
        self.keys |= bool(gone.any())
        if not self.by_value:
            return agrees(found, base & ~gone) or not told.any()
        off = self._off(values)
        silent = _trivial(found) & (found != base & ~off).any(-1) & (base & ~off).any(-1)
        for row in silent.nonzero().flatten().tolist():
            read = {v for v in values[base[row]].tolist() if self.on.get(v, True)}
            if read & self.on.keys():  # keys that others read: the query itself is off
                self.queries = True
                if self.on.get(float(values[row]), True):
                    return False
            elif read:  # only such queries could have read them
                self.keys = True
                self.on.update(dict.fromkeys(read, False))
        return True

    def _off(self, values: Tensor) -> Tensor:
        return torch.tensor([not self.on.get(v, True) for v in values.tolist()])
