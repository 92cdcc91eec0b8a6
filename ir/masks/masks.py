"""Masks: which token may read which, as a product of named conditions.

A mask is judged by what it does, not by how it is written: the port runs on scores of no meaning, and a weight of
zero is a pair that is masked. Only what the mask is computed from is evaluated. Sizes are chosen above every integer in
that computation, since a window of 4096 looks causal at any shorter length. Arguments are given values that mask as
little as possible, and then others in one batch row, to see what each of them takes away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product as pairs
from typing import Any

import torch
from torch import Tensor

from depthc.ir.axes.ports import ports_of
from depthc.ir.masks.attend import Attention
from depthc.ir.masks.cones import Choice, Evaluation, Unknown, sites_of
from depthc.ir.masks.factors import Factor, agrees, explain, fit, product
from depthc.ir.memo import once_a_program
from depthc.ir.program import Call, Program
from depthc.ir.types import Type

LONGEST = 4608  # a relation among more tokens is too large to look at
_SHORT = 37  # where arguments are tried
_LARGE = 1000  # from here on memory counts
_BATCH = 2
_KINDS = ("arange", "zeros", "length")  # of values for an argument, besides ones
_ORDER = ("document", "keys", "queries", "tensor")


@dataclass(frozen=True)
class Mask:
    """Which keys a query of a port may read: those that every factor allows; all, if there is none.

    Attributes:
        bias: whether pairs that are allowed get other additions than zero (ALiBi, relative positions).
        reason: why it is a tensor, for people.

    Example:
        >>> print(Mask((Factor("causal"), Factor("keys", ("attention_mask",)))))
        causal & keys(attention_mask)
    """

    factors: tuple[Factor, ...] = ()
    bias: bool = False
    reason: str = field(default="", compare=False)

    @property
    def causal(self) -> bool:
        """Whether no query reads a later key, whatever the arguments are."""
        return any(f.causal for f in self.factors)

    @property
    def reach(self) -> int | None:
        """How many of the tokens so far the next query may read at most, whatever the arguments are; None: all.

        Example:
            >>> Mask((Factor("causal"), Factor("window", (4,)))).reach, Mask((Factor("causal"),)).reach
            (3, None)
        """
        return min((f.reach for f in self.factors if f.reach is not None), default=None)

    def __str__(self) -> str:
        return (" & ".join(map(str, self.factors)) or "full") + (" + bias" if self.bias else "")


def masks_of(program: Program) -> Mapping[Call, tuple[Mask, ...]]:
    """The masks of every call, one a port; computed once a program.

    Calls that are equal share an entry. Inside `on`, a mask is that of all tokens, of which the set is a part.

    Example:
        >>> [str(mask) for mask in masks_of(program)[call]]  # doctest: +SKIP
        ['causal & window(8)']
    """
    return once_a_program(program, "_masks", lambda: _masks(program))


def _masks(program: Program) -> dict[Call, tuple[Mask, ...]]:
    found: dict[Call, tuple[Mask, ...]] = {}
    known: dict[Any, Mask] = {}
    for site in sites_of(program):
        if isinstance(site.op, Call) and site.block is not None:
            masks = tuple(_known(Attention(program, site, port), known) for port in ports_of(site.block))
            if found.setdefault(site.op, masks) != masks:
                differ = Mask((Factor("tensor"),), reason="it changes from one application to the next")
                found[site.op] = tuple(a if a == b else differ for a, b in zip(found[site.op], masks, strict=True))
    return found


def _known(attention: Attention, known: dict[Any, Mask]) -> Mask:
    """The mask of a port; once for all calls that compute it from the same values."""
    key = (attention.port, tuple(o if _decides(attention, o) else "" for o in attention.origins()))
    if key not in known:
        known[key] = classify(attention)
    return known[key]


def _decides(attention: Attention, origin: Any) -> bool:
    """Whether the mask may differ by what an input is bound to: trained parameters are all alike."""
    params = attention.program.params
    return not (isinstance(origin, str) and origin in params and params[origin].kind == "parameter")


def classify(attention: Attention) -> Mask:
    """The mask of one port of one call."""
    try:
        return Classifier(attention).mask()
    except Unknown as error:
        return Mask((Factor("tensor"),), reason=str(error))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # an op that does not take what is tried
        return Mask((Factor("tensor"),), reason=f"it cannot be evaluated alone: {error}")


class Classifier:
    """Tries sizes and arguments on one port."""

    def __init__(self, attention: Attention) -> None:
        self.attention, self.cone = attention, attention.cone()
        self.types: dict[str, Type] = {
            leaf.name: leaf.type
            for leaf in attention.program.signature.inputs
            if leaf.type is not None and leaf.name in self.cone.arguments
        }
        self.choice = Choice(attention.program)
        axes, port = attention.axes, attention.port
        names = {size: name for name, size in axes.probe.sizes.items()}
        self.token, self.batch = names.get(axes.token.size), names.get(axes.batch.size)
        self.query_size = self.token or axes.token.size
        self.key_size = names.get(port.axis.size, port.axis.size) if port.cross else self.query_size

    def mask(self) -> Mask:
        """The factors of sizes, then those of arguments.

        Raises:
            Unknown: there are none that say it all.
        """
        dtypes = self.attention.from_tokens()
        if any(not d.is_floating_point for d in dtypes):
            raise Unknown("the tokens decide which pairs it allows")
        kinds = self.permissive()
        base, bias = self.look(self.sizes(_SHORT), kinds)
        bias = bias or bool(dtypes)
        factors = self.structure(kinds, base[0])
        told: list[Factor] = []
        for name in self.types:
            found, within = self.effect(name, kinds, base)
            if factors is None or not within:
                return Mask((Factor("tensor", tuple(self.types)),), bias, "it follows no simple pattern")
            told.extend(found)
        if factors is None:
            raise Unknown("the pairs that it allows follow no simple pattern")
        return Mask((*factors, *sorted(told, key=lambda f: _ORDER.index(f.kind))), bias)

    def sizes(self, length: int) -> dict[str, int]:
        """Legal sizes with about `length` tokens; few batch rows, and only one where the relation is large."""
        rows = self.choice.clip(self.batch, _BATCH if length < _LARGE else 1) if self.batch else 0
        return self.choice.near(self.token, length, {self.batch: rows} if self.batch else {})

    def look(
        self, sizes: Mapping[str, int], kinds: Mapping[str, str], changed: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, bool]:
        """The relation at some sizes and arguments, and whether it has a bias."""
        arguments = {n: fill(kinds[n], t.dtype, t.sizes(sizes), self.along(n)) for n, t in self.types.items()}
        heads = not self.token or sizes[self.token] < _LARGE
        evaluation = Evaluation(self.attention.program, sizes, arguments | dict(changed or {}))
        if heads:
            return self.attention.allowed(evaluation)
        try:
            return self.attention.allowed(evaluation, heads=False)
        except RuntimeError:  # a view that counts the heads
            return self.attention.allowed(evaluation)

    def along(self, name: str) -> list[int]:
        """The dimensions of an argument that have the length of the keys or queries."""
        return [d for d, s in enumerate(self.types[name].shape) if s in (self.key_size, self.query_size)]

    def permissive(self) -> dict[str, str]:
        """For every argument the kind of values that masks the least."""
        kinds = dict.fromkeys(self.types, "ones")
        if not self.types:
            return kinds
        sizes = self.sizes(_SHORT)

        def pairs(kind: str, name: str) -> int:
            try:
                return int(self.look(sizes, kinds | {name: kind})[0].sum())
            except (RuntimeError, IndexError):  # not values that it takes
                return -1

        for name in [*self.types] * min(2, len(self.types)):  # twice: one may hide what another does
            kinds[name] = max((kinds[name], *_KINDS), key=lambda kind: pairs(kind, name))
        return kinds

    def structure(self, kinds: Mapping[str, str], short: Tensor) -> tuple[Factor, ...] | None:
        """The factors that only sizes decide, found above every integer of the cone and confirmed at a short length."""
        if not self.token:
            return fit(short)
        reach = max(self.cone.integers, default=0)
        for length in (max(2 * reach, _SHORT) + 30 if reach < _LARGE else reach + 67, reach):
            sizes = self.sizes(length)
            if sizes[self.token] > LONGEST:
                raise Unknown(f"the integer {reach} asks for a look at more than {LONGEST} tokens")
            try:
                found = self.look(sizes, kinds)[0][0]
            except (RuntimeError, IndexError):  # longer than a table: look at all of the table
                if length == reach:
                    raise
                continue
            factors = fit(found)
            fits = factors is not None and agrees(short, product(factors, *short.shape))
            return factors if fits else None
        return None

    def effect(self, name: str, kinds: Mapping[str, str], base: Tensor) -> tuple[tuple[Factor, ...], bool]:
        """What other values of an argument take away, and whether they add no pair."""
        sizes, type, along = self.sizes(_SHORT), self.types[name], self.along(name)
        unknown = (Factor("tensor", (name,)),)
        keys = base.shape[-1]
        if len(along) > 1 or (along and type.sizes(sizes)[along[0]] != keys):
            return unknown, not along[1:]
        rows = next((d for d, s in enumerate(type.shape) if s == self.batch and d not in along), None)
        trials: list[tuple[Tensor, Tensor]] = []
        for pattern in patterns(fill(kinds[name], type.dtype, (keys,), [0]), sorted(self.cone.integers)):
            tensor = fill(kinds[name], type.dtype, type.sizes(sizes), along)
            row = tensor if rows is None else tensor.select(rows, 0)
            dim = along[0] - (rows is not None and rows < along[0]) if along else 0
            row.copy_(pattern.reshape([-1 if d == dim else 1 for d in range(row.dim())]) if along else pattern[3])
            try:
                found = self.look(sizes, kinds, {name: tensor})[0]
            except (RuntimeError, IndexError):  # not a value that it takes
                continue
            if rows is not None and len(found) > 1 and not torch.equal(found[1:], base[-1:].expand_as(found[1:])):
                return unknown, False  # one batch row changes another
            trials.append((pattern, found[0]))
        told = explain(name, base[0], trials, bool(along)) or _binary(name, base[0], trials)
        return told or unknown, bool(told) or all(_within(found, base[0]) for _, found in trials)


def fill(kind: str, dtype: torch.dtype, shape: tuple[int, ...], along: list[int]) -> Tensor:
    """An argument of one kind: ones, zeros, places along its token dimension, or the length everywhere."""
    if kind == "arange" and along and dtype != torch.bool:
        place = torch.arange(shape[along[-1]]).to(dtype)
        return place.reshape([-1 if d == along[-1] else 1 for d in range(len(shape))]).expand(shape).clone()
    return torch.full(shape, {"zeros": 0, "length": LONGEST}.get(kind, 1), dtype=dtype)


def patterns(base: Tensor, integers: list[int]) -> Iterator[Tensor]:
    """Values along the tokens to try: single ones and padding on either side, document ids, restarting positions."""
    count = len(base)
    values: Iterable[Any] = (0, 1, 2, *[i for i in integers if i > 2][:4])
    if base.dtype.is_floating_point:
        values = (0.0, 1.0, -torch.inf, torch.finfo(base.dtype).min)
    elif base.dtype == torch.bool:
        values = (False, True)
    for value, where in pairs(values, (slice(3, 5), slice(0, 4), slice(count - 6, count), slice(0, None, 3))):
        changed = base.clone()
        changed[where] = value
        yield changed
    if base.dtype == torch.bool or base.dtype.is_floating_point:
        return
    place = torch.arange(count, dtype=base.dtype)
    yield place
    for cuts in ((count // 2,), (5, count - 9), (1, 7, 8)):
        parts = [p.clone() for p in place.tensor_split(cuts)]
        yield torch.cat([torch.full_like(p, i + 1) for i, p in enumerate(parts)])
        yield torch.cat([torch.full_like(p, i) for i, p in enumerate(parts)])
        yield torch.cat([p - p[0] for p in parts])


def _binary(name: str, base: Tensor, trials: list[tuple[Tensor, Tensor]]) -> tuple[Factor, ...] | None:
    """What zeros and ones alone take away: arithmetic such as `(1 - mask) * -10000` is made for them only."""
    told = explain(name, base, [(v, found) for v, found in trials if ((v == 0) | (v == 1)).all()])
    return told if told and not any(f.kind == "document" for f in told) else None


def _within(found: Tensor, base: Tensor) -> bool:
    """Whether all pairs were there before, up to queries that read all keys alike since they may read none."""
    return not (found & ~base & ~found.all(-1, keepdim=True)).any()
