"""The gradients of combine, each an op by a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from depthc.codegen.kernels.common import on, warps

_STEP = 4096  # features of a row that a program takes at once


def constants(logits: Tensor | None, gate: str, width: int) -> dict[str, Any]:
    """The constants that all kernels take."""
    return {"D": width, "GATE": gate, "GATED": logits is not None, **warps(min(width, _STEP))}


@torch.library.custom_op("depthc::combine_backward_rows", mutates_args=())
def rows_backward_op(
    grad: Tensor, stream: Tensor | None, rows: Tensor | None, logits: Tensor | None, positions: Tensor,
    inverse: Tensor, kind: str, gate: str, alpha: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of (rows, logits), the latter empty where there are none."""
    from depthc.codegen.kernels.combine.kernel import rows_backward_kernel

    (_, S, D), (B, k) = grad.shape, positions.shape
    made = _rows_shapes(grad, stream, rows, logits, positions, inverse, kind, gate, alpha)
    if stream is not None and stream.stride(2) != 1:
        stream = stream.contiguous()
    strides = (0, 0) if stream is None else stream.stride()[:2]
    with on(grad):
        rows_backward_kernel[(B * k,)](
            grad.contiguous(), stream, None if rows is None else rows.contiguous(),
            None if logits is None else logits.contiguous(), positions.contiguous(), inverse.contiguous(), *made,
            S, k, *strides, alpha, KIND=kind, **constants(logits, gate, D),
        )  # fmt: skip
    return made


@rows_backward_op.register_fake
def _rows_shapes(
    grad: Tensor, stream: Tensor | None, rows: Tensor | None, logits: Tensor | None, positions: Tensor,
    inverse: Tensor, kind: str, gate: str, alpha: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    logit_shape = (0,) if logits is None else positions.shape
    return grad.new_empty((*positions.shape, grad.shape[2])), grad.new_empty(logit_shape, dtype=torch.float32)


@torch.library.custom_op("depthc::combine_backward_stream", mutates_args=())
def stream_backward_op(grad: Tensor, logits: Tensor | None, inverse: Tensor, gate: str, alpha: float) -> Tensor:
    """The gradient of the stream under "delta", with logits, and "off", without."""
    from depthc.codegen.kernels.combine.kernel import stream_backward_kernel

    B, S, D = grad.shape
    made = grad.new_empty((B, S, D))
    with on(grad):
        stream_backward_kernel[(B * S,)](
            grad.contiguous(), None if logits is None else logits.contiguous(), inverse.contiguous(), made,
            S, 0 if logits is None else logits.shape[1], alpha, **constants(logits, gate, D),
        )  # fmt: skip
    return made


@stream_backward_op.register_fake
def _stream_shape(grad: Tensor, logits: Tensor | None, inverse: Tensor, gate: str, alpha: float) -> Tensor:
    return grad.new_empty(grad.shape)
