"""The router kernels: against their reference and a loop over tokens in fp64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from ahead import built
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from depthc.codegen.kernels.score import applies, op, score_reference, score_rows
from depthc.codegen.kernels.score.match import Options, options_of
from depthc.codegen.kernels.score.op import WIDEST, _tiles
from depthc.ir.program import Segment
from depthc.ir.types import Type
from depthc.passes.routing_glue import router

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULE = "depthc.codegen.kernels.score.kernel"


def made(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A stream that lies apart in memory, and a weight."""
    apart = torch.randn(shape[0], shape[1] + 2, shape[2] + 3, dtype=dtype, device=DEVICE)
    return apart[:, 1:-1, : shape[2]], torch.randn(shape[2], device=DEVICE)


def looped(stream: Tensor, weight: Tensor) -> Tensor:
    """The logit of every token, feature by feature, in Python's fp64."""
    rows, w = stream.tolist(), weight.tolist()
    return torch.tensor([[sum(a * b for a, b in zip(x, w, strict=True)) for x in row] for row in rows])


@settings(max_examples=8)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 70))
def test_forward(B: int, S: int, D: int) -> None:
    stream, weight = made(B, S, D)
    assert applies(stream, weight) is None
    found = score_rows(stream, weight)
    torch.testing.assert_close(found, score_reference(stream, weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.cpu(), looped(stream, weight), rtol=1e-5, atol=1e-4)


@settings(max_examples=6)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 70), st.booleans())
def test_gradients(B: int, S: int, D: int, carried: bool) -> None:
    """Against the loop's own derivative: of a token g w, of the weight the sum of g x; with the stream and without."""
    stream, weight = made(B, S, D)
    x, w = stream.detach().requires_grad_(carried), weight.clone().requires_grad_()
    upstream = torch.randn(B, S, device=DEVICE)
    grads = torch.autograd.grad(score_rows(x, w), [*([x] if carried else []), w], upstream)
    wanted = (upstream.double()[..., None] * stream.double()).sum((0, 1))
    torch.testing.assert_close(grads[-1].double(), wanted, rtol=1e-5, atol=1e-4)
    if carried:
        torch.testing.assert_close(grads[0], upstream[..., None] * weight)


def test_more_tokens_than_programs_and_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "PROGRAMS", 8)
    stream, weight = made(2, 8 * 20, 8)
    x, w = stream.requires_grad_(), weight.requires_grad_()
    upstream = torch.randn(stream.shape[:2], device=DEVICE)
    first, again = (torch.autograd.grad(score_rows(x, w), (x, w), upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    wanted = (upstream.double()[..., None] * stream.double()).sum((0, 1))
    torch.testing.assert_close(first[1].double(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ("stream", "the kernel takes float32, bfloat16 and float16"),
        ("weight", "the weight is float64"),
        ("wide", "do not fit in registers"),
        ("empty", "there are no tokens"),
    ],
)
def test_where_the_kernel_does_not_apply_the_reference_runs(changed: str, reason: str) -> None:
    stream, weight = made(1, 2, WIDEST + 1) if changed == "wide" else made(1, 3, 8)
    stream = {"stream": stream.double(), "empty": stream[:, :0]}.get(changed, stream)
    weight = weight.double() if changed == "weight" else weight
    assert reason in str(applies(stream, weight))
    torch.testing.assert_close(score_rows(stream, weight), score_reference(stream, weight))


def segment(*given: object, **options: object) -> Segment:
    body = router(Type(torch.float32, ("b", "s", 8)), *given, **options)  # type: ignore[arg-type]
    return Segment("router", body, ("h",), ("logit",), tuple(f"w{i}" for i in range(len(body.inputs_of("param")))))


def test_routers_are_known_by_what_they_compute() -> None:
    assert options_of(segment("linear")) == Options(apart=False)
    assert options_of(segment("linear", apart=True)) == Options(apart=True)
    assert options_of(segment("linear", 2.0)) is None
    assert options_of(segment("linear", outputs=(3,))) is None
    assert options_of(segment("mlp")) is None


def test_kernels_compile_for_hopper() -> None:
    tiles = _tiles(2048)
    constants = {name: size for name, size in tiles.items() if name != "num_warps"}
    types = {"stream": "*bf16", "weight": "*fp32", "logits": "*fp32", "grad": "*fp32", "parts": "*fp32"}
    build = {"module": MODULE, "types": types, "constants": constants, "options": {"num_warps": tiles["num_warps"]}}
    for taken in built([{**build, "kernel": name} for name in ("forward_kernel", "weight_kernel")]):
        assert taken["STACK"] == taken["LOCAL"] == 0
        assert taken["atom.global"] == taken["red.global"] == 0
        assert taken["ld.global.v4"]  # 16 bytes at once
