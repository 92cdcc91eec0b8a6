"""The op that gathers and normalizes rows: a kernel where it applies, plain torch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from depthc.codegen.kernels.common import FLOATS, on, require_one_of, runs_on, side_by_side, warps
from depthc.codegen.kernels.gather_norm.reference import KINDS, gather_norm_reference

WIDEST = 8192  # features of a row, which a program holds in registers
PROGRAMS = 528  # of the backward: four for each of 132 multiprocessors; fixed, so that sums do not depend on the device


def applies(stream: Tensor, positions: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> str | None:
    """Why the kernel is not used, in words; None if it is.

    Example:
        >>> applies(torch.zeros(1, 4, 9000), torch.zeros(1, 2, dtype=torch.int64))
        'rows of 9000 features do not fit in registers; the widest that do have 8192'
    """
    if any(t is not None and t.dtype not in FLOATS for t in (stream, weight, bias)):
        return "the kernel takes float32, bfloat16 and float16"
    if positions.dtype != torch.int64:
        return "positions are not int64"
    if not positions.numel() or not stream.numel():
        return "there are no rows"
    if positions.numel() >= 2**31:
        return "there are 2^31 rows or more"
    if stream.shape[2] > WIDEST:
        return f"rows of {stream.shape[2]} features do not fit in registers; the widest that do have {WIDEST}"
    return runs_on(stream, positions, weight, bias)


def gather_norm(
    stream: Tensor,
    positions: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    kind: str = "rms",
) -> tuple[Tensor, Tensor]:
    """Rows of a stream, and their norm: (x, norm(x) * weight + bias), both [B, k, D] in the dtype of the stream.

    The norm is computed in fp32 and rounded once, after weight and bias. The rows are those of `TokenSet.take`. A
    negative position stands for a row of zeros, which no gradient comes back from. With gradients, positions of a
    batch row must be distinct: each gradient is stored where its row came from.

    Args:
        stream: float32, bfloat16 or float16 [B, S, D].
        positions: int64 [B, k].
        weight: [D].
        bias: [D].
        kind: "rms": x / sqrt(mean(x^2) + eps); "layer": the same of x - mean(x).

    Raises:
        InputError: there is no such kind.

    Example:
        >>> stream = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [6.0, 8.0]]])
        >>> rows, normed = gather_norm(stream, torch.tensor([[0, 2]]), kind="layer")
        >>> rows.tolist(), normed.round(decimals=3).tolist()
        ([[[1.0, 2.0], [6.0, 8.0]]], [[[-1.0, 1.0], [-1.0, 1.0]]])
    """
    require_one_of("kind", kind, KINDS)
    if applies(stream, positions, weight, bias):
        return gather_norm_reference(stream, positions, weight, bias, eps=eps, kind=kind)
    rows, normed, _, _ = gather_norm_op(stream, positions, weight, bias, eps, kind)
    return rows, normed


@torch.library.custom_op("depthc::gather_norm", mutates_args=())
def gather_norm_op(
    stream: Tensor, positions: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows, normed, mean, rstd) by the kernel; the mean is empty for "rms"."""
    from depthc.codegen.kernels.gather_norm.kernel import forward_kernel

    made = _forward_shapes(stream, positions, weight, bias, eps, kind)
    stream = side_by_side(stream)
    D = stream.shape[2]
    with on(stream):
        forward_kernel[(positions.numel(),)](
            stream, positions.contiguous(), _flat(weight), _flat(bias), *made,
            positions.shape[1], stream.stride(0), stream.stride(1), eps,
            D=D, LAYER=kind == "layer", HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **warps(D),
        )  # fmt: skip
    return made


@gather_norm_op.register_fake
def _forward_shapes(
    stream: Tensor, positions: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (*positions.shape, stream.shape[2])
    return (
        stream.new_empty(rows),
        stream.new_empty(rows),
        stream.new_empty(positions.shape if kind == "layer" else (0,), dtype=torch.float32),
        stream.new_empty(positions.shape, dtype=torch.float32),
    )


@torch.library.custom_op("depthc::gather_norm_backward", mutates_args=())
def backward_op(
    grad_rows: Tensor | None, grad_normed: Tensor, rows: Tensor, positions: Tensor, weight: Tensor | None,
    mean: Tensor, rstd: Tensor, length: int, has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of (stream [B, length, D], weight, bias), the last two fp32, and empty where there is none."""
    from depthc.codegen.kernels.gather_norm.kernel import backward_kernel

    B, k, D = rows.shape
    programs = min(PROGRAMS, B * k)
    grad_stream = rows.new_zeros((B, length, D))
    weight_parts = rows.new_empty((programs if weight is not None else 0, D), dtype=torch.float32)
    bias_parts = rows.new_empty((programs if has_bias else 0, D), dtype=torch.float32)
    with on(rows):
        backward_kernel[(programs,)](
            None if grad_rows is None else grad_rows.contiguous(), grad_normed.contiguous(), rows,
            positions.contiguous(), _flat(weight), mean, rstd, grad_stream, weight_parts, bias_parts,
            B * k, k, length, programs,
            D=D, LAYER=mean.numel() > 0, HAS_ROWS=grad_rows is not None, HAS_WEIGHT=weight is not None,
            HAS_BIAS=has_bias, **warps(D),
        )  # fmt: skip
    grad_weight, grad_bias = (
        parts.sum(0) if parts.numel() else parts.new_empty((0,)) for parts in (weight_parts, bias_parts)
    )
    return grad_stream, grad_weight, grad_bias


@backward_op.register_fake
def _backward_shapes(
    grad_rows: Tensor | None, grad_normed: Tensor, rows: Tensor, positions: Tensor, weight: Tensor | None,
    mean: Tensor, rstd: Tensor, length: int, has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, _, D = rows.shape
    grad_weight = rows.new_empty((0 if weight is None else D,), dtype=torch.float32)
    grad_bias = rows.new_empty((D if has_bias else 0,), dtype=torch.float32)
    return rows.new_empty((B, length, D)), grad_weight, grad_bias


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    stream, positions, weight, bias, _, _ = inputs
    rows, _, mean, rstd = output
    ctx.save_for_backward(rows, positions, weight, mean, rstd)
    ctx.length, ctx.bias_dtype = stream.shape[1], None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_rows: Tensor | None, grad_normed: Tensor | None, *_: Any) -> tuple[Any, ...]:
    rows, positions, weight, mean, rstd = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = torch.zeros_like(rows)
    grads = backward_op(
        grad_rows, grad_normed, rows, positions, weight, mean, rstd, ctx.length, ctx.bias_dtype is not None
    )
    return (
        grads[0],
        None,
        None if weight is None else grads[1].to(weight.dtype),
        None if ctx.bias_dtype is None else grads[2].to(ctx.bias_dtype),
        None,
        None,
    )


gather_norm_op.register_autograd(_backward, setup_context=_setup)
