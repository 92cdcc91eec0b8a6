"""Token sets whose rows move without sums, and those that can be chosen before any layer runs.

The host has to know how many rows a set has. It waits for that until the device has done all that was asked of it
before; so sets that no layer changes, as where tokens choose their depth, are chosen and counted together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthc.codegen.kernels.combine.reference import inverse_of
from depthc.codegen.kernels.common import runs_on
from depthc.codegen.kernels.rows import take_rows
from depthc.ir import sizes
from depthc.ir.evaluate import Evaluator
from depthc.ir.liveness import writes_of
from depthc.ir.program import Loop, Select
from depthc.ir.tokens import TokenSet, found_once


@dataclass(frozen=True, eq=False)
class Tokens(TokenSet):
    """A token set whose rows move by positions and their inverse.

    Attributes:
        by_rows: whether rows out of a stream take the gradient that is no sum.
    """

    by_rows: bool = True

    @found_once
    def inverse(self) -> Tensor:
        """int32 [batch, tokens]: where each token stands among the rows, -1 if it does not."""
        return inverse_of(self.positions, self.mask.shape[1], self.valid)

    @found_once
    def packed_inverse(self) -> Tensor:
        """int32 [1, batch * tokens]: where each token stands among packed rows, -1 if it does not."""
        return inverse_of(self.places[None], self.mask.numel())

    def take(self, stream: Tensor, batch: int = 0, token: int = 1) -> Tensor:
        """See `TokenSet.take`; the gradient is no sum."""
        if self.everyone or (batch, token) != (0, 1) or not self._moves(stream):
            return super().take(stream, batch, token)
        return take_rows(stream, self.positions, self.inverse)

    @found_once
    def places(self) -> Tensor:
        """See `TokenSet.places`; without a wait where it is known how many there are."""
        members = self.found.get("members")
        return super().places if members is None else self.order[:members]

    @found_once
    def ranks(self) -> Tensor:
        """[batch * tokens]: where each token stands among all, members first."""
        members, others = self.mask.flatten(), ~self.mask.flatten()
        return torch.where(members, members.cumsum(0), members.sum() + others.cumsum(0)) - 1

    @found_once
    def order(self) -> Tensor:
        """[batch * tokens]: where each member is among all tokens, flattened, and then each other token."""
        return self.ranks.scatter(0, self.ranks, torch.arange(self.mask.numel(), device=self.mask.device))

    def pack(self, stream: Tensor) -> Tensor:
        """See `TokenSet.pack`; the gradient is no sum."""
        if not self._moves(stream):
            return super().pack(stream)
        return take_rows(stream.flatten(0, 1)[None], self.places[None], self.packed_inverse)

    def _moves(self, stream: Tensor) -> bool:
        """Whether rows of a stream move by positions and their inverse."""
        return self.by_rows and stream.shape[:2] == self.mask.shape and not runs_on(stream)


class Bounded(Tokens):
    """A set that is packed at the size of all tokens: members first, then the others, which need not be computed.

    So nothing waits for how many members there are, a CUDA graph may hold what is done with them, and a compiler sees
    the whole as one graph. It takes the memory of all tokens. A single sequence is not packed, and wholly computed.
    """

    bounded = True

    @found_once
    def width(self) -> int:
        """See `TokenSet.width`."""
        return self.mask.shape[1]

    @found_once
    def positions(self) -> Tensor:
        """All positions."""
        return torch.arange(self.mask.shape[1], device=self.mask.device).expand_as(self.mask)

    @found_once
    def valid(self) -> Tensor:
        """Which positions are members."""
        return self.mask

    @found_once
    def places(self) -> Tensor:
        """See `TokenSet.places`: each other token too, behind the members."""
        return self.order

    @found_once
    def slots(self) -> Tensor:
        """See `TokenSet.slots`: the rows of `positions` are all tokens."""
        return self.places

    @found_once
    def packed_inverse(self) -> Tensor:
        """See `Tokens.packed_inverse`."""
        return self.ranks.where(self.mask.flatten(), -1).int()[None]

    def unpack(self, stream: Tensor, packed: Tensor) -> Tensor:
        """See `TokenSet.unpack`; the rows of other tokens are not put back."""
        rows = packed[0][self.ranks].to(stream.dtype).unflatten(0, stream.shape[:2])
        return torch.where(self.mask.view(*self.mask.shape, *(1,) * (stream.dim() - 2)), rows, stream)


class Ahead:
    """The sets of a loop that hang on nothing that the loop makes, but for other sets."""

    def __init__(self) -> None:
        self._sets: dict[tuple[Any, ...], deque[TokenSet | None]] = {}

    def choose(self, evaluator: Evaluator, loop: Loop, values: Mapping[str, Any], indices: Mapping[str, int]) -> None:
        """Choose them for all iterations, and count them; not those that the loop may end before."""
        if loop.until and not evaluator.training:
            return
        known, found = dict(values), dict[tuple[Any, ...], deque[TokenSet | None]]()
        for index in range(sizes.evaluate(loop.count, indices)):
            inner = {**indices, loop.index: index}
            for op in loop.body:
                chosen = None
                if isinstance(op, Select):
                    chosen = evaluator.select(op, known, inner) if {*op.reads} <= {*known} else None
                    found.setdefault(_key(op, inner), deque()).append(chosen)
                for name in writes_of(op):
                    known.pop(name, None)
                    known.update({} if chosen is None else {name: chosen})
        self._sets.update(found)
        count(one for made in found.values() for one in made if one is not None)

    def take(self, op: Select, indices: Mapping[str, int]) -> TokenSet | None:
        """The set that a select makes, if it was chosen before."""
        waiting = self._sets.get(_key(op, indices))
        return waiting.popleft() if waiting else None


def count(sets: Iterable[TokenSet]) -> None:
    """Find how many members sets have, where only the data say it: with one wait for all."""
    unknown = list(filter(_is_uncounted, dict.fromkeys(sets)))
    if not unknown:
        return
    found = torch.stack([torch.stack([one.mask.sum(1).amax(), one.mask.sum()]) for one in unknown])
    for one, (width, members) in zip(unknown, found.tolist(), strict=True):
        one.found.update(width=width, members=members)


def _is_uncounted(one: TokenSet) -> bool:
    """Whether the host would have to wait for a set's size."""
    known = one.bounded or one.count is not None or one.most is not None or "width" in one.found
    return isinstance(one, Tokens) and not known and one.mask.numel() > 0


def _key(op: Select, indices: Mapping[str, int]) -> tuple[Any, ...]:
    return id(op), *indices.items()
