"""Rings: caches in which the row of a token is its place modulo the number of rows.

Their size stays while tokens come one by one, and where a token is may be known to the device alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from depthc.ir.rows.gather import Rows

AttendRing = Callable[[Tensor, Tensor, Tensor], Callable[..., Tensor] | None]
"""For queries [batch, heads, 1, features], keys and values [batch, heads, rows, features] a function (queries, keys,
values, mask, place, scale) -> output (`depthc.codegen.kernels.decode_attention`); None if it takes none such."""


@dataclass(frozen=True)
class Rings:
    """How a run treats its caches: as rings, written over, for one token at the same place in all batch rows.

    Attributes:
        attend: attention of that token to the rows of a ring as one function.
    """

    attend: AttendRing | None = None


def ring(count: int, place: Tensor) -> Rows:
    """The tokens of a ring of so many rows when that at `place` [1, 1] has been written.

    Example:
        >>> ring(4, torch.tensor([[5]])).positions
        tensor([[4, 5, 2, 3]])
    """
    behind = (place - torch.arange(count, device=place.device)[None]) % count
    return Rows(count, (place - behind).clamp(min=0), behind <= place)


def write_rows(rings: Sequence[Tensor], rows: Sequence[Tensor], dims: Sequence[int], place: Tensor) -> list[Tensor]:
    """Write a row into each ring, along its own dimension: that of the token at `place` [1, 1].

    Example:
        >>> write_rows([torch.zeros(4)], [torch.ones(1)], [0], torch.tensor([[5]]))
        [tensor([0., 1., 0., 0.])]
    """
    each = zip(rings, rows, dims, strict=True)
    return [ring.index_copy_(dim, place[0] % ring.shape[dim], row) for ring, row, dim in each]
