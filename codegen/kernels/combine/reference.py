"""Combine in plain torch: what the kernels of this folder compute."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_of(positions: Tensor, length: int, valid: Tensor | None = None) -> Tensor:
    """int32 [B, length]: where each token stands among the positions of its row, -1 if it is not among them.

    Args:
        positions: int64 [B, k], distinct in a row; negative ones count for nothing.
        valid: bool [B, k], which of them count; all if not given.

    Example:
        >>> inverse_of(torch.tensor([[1, 3]]), 4)
        tensor([[-1,  0, -1,  1]], dtype=torch.int32)
    """
    kept = positions >= 0 if valid is None else valid & (positions >= 0)
    slots = torch.arange(positions.shape[1], device=positions.device, dtype=torch.int32).expand_as(positions)
    found = slots.new_full((positions.shape[0], length + 1), -1)  # the last column takes those that do not count
    return found.scatter(1, positions.where(kept, length), slots)[:, :length].contiguous()


def score_of(logits: Tensor, gate: str, alpha: float) -> Tensor:
    """alpha G(logit), or the logit itself without a gate."""
    if gate == "none":
        return logits
    return (logits.sigmoid() if gate == "sigmoid" else logits.tanh()) * alpha


def combine_reference(
    stream: Tensor,
    rows: Tensor,
    logits: Tensor | None,
    positions: Tensor,
    inverse: Tensor,
    *,
    kind: str = "weighted",
    gate: str = "sigmoid",
    alpha: float = 0.1,
) -> Tensor:
    """The stream with its rows combined; see `depthc.codegen.kernels.combine.combine`."""
    if not positions.shape[1]:
        return stream.clone()
    wide = torch.promote_types(stream.dtype, torch.float32)
    at = inverse.clamp(min=0).long()
    old = stream.to(wide)
    new = rows.to(wide).gather(1, at[..., None].expand_as(stream))
    if kind == "additive":
        new = old + new
    elif kind != "off":
        assert logits is not None, "the op asks for logits"
        score = score_of(logits.to(wide), gate, alpha).gather(1, at)[..., None]
        new = old + score * (new if kind == "weighted" else new - old)
    return torch.where(inverse[..., None] >= 0, new, old).to(stream.dtype)
