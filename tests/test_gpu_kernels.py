"""Kernels on a GPU, in half precision; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from depthc.codegen.kernels.shared_attention.op import applies, shared_attention
from depthc.codegen.kernels.shared_attention.reference import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(features: int = 64, count: int = 300, size: int = 700, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v laid out as projections make them, and positions."""

    def rows(tokens: int, heads: int) -> Tensor:
        made = torch.randn(2, tokens, heads, features, device=DEVICE, dtype=dtype)
        return made.transpose(1, 2).requires_grad_()

    positions = torch.rand(2, size, device=DEVICE).argsort(1)[:, :count].sort(1).values
    return [rows(count, 4), rows(size, 2), rows(size, 2), positions]


def judged(out: Tensor, x: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return [out, *torch.autograd.grad(out, x[:3], given)]


def plain(x: list[Tensor], window: int | None) -> Tensor:
    """The same in the precision of its inputs."""
    key = torch.arange(x[1].shape[2], device=DEVICE)
    allowed = (key <= x[3][:, :, None]) & (key > x[3][:, :, None] - (window or 1 << 30))
    scores = x[0] @ x[1].repeat_interleave(2, 1).mT * x[0].shape[-1] ** -0.5
    return scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1) @ x[2].repeat_interleave(2, 1)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("features", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_torch(features: int, window: int | None, dtype: torch.dtype) -> None:
    """Errors against fp64 are at most twice those of the same operations in torch."""
    x = inputs(features, dtype=dtype)
    assert applies(*x[:3]) is None
    wide = [t.detach().double().requires_grad_() for t in x[:3]] + x[3:]
    exact = judged(reference(*wide, window=window)[0], wide)
    found = judged(shared_attention(*x, window=window)[0], x)
    for one, other, right in zip(found, judged(plain(x, window), x), exact, strict=True):
        assert (one - right).abs().max() <= 2 * (other - right).abs().max() + 1e-6


def test_one_query_and_one_key() -> None:
    """Sizes of 1 are compiled as constants."""
    x = inputs(count=1, size=1)
    found, wanted = judged(shared_attention(*x)[0], x), judged(reference(*x)[0], x)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_fp32_is_exact_by_default() -> None:
    x = inputs(dtype=torch.float32)
    found, wanted = judged(shared_attention(*x)[0], x), judged(reference(*x)[0], x)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [32, 64, 128])
@pytest.mark.parametrize("keys", [32, 64, 128])
def test_gradients_do_not_depend_on_tiles(queries: int, keys: int) -> None:
    """Triton up to 3.7.0 multiplies some transposed products wrongly on Hopper, at some tile sizes."""
    from depthc.codegen.kernels.shared_attention import launch
    from depthc.codegen.kernels.shared_attention.tiles import Tiles

    x, tiles = inputs(), Tiles(queries, keys, 4, 2)
    given = launch.Inputs(*(t.detach() for t in x), None, None, 0.125, None, None)
    out, lse = launch.forward(given, tiles)
    dout = torch.randn_like(out)
    dq, delta = launch.gradient_of_queries(given, out, lse, dout, None, tiles)
    expected = torch.autograd.grad(reference(*x)[0], x[:3], dout)
    for found, wanted in zip((dq, *launch.gradients_of_keys(given, lse, dout, delta, tiles)), expected, strict=True):
        assert (found - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_a_graph_takes_new_positions() -> None:
    """Forward and backward are captured once and replayed with other positions, bit for bit as eager runs."""
    x = inputs()
    judged(shared_attention(*x)[0], x)
    given, graph = torch.randn_like(x[0]), torch.cuda.CUDAGraph()
    own, again = ([t.detach().requires_grad_() for t in x[:3]] for _ in range(2))  # gradient nodes have a stream
    with torch.cuda.graph(graph):
        out, _ = shared_attention(*own, x[3])
        grads = torch.autograd.grad(out, own, given)
    x[3].copy_(inputs()[3])
    graph.replay()
    eager, _ = shared_attention(*again, x[3])
    wanted = torch.autograd.grad(eager, again, given)
    for found, expected in zip((out, *grads), (eager, *wanted), strict=True):
        assert torch.equal(found, expected)
