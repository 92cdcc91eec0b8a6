"""Token sets: which tokens a region runs on, and moving rows out of and back into a stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from depthc.ir import sizes
from depthc.ir.errors import VerifyError


@dataclass(frozen=True, eq=False)
class TokenSet:
    """A set of tokens in every batch row, as a mask [batch, tokens]; rows may hold different numbers of tokens."""

    mask: Tensor

    @cached_property
    def positions(self) -> Tensor:
        """[batch, rows]: the selected positions in ascending order; short rows are filled up with others."""
        count = int(self.mask.sum(1).max()) if self.mask.numel() else 0
        return torch.sort((~self.mask).to(torch.int8), dim=1, stable=True).indices[:, :count].sort(1).values

    @cached_property
    def valid(self) -> Tensor:
        """[batch, rows]: whether a row of `positions` is a member."""
        return self.mask.gather(1, self.positions)

    def take(self, stream: Tensor, batch: int = 0, token: int = 1) -> Tensor:
        """The rows of the set, with the token axis where the stream has it."""
        moved = stream.movedim((batch, token), (0, 1))
        rows = torch.arange(len(moved), device=stream.device)[:, None]
        return moved[rows, self.positions].movedim((0, 1), (batch, token))

    def put(self, stream: Tensor, rows: Tensor, batch: int = 0, token: int = 1) -> Tensor:
        """The stream with the set's rows replaced; a new tensor."""
        moved, new = stream.movedim((batch, token), (0, 1)), rows.movedim((batch, token), (0, 1))
        if not new.shape[1]:
            return stream
        numbers = torch.arange(new.shape[1], device=rows.device).expand_as(self.positions)
        source = torch.zeros_like(self.mask, dtype=torch.int64).scatter(1, self.positions, numbers)
        spread = new[torch.arange(len(moved), device=rows.device)[:, None], source]
        chosen = self.mask.reshape(*self.mask.shape, *(1,) * (moved.dim() - 2))
        return torch.where(chosen, spread, moved).movedim((0, 1), (batch, token))


def select(
    rule: str, score: Tensor | None, among: TokenSet | None = None, indices: Mapping[str, int] | None = None
) -> TokenSet:
    """The set that a rule makes of scores [batch, tokens, ...] among the candidates.

    Rules: "all"; "stride(q)": every q-th position; "topk(c)": the max(1, int(c n)) best of n candidates a row, ties to
    the lower position; "threshold(x)": score > x; "atleast(r)": score >= r, an expression over the loop `indices`.
    The first two read no more than the shape of the score, and need none with candidates.

    Example:
        >>> select("topk(0.5)", torch.tensor([[1.0, 3.0, 3.0, 2.0]])).mask
        tensor([[False,  True,  True, False]])
    """
    name, _, rest = rule.partition("(")
    argument = rest.removesuffix(")")
    if among is not None:
        candidates = among.mask
    else:
        assert score is not None, "verify asks for a score or candidates"
        candidates = torch.ones(score.shape[:2], dtype=torch.bool, device=score.device)
    if name == "all":
        return TokenSet(candidates)
    if name == "stride":
        places = torch.arange(candidates.shape[1], device=candidates.device)
        return TokenSet(candidates & (places % int(argument) == 0))
    assert score is not None, "verify asks for a score"
    if name == "threshold":
        return TokenSet(candidates & (score > float(argument)))
    if name == "atleast":
        return TokenSet(candidates & (score >= sizes.evaluate(argument, indices or {})))
    if name == "topk":
        return TokenSet(_best(score, candidates, float(argument)))
    raise VerifyError(
        f"there is no selection rule {rule!r}",
        expected="all, stride(q), topk(c), threshold(x) or atleast(r)",
        found=rule,
        remedy="use one of these rules",
    )


def _best(score: Tensor, candidates: Tensor, capacity: float) -> Tensor:
    counts = candidates.sum(1)
    wanted = torch.minimum((counts.double() * capacity).long().clamp(min=1), counts)
    order = score.masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter(1, order, torch.arange(score.shape[1], device=score.device).expand_as(order))
    return candidates & (rank < wanted[:, None])
