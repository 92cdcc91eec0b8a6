"""What the kernels compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, place: Tensor | None, scale: float) -> Tensor:
    """See `decode_attention`; in fp32, or in fp64 for fp64."""
    (batch, heads, _, features), key_heads = q.shape, k.shape[1]
    exact = torch.promote_types(q.dtype, torch.float32)
    grouped = q.reshape(batch, key_heads, heads // key_heads, features).to(exact)
    scores = (grouped @ k.to(exact).transpose(2, 3)).view(batch, heads, 1, k.shape[2]) * scale
    if place is not None:
        scores = scores.masked_fill(torch.arange(k.shape[2], device=k.device) > place, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    weights = torch.nan_to_num(scores.softmax(-1)).view(grouped.shape[:3] + scores.shape[3:])
    # A row that takes no part may hold anything, NaN too.
    seen = (weights > 0).any(2)[..., None]
    return (weights @ v.to(exact).where(seen, 0.0)).reshape(q.shape).to(q.dtype)
