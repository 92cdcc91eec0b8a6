"""Attention of selected tokens to the keys of all tokens, in plain torch: what the kernels are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def allowed_of(
    positions: Tensor, size: int, valid: Tensor | None = None, keep: Tensor | None = None, window: int | None = None
) -> Tensor:
    """bool[batch, query, key]: which keys a query may see.

    Args:
        positions: int64[batch, query], where each query stands among the keys.
        size: number of keys.
        valid: bool[batch, query]; queries that are not valid see nothing.
        keep: bool[batch, key]; keys that are not kept are padding, which nobody sees.
        window: how many keys a query sees at most, its own position the last of them.
    """
    key, query = torch.arange(size, device=positions.device), positions[:, :, None]
    allowed = key <= query
    if window is not None:
        allowed = allowed & (key > query - window)
    if valid is not None:
        allowed = allowed & valid[:, :, None]
    if keep is not None:
        allowed = allowed & keep[:, None, :]
    return allowed


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    valid: Tensor | None = None,
    keep: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output like `q` and logsumexp[batch, head, query], computed in fp32, or in fp64 if that is what comes in.

    A query that sees no key has output 0 and logsumexp -inf, and gives and takes no gradient. Keys that no query of
    their sequence may see do not take part, whatever their values are.
    """
    allowed = allowed_of(positions, k.shape[2], valid, keep, window)
    seen, sees = allowed.any(1)[:, None, :, None], allowed.any(2)[:, None, :, None]
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.to(wide).where(rows, 0) for x, rows in ((q, sees), (k, seen), (v, seen)))
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
    scores = queries @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None].masked_fill(~sees, 0)).exp()
    return (weights @ values).to(q.dtype), lse
