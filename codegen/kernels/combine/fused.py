"""Combine for a compiler that fuses it with what is around it: plain torch, with the gradients of the kernels.

Autograd's own gradient of the reference would add up rows atomically, and read more than it needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from depthc.codegen.kernels.combine.reference import combine_reference, score_of
from depthc.codegen.kernels.rows import named, spread_rows, take_rows


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
    return _Combine.apply(stream, rows, logits, positions, inverse, kind, gate, alpha)  # type: ignore[no-any-return]


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        stream: Tensor, rows: Tensor, logits: Tensor | None, positions: Tensor, inverse: Tensor, kind: str, gate: str,
        alpha: float,
    ) -> Tensor:  # fmt: skip
        return combine_reference(stream, rows, logits, positions, inverse, kind=kind, gate=gate, alpha=alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        stream, rows, logits, positions, inverse, *ctx.options = inputs
        kind = ctx.options[0]
        ctx.save_for_backward(
            stream if kind == "delta" else None, None if logits is None else rows, logits, positions, inverse
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        stream, rows, logits, positions, inverse = ctx.saved_tensors
        kind, gate, alpha = ctx.options
        wide = torch.where(named(positions, inverse)[..., None], take_rows(grad, positions, inverse).float(), 0)
        grad_logits, passed = None, None
        if logits is not None:
            score, slope = _gate(logits, gate, alpha)
            change = rows.float() - (take_rows(stream, positions, inverse).float() if kind == "delta" else 0)
            grad_logits = slope * (wide * change).sum(-1)
            wide, passed = wide * score[..., None], 1 - score
        grad_stream = grad
        if kind == "off":
            grad_stream = torch.where(inverse[..., None] >= 0, 0, grad)
        elif kind == "delta":
            kept = torch.where(inverse >= 0, spread_rows(passed, positions, inverse), 1)  # type: ignore[arg-type]
            grad_stream = (grad * kept[..., None]).to(grad.dtype)
        return grad_stream, wide.to(grad.dtype), grad_logits, *[None] * 5


def _gate(logits: Tensor, gate: str, alpha: float) -> tuple[Tensor, Tensor]:
    """The score, and its derivative by the logit."""
    share = score_of(logits, gate, 1.0)
    slope = {"sigmoid": share * (1 - share), "tanh": 1 - share * share}
    return (logits, torch.ones_like(logits)) if gate == "none" else (alpha * share, alpha * slope[gate])
