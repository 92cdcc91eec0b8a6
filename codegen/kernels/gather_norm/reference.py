"""Gather and norm in plain torch: what the kernel of this folder computes."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("rms", "layer")


def gather_norm_reference(
    stream: Tensor,
    positions: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    kind: str = "rms",
) -> tuple[Tensor, Tensor]:
    """(rows, their norm); see `depthc.codegen.kernels.gather_norm.gather_norm`."""
    at = positions.clamp(min=0)[..., None].expand(-1, -1, stream.shape[2])
    rows = stream.gather(1, at).masked_fill((positions < 0)[..., None], 0)
    x = rows.to(torch.promote_types(stream.dtype, torch.float32))
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.to(x.dtype)
    if bias is not None:
        normed = normed + bias.to(x.dtype)
    return rows, normed.to(stream.dtype)
