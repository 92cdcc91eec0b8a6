"""Continuation: an argument that grows with the tokens, with the new tokens behind the old ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from depthc.ir.errors import InputError


def extended(old: Any, new: Any, dims: Sequence[tuple[int, ...]]) -> Any:
    """The leaves of an argument with the new tokens behind the old ones.

    Args:
        dims: for each leaf the dimensions that grow, the first of them with a row a token.

    Raises:
        InputError: another structure, dtype, rank or batch than the old part.
    """
    leaves, spec = pytree.tree_flatten(old)
    more = pytree.tree_leaves(new)
    if len(more) != len(leaves):
        _no_continuation(f"{len(leaves)} values", f"{len(more)}")
    return pytree.tree_unflatten([_append(a, b, where) for a, b, where in zip(leaves, more, dims, strict=True)], spec)


def _append(old: Any, new: Any, dims: tuple[int, ...]) -> Any:
    if not dims:
        return old
    same = isinstance(new, Tensor) and new.dtype == old.dtype and new.dim() == old.dim()
    if not same or any(new.shape[d] != old.shape[d] for d in range(old.dim()) if d not in dims):
        _no_continuation(f"{old.dtype}{list(old.shape)} but for dimension {dims[0]}", _shown(new))
    for dim in dims[1:]:  # new columns of old rows are never read
        if new.shape[dim] > old.shape[dim]:
            size = [*old.shape[:dim], new.shape[dim] - old.shape[dim], *old.shape[dim + 1 :]]
            old = torch.cat([old, old.new_zeros(size)], dim)
    return torch.cat([old, new], dims[0])


def _no_continuation(expected: str, found: str) -> NoReturn:
    raise InputError(
        "a new part of an argument does not continue the old one",
        expected=expected,
        found=found,
        remedy="pass the new tokens of the same batch",
    )


def _shown(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
