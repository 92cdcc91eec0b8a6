"""Selection in plain torch: what the kernels of this folder compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from depthc.ir.selection import refuse_nan


@dataclass(frozen=True, eq=False)
class Selection:
    """k tokens of every batch row. B batch rows, S tokens.

    Attributes:
        positions: int64 [B, k], ascending and distinct; rows that choose fewer are filled up with their first others.
        valid: bool [B, k], whether a position was chosen; None if all are known to be.
        mask: bool [B, S], the chosen tokens.
        inverse: int32 [B, S], where a chosen token stands among the positions of its row; -1 for the others.
    """

    positions: Tensor
    valid: Tensor | None
    mask: Tensor
    inverse: Tensor


@dataclass(frozen=True, eq=False)
class Ragged:
    """As many tokens of every batch row as a rule lets in, packed. B batch rows, S tokens.

    Attributes:
        mask: bool [B, S], the chosen tokens.
        counts: int32 [B], how many each row has.
        cu_seqlens: int32 [B + 1], where each row begins among the packed ones; the last entry is their number.
        places: int64 [B * S], the chosen tokens' places among all tokens, ascending; -1 after the last one.
        inverse: int32 [B, S], where a chosen token stands among the packed ones; -1 for the others.
    """

    mask: Tensor
    counts: Tensor
    cu_seqlens: Tensor
    places: Tensor
    inverse: Tensor


def select_topk_reference(
    logits: Tensor, k: int, candidates: Tensor | None = None, wanted: Tensor | None = None
) -> Selection:
    """The k best candidates of every row; see `depthc.codegen.kernels.select.select_topk`."""
    among = torch.ones_like(logits, dtype=torch.bool) if candidates is None else candidates
    refuse_nan(logits, among)
    order = logits.masked_fill(~among, -math.inf).argsort(dim=1, descending=True, stable=True)
    # A candidate at -inf comes before what is no candidate, wherever the two stand.
    order = order.gather(1, (~among).gather(1, order).to(torch.int8).argsort(dim=1, stable=True))
    places = torch.arange(logits.shape[1], device=logits.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, places)
    count = among.sum(1).clamp(max=k)
    if wanted is not None:
        count = torch.minimum(count, wanted)
    mask = among & (rank < count[:, None])
    chosen_first = torch.sort((~mask).to(torch.int8), dim=1, stable=True).indices
    positions = chosen_first[:, :k].sort(1).values
    slots = torch.arange(k, device=logits.device, dtype=torch.int32).expand_as(positions)
    inverse = torch.full_like(mask, -1, dtype=torch.int32).scatter(1, positions, slots).masked_fill(~mask, -1)
    valid = None if candidates is None and wanted is None else mask.gather(1, positions)
    return Selection(positions, valid, mask, inverse)


def select_where_reference(
    score: Tensor, number: float, *, inclusive: bool = False, candidates: Tensor | None = None
) -> Ragged:
    """The candidates that score above a number; see `depthc.codegen.kernels.select.select_where`."""
    among = torch.ones_like(score, dtype=torch.bool) if candidates is None else candidates
    if number == -math.inf:
        mask = among.clone()
    else:
        refuse_nan(score, among)
        mask = among & (score >= number if inclusive else score > number)
    counts = mask.sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    flat = mask.flatten()
    every = torch.arange(flat.shape[0], device=flat.device)
    first = torch.sort((~flat).to(torch.int8), stable=True).indices
    places = first.masked_fill(every >= cu_seqlens[-1], -1)
    inverse = (flat.cumsum(0, dtype=torch.int32) - 1).to(torch.int32).masked_fill(~flat, -1).view_as(mask)
    return Ragged(mask, counts, cu_seqlens, places, inverse)
