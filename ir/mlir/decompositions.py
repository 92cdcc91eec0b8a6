"""Decompositions: which ATen ops a body keeps in MLIR, and what stands for the others.

An op that the torch dialect has is kept. One that it has not, torch decomposes. A few are replaced although the
dialect has them, because their way to linalg fails or is wrong; each says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

Decomposition = Callable[..., Any]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as products and a softmax: torch-mlir's own op takes no boolean mask of dynamic shape.

    A query that may read no key is 0, as it is in torch.
    """
    if dropout:
        return NotImplemented
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        rows, keys = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
        mask = keys <= rows.unsqueeze(1)
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(torch.logical_not(mask), float("-inf"))
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)
    return torch.matmul(weights, v)


def reshape(x: Tensor, shape: list[Any]) -> Tensor:
    """Every size written out: torch-mlir guesses -1 from the sizes that it knows, and can guess wrong."""
    if not any(isinstance(size, int) and size == -1 for size in shape):
        return NotImplemented
    known = prod(size for size in shape if not (isinstance(size, int) and size == -1))
    rest = prod(x.shape) // known
    return aten.reshape.default(x, [rest if isinstance(size, int) and size == -1 else size for size in shape])


def flatten(x: Tensor, start: int = 0, end: int = -1) -> Tensor:
    """As a reshape, which is lowered as it stands."""
    start, end = start % max(x.dim(), 1), end % max(x.dim(), 1)
    return x.reshape([*x.shape[:start], prod(x.shape[start : end + 1]), *x.shape[end + 1 :]])


def unflatten(x: Tensor, dim: int, sizes: list[Any]) -> Tensor:
    """As a reshape, which is lowered as it stands."""
    dim %= x.dim()
    if any(isinstance(size, int) and size == -1 for size in sizes):
        rest = x.shape[dim] // prod(size for size in sizes if not (isinstance(size, int) and size == -1))
        sizes = [rest if isinstance(size, int) and size == -1 else size for size in sizes]
    return x.reshape([*x.shape[:dim], *sizes, *x.shape[dim + 1 :]])


def index(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Several indices as one into their dimensions flattened: torch-mlir broadcasts no two of unknown size."""
    given = [d for d, i in enumerate(indices) if i is not None]
    integers = all(i is None or i.dtype in (torch.int64, torch.int32) for i in indices)
    if len(given) < 2 or given[-1] - given[0] >= len(given) or not integers:
        return NotImplemented
    first, last = given[0], given[-1]
    flat: Any = 0
    for d in given:
        here = indices[d]
        flat = flat * x.shape[d] + torch.where(here < 0, here + x.shape[d], here)  # type: ignore[operator, arg-type]
    shape = [*x.shape[:first], prod(x.shape[first : last + 1]), *x.shape[last + 1 :]]
    return aten.index.Tensor(x.reshape(shape), [*[None] * first, flat])


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """The form with tanh written out: torch-mlir's is off by 1e-4."""
    if approximate != "tanh":
        return NotImplemented
    return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def repeat(x: Tensor, times: list[Any]) -> Tensor:
    """As an expansion and a reshape: torch-mlir's own way counts unknown sizes wrong."""
    x = x.reshape([*[1] * (len(times) - x.dim()), *x.shape])
    sizes = list(x.shape)
    for d in range(len(times)):
        x = x.unsqueeze(2 * d)
    pairs = [part for n, size in zip(times, sizes, strict=True) for part in (n, size)]
    return x.expand(pairs).reshape([n * size for n, size in zip(times, sizes, strict=True)])


def cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The largest element so far, and the last place where it is: every pair of places is compared."""
    dim %= x.dim()
    moved = x.movedim(dim, -1).unsqueeze(-2)
    places = torch.arange(x.shape[dim], device=x.device)
    so_far = places <= places.unsqueeze(-1)
    least = torch.finfo(x.dtype).min if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
    values = torch.where(so_far, moved, least).amax(-1)
    last = torch.where(so_far & (moved == values.unsqueeze(-1)), places, 0).amax(-1)
    return values.movedim(-1, dim), last.movedim(-1, dim)


REPLACED: Mapping[Any, Decomposition] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.reshape.default: reshape,
    aten.view.default: lambda x, shape: x.reshape(shape),
    aten._unsafe_view.default: lambda x, shape: x.reshape(shape),
    aten.index.Tensor: index,
    aten.repeat.default: repeat,
    aten.gelu.default: gelu,
    aten.flatten.using_ints: flatten,
    aten.unflatten.int: unflatten,
    aten.cummax.default: cummax,
    # It becomes a sort that leaves equal elements in their order anyway.
    aten.sort.stable: lambda x, *, stable=True, dim=-1, descending=False: aten.sort.default(x, dim, descending),
    # Their way to linalg ends at booleans.
    aten.__and__.Tensor: torch.bitwise_and,
    aten.__or__.Tensor: torch.bitwise_or,
    aten.__xor__.Tensor: torch.bitwise_xor,
}


@lru_cache(maxsize=1)
def decompositions() -> dict[Any, Decomposition]:
    """What stands for ops, by op; `learn` adds to it."""
    from torch._decomp import core_aten_decompositions

    known = {op: made for op, made in core_aten_decompositions().items() if not _in_dialect(op)}
    return known | dict(REPLACED)


def learn(graph: fx.Graph) -> bool:
    """Add the composite ops of a graph that the torch dialect has not; whether there are any: then trace again."""
    table, found = decompositions(), {n.target for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    new = {op: op.decompose for op in found - table.keys() if not _in_dialect(op) and _is_composite(op)}
    table.update(new)
    return bool(new)


def _in_dialect(op: Any) -> bool:
    return bool(_context().is_registered_operation(f"torch.{str(op).removesuffix('.default')}"))


def _is_composite(op: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


@lru_cache(maxsize=1)
def _context() -> Any:
    from depthc.ir.mlir.context import new_context

    return new_context()
