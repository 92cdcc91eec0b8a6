"""The kernels one after another: what a routed region computes around its block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from depthc.codegen.kernels.combine import combine
from depthc.codegen.kernels.gather_norm import gather_norm
from depthc.codegen.kernels.select import select_topk, select_where
from depthc.ir.selection import select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_kernels(stream: Tensor, router: Tensor, weight: Tensor) -> Tensor:
    """x + 0.1 sigmoid(logit) (x + norm(x)) of the better half of every row."""
    logits = (stream * router).sum(-1)
    chosen = select_topk(logits, stream.shape[1] // 2)
    rows, normed = gather_norm(stream, chosen.positions, weight)
    return combine(stream, rows + normed, logits.gather(1, chosen.positions), chosen.positions, chosen.inverse)


def by_the_program(stream: Tensor, router: Tensor, weight: Tensor) -> Tensor:
    logits = (stream * router).sum(-1)
    tokens = select("topk(0.5)", logits)
    x = tokens.take(stream)
    y = x + x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    return tokens.put(stream, x + 0.1 * tokens.take(logits).sigmoid()[..., None] * y)


def step(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    leaves = [part.clone().requires_grad_() for part in given]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.square().mean(), leaves)]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_region_is_that_of_the_program(compiled: bool) -> None:
    given = [torch.randn(2, 10, 16, device=DEVICE), *(torch.randn(16, device=DEVICE) for _ in range(2))]
    function = torch.compile(by_kernels, backend="aot_eager", fullgraph=True) if compiled else by_kernels
    for found, expected in zip(step(function, given), step(by_the_program, given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_routes_anew_at_every_replay() -> None:
    given = [torch.randn(2, 10, 16, device=DEVICE), *(torch.randn(16, device=DEVICE) for _ in range(2))]

    def run() -> tuple[Tensor, Tensor, Tensor]:
        chosen = select_where((given[0] * given[1]).sum(-1), 0.0)
        return by_kernels(*given), chosen.places, chosen.cu_seqlens

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        given[0].copy_(torch.randn_like(given[0]))
        graph.replay()
        for found, expected in zip(captured, run(), strict=True):
            assert torch.equal(found, expected)
