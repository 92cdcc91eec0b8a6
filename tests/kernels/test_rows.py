"""Rows out of a stream and back: against a loop over tokens, each the other's gradient."""

from __future__ import annotations

import math

import pytest
import torch
from ahead import built
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from depthc.codegen.kernels.combine import inverse_of
from depthc.codegen.kernels.common import warps
from depthc.codegen.kernels.rows import spread_rows, take_rows
from depthc.codegen.kernels.rows.op import WIDEST, _copies

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def chosen(B: int, S: int, k: int) -> tuple[Tensor, Tensor]:
    """Ascending positions, and where each token stands among them."""
    positions = torch.stack([torch.randperm(S)[:k].sort().values for _ in range(B)])
    valid = torch.rand(B, k) < 0.8
    return positions.to(DEVICE), inverse_of(positions, S, valid).to(DEVICE)


def spread(rows: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
    """Row by row."""
    out = torch.zeros(*inverse.shape, *rows.shape[2:], dtype=rows.dtype, device=DEVICE)
    for b, row in enumerate(positions.tolist()):
        for i, p in enumerate(row):
            if int(inverse[b, p]) == i:
                out[b, p] = rows[b, i]
    return out


@settings(max_examples=8)
@given(st.data(), st.integers(1, 3), st.integers(1, 12), st.integers(1, 40), st.booleans())
def test_rows_go_out_and_back(data: st.DataObject, B: int, S: int, D: int, carried: bool) -> None:
    """Bit for bit, gradients as well, of streams that lie apart in memory."""
    positions, inverse = chosen(B, S, data.draw(st.integers(1, S)))
    stream = torch.randn(B, S + 1, D + 3, device=DEVICE)[:, 1:, :D].requires_grad_(carried)
    assert _copies(stream)
    rows = take_rows(stream, positions, inverse)
    assert torch.equal(rows, torch.stack([x[p] for x, p in zip(stream, positions, strict=True)]))
    upstream = torch.randn_like(rows).requires_grad_(carried)
    assert torch.equal(spread_rows(upstream, positions, inverse), spread(upstream, positions, inverse))
    if carried:
        (into,) = torch.autograd.grad(rows, stream, upstream.detach())
        assert torch.equal(into, spread(upstream.detach(), positions, inverse))
        back = torch.randn_like(stream)
        (into,) = torch.autograd.grad(spread_rows(upstream, positions, inverse), upstream, back)
        named = spread(torch.ones_like(rows), positions, inverse)
        assert torch.equal(into, torch.stack([(x * n)[p] for x, n, p in zip(back, named, positions, strict=True)]))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 4), torch.float32), ((1, 4, 2), torch.int64), ((1, 2, WIDEST + 1), torch.float32)]
)
def test_what_the_kernel_does_not_copy_torch_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.arange(math.prod(shape), device=DEVICE).view(shape).to(dtype)
    positions, inverse = chosen(1, shape[1], 1)
    assert not _copies(x)
    assert torch.equal(take_rows(x, positions, inverse)[0], x[0][positions[0]])


def test_the_kernel_compiles_for_hopper() -> None:
    (taken,) = built(
        [
            {
                "module": "depthc.codegen.kernels.rows.kernel",
                "kernel": "copy_kernel",
                "types": {"source": "*bf16", "places": "*i64", "out": "*bf16"},
                "constants": {"D": 2048, "BLOCK": 2048},
                "options": {"num_warps": warps(2048)["num_warps"]},
            }
        ]
    )
    assert taken["STACK"] == taken["LOCAL"] == 0
    assert taken["ld.global.v4"]
    assert taken["st.global.v4"]
