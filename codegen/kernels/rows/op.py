"""Rows out of a stream and back, each the other's gradient.

A token stands in at most one row. So nothing is added up, the result is the same at every run, and a compiler may fuse
either with what is around it. B batch rows, S tokens, k rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from depthc.codegen.kernels.common import FLOATS, on, runs_on, side_by_side, warps

WIDEST = 8192  # features of a row, which a program holds in registers


def take_rows(stream: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
    """[B, k, ...]: the rows of a stream [B, S, ...] at some positions.

    Gradients come back through `inverse`: rows that it does not name give none.

    Args:
        positions: int64 [B, k].
        inverse: int32 [B, S], where each token stands among the positions, or -1.

    Example:
        >>> stream = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
        >>> rows = take_rows(stream, torch.tensor([[0, 2]]), torch.tensor([[0, -1, 1]]))
        >>> rows.detach(), torch.autograd.grad(rows.square().sum(), stream)[0]
        (tensor([[1., 3.]]), tensor([[2., 0., 6.]]))
    """
    return _Take.apply(stream, positions, inverse)  # type: ignore[no-any-return]


def spread_rows(rows: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
    """[B, S, ...]: rows [B, k, ...] where `inverse` says, and zeros elsewhere; arguments as for `take_rows`.

    Example:
        >>> spread_rows(torch.tensor([[1.0, 3.0]]), torch.tensor([[0, 2]]), torch.tensor([[0, -1, 1]]))
        tensor([[1., 0., 3.]])
    """
    return _Spread.apply(rows, positions, inverse)  # type: ignore[no-any-return]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(stream: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
        return copy_op(stream, positions) if _copies(stream) else _at(stream, positions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return spread_rows(grad, *ctx.saved_tensors), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
        if _copies(rows):
            return copy_op(rows, inverse)
        found = _at(rows, inverse.clamp(min=0))
        return torch.where(inverse.reshape(*inverse.shape, *(1,) * (rows.dim() - 2)) >= 0, found, found.new_zeros(()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        positions, inverse = ctx.saved_tensors
        found = named(positions, inverse).reshape(*positions.shape, *(1,) * (grad.dim() - 2))
        return torch.where(found, take_rows(grad, positions, inverse), grad.new_zeros(())), None, None


def named(positions: Tensor, inverse: Tensor) -> Tensor:
    """bool [B, k]: whether `inverse` names a row; rows that only fill up a short batch row it does not.

    Example:
        >>> named(torch.tensor([[0, 2]]), torch.tensor([[-1, -1, 1]]))
        tensor([[False,  True]])
    """
    return _at(inverse, positions) == torch.arange(positions.shape[1], device=positions.device)


def _copies(x: Tensor) -> bool:
    """Whether the kernel copies rows of x: a compiler fuses plain torch with what is around it instead."""
    fits = x.dim() == 3 and x.dtype in FLOATS and 0 < x.shape[2] <= WIDEST and x.shape[1] > 0
    return fits and not torch.compiler.is_compiling() and not runs_on(x)


@torch.library.custom_op("depthc::copy_rows", mutates_args=())
def copy_op(source: Tensor, places: Tensor) -> Tensor:
    """[B, k, D]: rows of [B, S, D] at places [B, k] by the kernel; zeros at negative ones."""
    from depthc.codegen.kernels.rows.kernel import copy_kernel

    out, D = _copied_shape(source, places), source.shape[2]
    source = side_by_side(source)
    if not out.numel():
        return out
    with on(source):
        copy_kernel[(places.numel(),)](
            source, places.contiguous(), out, places.shape[1], source.stride(0), source.stride(1), D=D, **warps(D)
        )
    return out


@copy_op.register_fake
def _copied_shape(source: Tensor, places: Tensor) -> Tensor:
    return source.new_empty((*places.shape, source.shape[2]))


def _at(x: Tensor, places: Tensor) -> Tensor:
    """x[b, places[b, i]]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], places]
