"""Selection in plain torch: what the kernels of this folder compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from depthc.codegen.kernels.combine.reference import inverse_of
from depthc.ir.selection import best_of, refuse_nan
from depthc.ir.tokens import TokenSet


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
    count = torch.full_like(among[:, 0], k, dtype=torch.int64) if wanted is None else wanted.clamp(max=k)
    mask = best_of(logits, among, count)
    tokens = TokenSet(mask, most=k)
    inverse = inverse_of(tokens.positions, logits.shape[1], tokens.valid)
    valid = None if candidates is None and wanted is None else tokens.valid
    return Selection(tokens.positions, valid, mask, inverse)


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
