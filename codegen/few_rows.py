"""Products of few rows, as a step of decoding has them, compiled to sums that fuse with what stands around them.

Such a product takes as long as reading its matrix does. A library's kernels for products take twice that and more, and
the norm in front and the residual sum behind are further launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

FEW = 4  # beyond, products on tensor cores read the matrix once and sums do not

aten = torch.ops.aten


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function through torch.compile, its products of at most `FEW` rows as sums."""
    return torch.compile(function, backend=_inductor)  # type: ignore[no-any-return]


def _inductor(graph: fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    # Coordinate descent finds how wide sums are best read; it is worth its time where steps are many.
    patches = {"coordinate_descent_tuning": True}
    table: dict[Any, Any] = {**select_decomp_table(), aten.mm.default: _mm, aten.addmm.default: _addmm}
    return compile_fx(graph, examples, decompositions=table, config_patches=patches)  # type: ignore[return-value]


def _mm(rows: Tensor, matrix: Tensor) -> Tensor:
    return _sums(rows, matrix).to(rows.dtype) if _are_few(rows) else NotImplemented


def _addmm(bias: Tensor, rows: Tensor, matrix: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    plain = _are_few(rows) and (beta, alpha) == (1, 1)
    return (bias + _sums(rows, matrix)).to(rows.dtype) if plain else NotImplemented


def _are_few(rows: Tensor) -> bool:
    return 0 < rows.shape[0] <= FEW


def _sums(rows: Tensor, matrix: Tensor) -> Tensor:
    """The product in fp32, or more."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows[:, :, None].to(wide) * matrix[None].to(wide)).sum(1)
