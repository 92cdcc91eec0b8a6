"""The op that scores tokens: a kernel where it applies, plain torch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from depthc.codegen.kernels.common import FLOATS, on, runs_on, side_by_side, warps
from depthc.codegen.kernels.score.reference import score_reference

WIDEST = 8192  # features of a token, which a program holds in registers
PROGRAMS = 528  # of the backward: four for each of 132 multiprocessors; fixed, so that sums do not depend on the device
_HELD = 8192  # numbers that a program of 4 warps holds


def applies(stream: Tensor, weight: Tensor) -> str | None:
    """Why the kernel is not used, in words; None if it is.

    Example:
        >>> applies(torch.zeros(1, 4, 8), torch.zeros(8, dtype=torch.float64))
        'the weight is float64, and the kernel computes in float32'
    """
    if weight.dtype != torch.float32:
        return f"the weight is {str(weight.dtype).removeprefix('torch.')}, and the kernel computes in float32"
    if stream.dtype not in FLOATS:
        return "the kernel takes float32, bfloat16 and float16"
    if not stream.numel():
        return "there are no tokens"
    if stream.shape[0] * stream.shape[1] >= 2**31:
        return "there are 2^31 tokens or more"
    if stream.shape[2] > WIDEST:
        return f"tokens of {stream.shape[2]} features do not fit in registers; the widest that do have {WIDEST}"
    return runs_on(stream, weight)


def score_rows(stream: Tensor, weight: Tensor) -> Tensor:
    """fp32 [B, S]: the logit of every token, its product with the weight of a linear router.

    Computed in fp32 from the stream as it is. The gradient of the stream is plain torch, which a compiler adds to the
    others; that of the weight reads the stream once more.

    Args:
        stream: float32, bfloat16 or float16 [B, S, D].
        weight: float32 [D].

    Example:
        >>> score_rows(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([1.0, 10.0]))
        tensor([[21., 43.]])
    """
    return score_reference(stream, weight) if applies(stream, weight) else score_op(stream, weight)


def _tiles(D: int) -> dict[str, int]:
    """Tokens and features of a tile."""
    block = warps(D)["BLOCK"]
    return {"D": D, "ROWS": max(1, min(16, _HELD // block)), "BLOCK": block, "num_warps": 4}


@torch.library.custom_op("depthc::score", mutates_args=())
def score_op(stream: Tensor, weight: Tensor) -> Tensor:
    """The logits by the kernel."""
    import triton

    from depthc.codegen.kernels.score.kernel import forward_kernel

    (B, S, D), stream = stream.shape, side_by_side(stream)
    logits, tiles = _logits_shape(stream, weight), _tiles(D)
    with on(stream):
        forward_kernel[(triton.cdiv(B * S, tiles["ROWS"]),)](
            stream, weight.contiguous(), logits, B * S, S, stream.stride(0), stream.stride(1), **tiles
        )
    return logits


@score_op.register_fake
def _logits_shape(stream: Tensor, weight: Tensor) -> Tensor:
    return stream.new_empty(stream.shape[:2], dtype=torch.float32)


@torch.library.custom_op("depthc::score_weight", mutates_args=())
def weight_op(grad: Tensor, stream: Tensor) -> Tensor:
    """fp32 [D]: the weight's gradient, of that of the logits [B, S]."""
    import triton

    from depthc.codegen.kernels.score.kernel import weight_kernel

    (B, S, D), stream = stream.shape, side_by_side(stream)
    tiles = _tiles(D)
    programs = min(PROGRAMS, triton.cdiv(B * S, tiles["ROWS"]))
    parts = stream.new_empty((programs, D), dtype=torch.float32)
    with on(stream):
        weight_kernel[(programs,)](
            grad.contiguous(), stream, parts, B * S, S, stream.stride(0), stream.stride(1), programs, **tiles
        )
    return parts.sum(0)


@weight_op.register_fake
def _(grad: Tensor, stream: Tensor) -> Tensor:
    return stream.new_empty(stream.shape[2:], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    stream, weight = ctx.saved_tensors
    into_stream = (grad[..., None] * weight).to(stream.dtype) if ctx.needs_input_grad[0] else None
    return into_stream, weight_op(grad, stream) if ctx.needs_input_grad[1] else None


score_op.register_autograd(_backward, setup_context=_setup)
