"""Rows out of a stream and back, each the other's gradient.

A token stands in at most one row. So nothing is added up, the result is the same at every run, and a compiler may fuse
either with what is around it. B batch rows, S tokens, k rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
        return _at(stream, positions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return spread_rows(grad, *ctx.saved_tensors), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
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


def _at(x: Tensor, places: Tensor) -> Tensor:
    """x[b, places[b, i]]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], places]
