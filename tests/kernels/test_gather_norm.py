"""The gather and norm kernel: against its reference and a loop over rows in fp64, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ahead import built
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from depthc.codegen.kernels.gather_norm import applies, gather_norm, gather_norm_reference
from depthc.codegen.kernels.gather_norm.op import PROGRAMS, WIDEST, gather_norm_op
from depthc.ir.errors import InputError
from depthc.ir.tokens import TokenSet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Given = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def made(B: int, S: int, k: int, D: int, *, scaled: bool = True, shifted: bool = False) -> Given:
    """A stream, distinct ascending positions, weight and bias."""
    positions = torch.stack([torch.randperm(S)[:k].sort().values for _ in range(B)])
    weight, bias = torch.randn(D) if scaled else None, torch.randn(D) if shifted else None
    return tuple(None if t is None else t.to(DEVICE) for t in (torch.randn(B, S, D) + 1, positions, weight, bias))  # type: ignore[return-value]


def looped(stream: Tensor, positions: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str) -> list[Any]:
    """The norm of every row, feature by feature, in Python's fp64."""
    found = []
    for b, row in enumerate(positions.tolist()):
        for p in row:
            x = stream[b, p].tolist() if p >= 0 else [0.0] * stream.shape[2]
            centre = sum(x) / len(x) if kind == "layer" else 0.0
            x = [v - centre for v in x]
            scale = 1 / math.sqrt(sum(v * v for v in x) / len(x) + 1e-6)
            w = [1.0] * len(x) if weight is None else weight.tolist()
            c = [0.0] * len(x) if bias is None else bias.tolist()
            found.append([v * scale * w[i] + c[i] for i, v in enumerate(x)])
    return found


def gradients(function: Any, inputs: Given, kind: str, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of stream, weight and bias under fixed random gradients of both results."""
    leaves = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in (inputs[0], *inputs[2:])]
    rows, normed = function(leaves[0], inputs[1], *leaves[1:], kind=kind)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(rows.shape, generator=generator).to(DEVICE, dtype) for _ in range(2)]
    ((rows * weights[0]).sum() + (normed * weights[1]).sum()).backward()
    return [t.grad for t in leaves if t is not None]


@settings(max_examples=40)
@given(st.data(), st.integers(1, 3), st.integers(1, 12), st.integers(1, 70))
def test_forward(data: st.DataObject, B: int, S: int, D: int) -> None:
    kind, k = data.draw(st.sampled_from(["rms", "layer"])), data.draw(st.integers(1, S))
    inputs = made(B, S, k, D, scaled=data.draw(st.booleans()), shifted=data.draw(st.booleans()))
    inputs[1][data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, k - 1))] = data.draw(st.sampled_from([-1, 0]))
    assert applies(*inputs) is None
    rows, normed = gather_norm(*inputs, kind=kind)
    expected = gather_norm_reference(*inputs, kind=kind)
    assert torch.equal(rows, expected[0])
    torch.testing.assert_close(normed, expected[1], rtol=1e-5, atol=1e-5)
    if D > 1 or kind == "rms":
        loop = torch.tensor(looped(*inputs, kind)).view_as(normed)
        torch.testing.assert_close(normed.cpu(), loop, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("sizes", [(2, 7, 3, 40), (1, 1, 1, 64), (3, 5, 5, 33)])
@pytest.mark.parametrize("affine", [(False, False), (True, False), (True, True), (False, True)])
def test_backward(kind: str, sizes: tuple[int, int, int, int], affine: tuple[bool, bool]) -> None:
    inputs = made(*sizes, scaled=affine[0], shifted=affine[1])
    inputs[1][0, -1] = -1
    found = gradients(gather_norm, inputs, kind, torch.float32)
    exact = gradients(gather_norm_reference, inputs, kind, torch.float64)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_programs_take_several_rows() -> None:
    inputs = made(2, PROGRAMS, PROGRAMS - 200, 8, shifted=True)
    found = gradients(gather_norm, inputs, "layer", torch.float32)
    exact = gradients(gather_norm_reference, inputs, "layer", torch.float64)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1])
def test_one_result_alone_may_have_a_gradient(which: int) -> None:
    stream, positions, weight, _ = made(2, 6, 3, 20)
    grads = []
    for function in (gather_norm, gather_norm_reference):
        leaf = stream.clone().requires_grad_()
        function(leaf, positions, weight)[which].square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    stream, positions, weight, _ = made(2, 6, 3, 48)
    stream, weight = stream.to(dtype), weight.to(dtype)
    rows, normed = gather_norm(stream, positions, weight)
    assert torch.equal(rows, gather_norm_reference(stream, positions)[0])
    exact = gather_norm_reference(stream.double(), positions, weight.double())[1]
    assert normed.dtype == dtype
    share = 1.0 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0.5  # the interpreter cuts bfloat16 off
    assert ((normed.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * share * 1.01 + 1e-6).all()


@pytest.mark.parametrize("permuted", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_a_stream_may_have_any_strides(permuted: tuple[int, int, int]) -> None:
    stream, positions, weight, bias = made(6, 6, 4, 6, shifted=True)
    stream = stream.permute(permuted)
    found = gather_norm(stream, positions, weight, bias)
    for a, b in zip(found, gather_norm_reference(stream, positions, weight, bias), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rows_are_those_of_a_token_set() -> None:
    tokens, stream = TokenSet(torch.rand(3, 9, device=DEVICE) < 0.5), torch.randn(3, 9, 16, device=DEVICE)
    assert torch.equal(gather_norm(stream, tokens.positions)[0], tokens.take(stream))


def test_bitwise_repeatable() -> None:
    inputs = made(2, 60, 40, 16, shifted=True)
    first, second = (gradients(gather_norm, inputs, "layer", torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_opcheck(kind: str) -> None:
    stream, positions, weight, bias = made(2, 6, 3, 12, shifted=True)
    leaves = [t.requires_grad_() for t in (stream, weight, bias)]
    torch.library.opcheck(gather_norm_op, (leaves[0], positions, leaves[1], leaves[2], 1e-6, kind))
    first = torch.zeros(6, 1, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(
        gather_norm_op, (stream.detach().transpose(0, 1).requires_grad_(), first, None, None, 1e-6, kind)
    )


@pytest.mark.parametrize(
    ("stream", "positions", "reason"),
    [
        (torch.ones(1, 2, 4).double(), torch.zeros(1, 1).long(), "float32"),
        (torch.ones(1, 2, 4), torch.zeros(1, 0).long(), "no rows"),
        (torch.ones(1, 2, WIDEST + 1), torch.zeros(1, 1).long(), "do not fit"),
    ],
)
def test_where_the_kernel_does_not_apply_the_reference_runs(stream: Tensor, positions: Tensor, reason: str) -> None:
    assert reason in str(applies(stream, positions))
    assert gather_norm(stream, positions)[1].shape == (*positions.shape, stream.shape[2])


def test_kinds_are_checked() -> None:
    with pytest.raises(InputError, match="kind is 'batch'"):
        gather_norm(torch.ones(1, 1, 1), torch.zeros(1, 1).long(), kind="batch")


def test_compiled_for_hopper() -> None:
    """No stack, hence no spills; 16 bytes a load and a store; no atomics."""
    builds = []
    for float_, D in (("*bf16", 2048), ("*fp32", 2048), ("*bf16", 8192)):
        flags = {"LAYER": True, "HAS_WEIGHT": True, "HAS_BIAS": True, "D": D, "BLOCK": D}
        wide = dict.fromkeys(("stream", "rows", "normed", "weight", "bias", "grad_rows", "grad_normed"), float_)
        types = wide | {"grad_stream": float_, "positions": "*i64", "k": "i32 even", "eps": "fp32", "n": "i32 even"}
        types |= dict.fromkeys(("mean", "rstd", "weight_parts", "bias_parts"), "*fp32")
        types |= dict.fromkeys(("stream_row", "stream_token", "S", "programs"), "i32 even")
        common = {
            "module": "depthc.codegen.kernels.gather_norm.kernel",
            "types": types,
            "options": {"num_warps": D // 512},
        }
        builds.append({**common, "kernel": "forward_kernel", "constants": flags})
        builds.append({**common, "kernel": "backward_kernel", "constants": {**flags, "HAS_ROWS": True}})
    for found in built(builds):
        assert found["STACK"] == found["LOCAL"] == found["ld.local"] == found["st.local"] == 0, found
        assert found["atom.global"] == found["red.global"] == 0, found
        assert found["ld.global.v4"] >= 2, found
        assert found["st.global.v4"] >= 2, found
        assert found["ld.global.v2"] == found["st.global.v2"] == 0, found
