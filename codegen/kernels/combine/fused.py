"""Combine for a compiler that fuses it with what is around it: plain torch, with gradients that are no sums.

The gradients are autograd's own. Rows go into the stream by `spread_rows`: a gather's gradient would add them up
atomically. It is no autograd.Function, since Dynamo of torch 2.11 loses the gradients of one in which a conversion
changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthc.codegen.kernels.combine.reference import score_of
from depthc.codegen.kernels.rows import spread_rows


def combine_fused(
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
    """See `depthc.codegen.kernels.combine.combine`.

    Example:
        >>> positions, inverse = torch.tensor([[1]]), torch.tensor([[-1, 0]], dtype=torch.int32)
        >>> given = torch.ones(1, 2, 1), torch.tensor([[[5.0]]]), None, positions, inverse
        >>> combine_fused(*given, kind="additive").flatten()
        tensor([1., 6.])
    """
    dtype = torch.promote_types(stream.dtype, torch.float32)
    old, change = stream.to(dtype), rows.to(dtype)
    score = None if logits is None else score_of(logits, gate, alpha)[..., None]
    if kind == "weighted":
        change = score * change  # type: ignore[operator]
    change = spread_rows(change, positions, inverse)
    if kind == "delta":
        change = spread_rows(score, positions, inverse) * (change - old)  # type: ignore[arg-type]
    new = change if kind == "off" else old + change
    return torch.where(inverse[..., None] >= 0, new, old).to(stream.dtype)
