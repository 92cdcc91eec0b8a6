"""Token sets: which tokens a region runs on, and moving rows out of and back into a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor


def found_once(find: Callable[[Any], Any]) -> property:
    """A property found once; not functools.cached_property, whose lock Dynamo does not enter (Python 3.11)."""

    def found(self: Any) -> Any:
        if find.__name__ not in self.found:
            self.found[find.__name__] = find(self)
        return self.found[find.__name__]

    return property(found, doc=find.__doc__)


@dataclass(frozen=True, eq=False)
class Held:
    """Of the last member of a set among the tokens so far: its rows of some streams, each [batch, 1, ...], and whether
    there is one, bool [batch, 1]."""

    values: tuple[Tensor, ...]
    valid: Tensor


@dataclass(frozen=True, eq=False)
class TokenSet:
    """A set of tokens in every batch row; rows may hold different numbers of tokens.

    Attributes:
        mask: [batch, tokens].
        count: how many members every batch row has, where that is known without a look at the data.
        most: how many it has at most, the same way; without either the data are looked at.
    """

    mask: Tensor
    count: int | None = None
    most: int | None = None
    bounded: ClassVar[bool] = False  # whether packed rows go on behind the members, up to the number of all tokens
    found: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # properties that were asked for

    @property
    def everyone(self) -> bool:
        """Whether it is known to hold every token."""
        return self.count is not None and self.count == self.mask.shape[1]

    @property
    def ragged(self) -> bool:
        """Whether only the data tell how many members a batch row has; then its rows are better packed than padded."""
        return self.count is None and self.most is None and self.mask.shape[0] > 1

    @found_once
    def width(self) -> int:
        """The rows that a region on the set has for every row of the batch."""
        bound = self.most if self.count is None else self.count
        return bound if bound is not None else int(self.mask.sum(1).max()) if self.mask.numel() else 0

    @found_once
    def positions(self) -> Tensor:
        """[batch, rows]: the selected positions in ascending order; short rows are filled up with others."""
        if self.everyone:
            return torch.arange(self.mask.shape[1], device=self.mask.device).expand_as(self.mask)
        first = torch.sort((~self.mask).to(torch.int8), dim=1, stable=True).indices[:, : self.width]
        return first if self.count is not None else first.sort(1).values

    @found_once
    def valid(self) -> Tensor | None:
        """[batch, rows]: whether a row of `positions` is a member; None if all are."""
        return None if self.count is not None else self.mask.gather(1, self.positions)

    @found_once
    def slots(self) -> Tensor:
        """[members]: where each member is among the rows of `positions`, flattened."""
        slots = torch.arange(self.positions.numel(), device=self.mask.device).view_as(self.positions)
        return torch.zeros_like(self.mask, dtype=torch.int64).scatter(1, self.positions, slots).flatten()[self.places]

    @found_once
    def places(self) -> Tensor:
        """[members]: where each member is among all tokens, flattened."""
        return self.mask.flatten().nonzero()[:, 0]

    def pack(self, stream: Tensor) -> Tensor:
        """[1, members, ...]: the rows of the set in all batch rows of a stream [batch, tokens, ...]."""
        return stream.flatten(0, 1)[self.places][None]

    def unpack(self, stream: Tensor, packed: Tensor) -> Tensor:
        """The stream with the set's rows replaced by packed ones; a new tensor."""
        flat = stream.flatten(0, 1).index_put((self.places,), packed[0].to(stream.dtype))
        return flat.unflatten(0, stream.shape[:2])

    def take(self, stream: Tensor, batch: int = 0, token: int = 1) -> Tensor:
        """The rows of the set, with the token axis where the stream has it."""
        if self.everyone:
            return stream
        moved = stream.movedim((batch, token), (0, 1))
        rows = torch.arange(moved.shape[0], device=stream.device)[:, None]
        return moved[rows, self.positions].movedim((0, 1), (batch, token))

    def put(self, stream: Tensor, rows: Tensor, batch: int = 0, token: int = 1) -> Tensor:
        """The stream with the set's rows replaced; a new tensor."""
        if self.everyone:
            return rows
        moved, new = stream.movedim((batch, token), (0, 1)), rows.movedim((batch, token), (0, 1))
        if not self.width:
            return stream
        at = self.positions.reshape(*self.positions.shape, *(1,) * (moved.dim() - 2)).expand_as(new)
        if self.valid is not None:
            kept = moved.gather(1, at)
            new = torch.where(self.valid.reshape(*self.valid.shape, *(1,) * (moved.dim() - 2)), new, kept)
        return moved.scatter(1, at, new.to(moved.dtype)).movedim((0, 1), (batch, token))

    def merge(
        self,
        stream: Tensor,
        rows: Tensor,
        combine: Callable[..., Tensor] | None = None,
        extra: Sequence[Tensor] = (),
        over: TokenSet | None = None,
    ) -> Tensor:
        """The stream with the set's rows replaced: by new ones, or by what `combine` makes of the old, the new and the
        rows of `extra`. With `over` the rows of all its tokens, see `spread`."""
        if over is not None:
            return self.spread(stream, rows, over, combine, extra)[0]
        packed = self.ragged and rows.shape[0] == 1  # a batch of one, as a region makes of a ragged set
        take, put = (self.pack, self.unpack) if packed else (self.take, self.put)
        return put(stream, rows if combine is None else combine(take(stream), rows, *map(take, extra)))

    @found_once
    def last(self) -> Tensor:
        """[batch, tokens]: the last member that is not behind a token; -1 before the first one."""
        places = torch.arange(self.mask.shape[1], device=self.mask.device)
        return torch.where(self.mask, places, -1).cummax(1).values

    def spread(
        self,
        stream: Tensor,
        rows: Tensor,
        over: TokenSet,
        combine: Callable[..., Tensor] | None = None,
        extra: Sequence[Tensor] = (),
        held: Held | None = None,
    ) -> tuple[Tensor, Held]:
        """The stream with the rows of `over` replaced, by what `merge` makes of the rows of the last member that is not
        behind a token; and what tokens behind these need to go on, which is `held` of those before.

        Example:
            >>> members, everyone = (TokenSet(torch.tensor([mask]) > 0) for mask in ([0, 1, 0, 1], [1, 1, 1, 0]))
            >>> stream = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
            >>> members.spread(stream, members.take(stream) * 10, everyone)[0].tolist()
            [[1.0, 20.0, 20.0, 4.0]]
        """
        values, members = [self.merge(stream, rows), *extra], self
        if held is not None:
            members = TokenSet(torch.cat([held.valid, self.mask], 1))
            values = [torch.cat([before, value], 1) for before, value in zip(held.values, values, strict=True)]
        batch = torch.arange(self.mask.shape[0], device=stream.device)[:, None]
        at = members.last
        values = [value[batch, at.clamp(min=0)] for value in values]
        new, *others = (value[:, at.shape[1] - stream.shape[1] :] for value in values)
        made = new if combine is None else combine(stream, new, *others)
        reached = over.mask & (at[:, at.shape[1] - stream.shape[1] :] >= 0)
        shape = (*reached.shape, *(1,) * (stream.dim() - 2))
        now = Held(tuple(value[:, -1:] for value in values), at[:, -1:] >= 0)
        return torch.where(reached.view(shape), made.to(stream.dtype), stream), now

    def among(self, start: int) -> TokenSet:
        """The same set of the tokens from `start` on alone."""
        return TokenSet(self.mask[:, start:])
