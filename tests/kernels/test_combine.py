"""The combine kernels: against their reference, a loop over tokens in fp64, and the glue of the routed recipes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ahead import built
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from depthc.codegen.kernels.combine import applies, combine, combine_, combine_reference, inverse_of
from depthc.codegen.kernels.combine.fused import combine_fused
from depthc.codegen.kernels.combine.op import combine_op, in_place_op
from depthc.codegen.kernels.select import select_topk, select_where
from depthc.ir.body import interpret
from depthc.ir.errors import InputError
from depthc.ir.tokens import TokenSet
from depthc.ir.types import Type
from depthc.passes.routing_glue import COMBINES, GATES
from depthc.passes.routing_glue import combine as glue

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATED = ("weighted", "delta")
Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def made(B: int, S: int, k: int, D: int, kept: float = 1.0) -> Given:
    """Stream, rows, logits, ascending positions and their inverse, in which some rows do not stand."""
    positions = torch.stack([torch.randperm(S)[:k].sort().values for _ in range(B)])
    inverse = inverse_of(positions, S, torch.rand(B, k) < kept)
    parts = (torch.randn(B, S, D), torch.randn(B, k, D), 2 * torch.randn(B, k), positions, inverse)
    return tuple(part.to(DEVICE) for part in parts)  # type: ignore[return-value]


def looped(given: Given, kind: str, gate: str, alpha: float) -> Tensor:
    """Token by token and feature by feature, in Python's fp64."""
    stream, rows, logits, positions, inverse = (part.tolist() for part in given)
    for b, places in enumerate(positions):
        for j, p in enumerate(places):
            if inverse[b][p] != j:
                continue
            level = {"sigmoid": lambda v: 1 / (1 + math.exp(-v)), "tanh": math.tanh, "none": lambda v: v / alpha}[gate]
            s = alpha * level(logits[b][j])
            for d, (x, y) in enumerate(zip(stream[b][p], rows[b][j], strict=True)):
                new = {"weighted": x + s * y, "additive": x + y, "delta": x + s * (y - x), "off": y}[kind]
                stream[b][p][d] = new
    return torch.tensor(stream, dtype=torch.float64)


def gradients(function: Any, given: Given, dtype: torch.dtype, **options: Any) -> list[Tensor | None]:
    """Gradients of stream, rows and logits under a fixed random gradient of the result."""
    leaves = [part.detach().to(dtype, copy=True).requires_grad_() for part in given[:3]]
    out = function(*leaves, *given[3:], **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    return list(torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True))


@settings(max_examples=60)
@given(st.data(), st.integers(1, 3), st.integers(1, 10), st.integers(1, 40))
def test_forward(data: st.DataObject, B: int, S: int, D: int) -> None:
    kind, gate = data.draw(st.sampled_from(COMBINES)), data.draw(st.sampled_from(GATES))
    given = made(B, S, data.draw(st.integers(1, S)), D, data.draw(st.sampled_from([0.0, 0.5, 1.0])))
    assert applies(*given) is None
    found = combine(*given, kind=kind, gate=gate, alpha=0.7)
    torch.testing.assert_close(found, combine_reference(*given, kind=kind, gate=gate, alpha=0.7), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.cpu().double(), looped(given, kind, gate, 0.7), rtol=1e-5, atol=1e-6)
    untouched = given[4] < 0
    assert torch.equal(found[untouched], given[0][untouched])
    stream = given[0].clone()
    assert combine_(stream, *given[1:], kind=kind, gate=gate, alpha=0.7) is stream
    assert torch.equal(stream, found)


@pytest.mark.parametrize("kind", COMBINES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("sizes", "kept"), [((2, 7, 3, 40), 1.0), ((1, 1, 1, 64), 1.0), ((3, 5, 5, 33), 0.5)])
def test_backward(kind: str, gate: str, sizes: tuple[int, int, int, int], kept: float) -> None:
    given = made(*sizes, kept)
    found = gradients(combine, given, torch.float32, kind=kind, gate=gate)
    exact = gradients(combine_reference, given, torch.float64, kind=kind, gate=gate)
    for a, b in zip(found, exact, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", COMBINES)
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_form_that_compilers_fuse(kind: str, backend: str | None, dtype: torch.dtype) -> None:
    """As the kernels, forward and backward, as it is and compiled, where it converts to fp32 and where it need not."""
    torch.compiler.reset()
    given = made(3, 7, 4, 33, 0.7)

    def scaled(*inputs: Any, **options: Any) -> Tensor:
        stream, rows, logits, *places = inputs
        return combine_fused(2 * stream, 2 * rows, 2 * logits, *places, **options)

    function = torch.compile(scaled, backend=backend, fullgraph=True) if backend else scaled
    doubled = tuple(2 * part for part in given[:3])
    wide = tuple(part.to(dtype) for part in given[:3])
    expected = combine_reference(*doubled, *given[3:], kind=kind, alpha=0.7)
    torch.testing.assert_close(
        function(*wide, *given[3:], kind=kind, alpha=0.7).float(), expected, rtol=1e-5, atol=1e-6
    )
    found = gradients(function, given, dtype, kind=kind, alpha=0.7)
    exact = gradients(combine_reference, (*doubled, *given[3:]), torch.float64, kind=kind, alpha=0.7)
    for a, b in zip(found, exact, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a.double(), 2 * b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", COMBINES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_is_that_of_the_program(kind: str, gate: str, dtype: torch.dtype) -> None:
    """Bit for bit but for the gate's function, and the interpreter's cut of bfloat16."""
    logits = torch.randn(2, 9, device=DEVICE)
    chosen = select_topk(logits, 4)
    stream, rows = (torch.randn(2, n, 16, device=DEVICE).to(dtype) for n in (9, 4))
    tokens, body = TokenSet(chosen.mask, count=4), glue(kind, Type(dtype, ("b", "s", 16)), gate, 0.1)
    new = rows
    if body is not None:
        given = [tokens.take(stream), rows, tokens.take(logits)]
        inputs = body.arrange(given[: len(body.inputs_of("value"))], [], training=False, device=torch.device(DEVICE))
        (new,) = interpret(body, inputs)
    found = combine(
        stream, rows, logits.gather(1, chosen.positions), chosen.positions, chosen.inverse, kind=kind, gate=gate
    )
    rtol = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, tokens.put(stream, new), rtol=rtol, atol=rtol)


def test_what_is_not_chosen_does_not_leak() -> None:
    """Rows that stand for nothing may hold anything, and so may what `off` replaces."""
    stream, rows, logits, positions, inverse = made(2, 6, 3, 8)
    inverse[inverse == 1] = -1
    rows[:, 1], logits[:, 1] = math.nan, math.nan
    for kind in COMBINES:
        found = gradients(combine, (stream, rows, logits, positions, inverse), torch.float32, kind=kind)
        assert all(grad is None or grad.isfinite().all() for grad in found)
        assert found[1] is None or not found[1][:, 1].any()
        assert combine(stream, rows, logits, positions, inverse, kind=kind).isfinite().all()
    stream[inverse >= 0] = math.nan
    assert combine(stream, rows, None, positions, inverse, kind="off").isfinite().all()


def test_packed_rows_are_one_batch_row() -> None:
    score, stream = torch.randn(3, 7, device=DEVICE), torch.randn(3, 7, 8, device=DEVICE)
    chosen = select_where(score, 0.0)
    rows, logits = torch.randn(1, 21, 8, device=DEVICE), torch.randn(1, 21, device=DEVICE)
    rows[0, chosen.cu_seqlens[-1] :] = math.nan
    given = (stream.view(1, 21, 8), rows, logits, chosen.places[None], chosen.inverse.view(1, 21))
    found = combine(*given, kind="off").view(3, 7, 8)
    tokens = TokenSet(chosen.mask)
    assert torch.equal(found, tokens.unpack(stream, rows[:, : tokens.places.shape[0]]))
    assert torch.equal(combine_(stream.clone().view(1, 21, 8), *given[1:], kind="off").view(3, 7, 8), found)
    grads = gradients(combine, given, torch.float32, kind="delta")
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e-3, 0.2, 0.2499, 0.2501, 1.0, 9.0, 90.0])
def test_tanh_is_exact_near_zero_and_far_out(size: float) -> None:
    logits = torch.tensor([[size, -size]], device=DEVICE)
    positions, one = torch.tensor([[0, 1]], device=DEVICE), torch.ones(1, 2, 1, device=DEVICE)
    inverse = inverse_of(positions, 2)
    found = combine(torch.zeros_like(one), one, logits, positions, inverse, gate="tanh", alpha=1.0)
    torch.testing.assert_close(found.flatten().double(), logits.flatten().double().tanh(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("permuted", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("kind", COMBINES)
def test_inputs_may_have_any_strides(permuted: tuple[int, int, int], kind: str) -> None:
    stream, rows, logits, positions, inverse = made(6, 6, 6, 6, 0.5)
    given = (stream.permute(permuted), rows.permute(permuted), logits.T, positions.T.contiguous().T, inverse)
    expected = combine_reference(*given, kind=kind)
    torch.testing.assert_close(combine(*given, kind=kind), expected, rtol=1e-5, atol=1e-6)
    copy = stream.clone().permute(permuted)
    torch.testing.assert_close(combine_(copy, *given[1:], kind=kind), expected, rtol=1e-5, atol=1e-6)
    exact = gradients(combine_reference, given, torch.float64, kind=kind)
    for a, b in zip(gradients(combine, given, torch.float32, kind=kind), exact, strict=True):
        if b is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_rows_wider_than_a_step() -> None:
    given = made(1, 3, 2, 5000)
    for kind in GATED:
        expected = combine_reference(*given, kind=kind)
        torch.testing.assert_close(combine(*given, kind=kind), expected, rtol=1e-5, atol=1e-6)
        exact = gradients(combine_reference, given, torch.float64, kind=kind)
        for a, b in zip(gradients(combine, given, torch.float32, kind=kind), exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_bitwise_repeatable() -> None:
    given = made(2, 20, 13, 16)
    first, second = (gradients(combine, given, torch.float32, kind="delta") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", COMBINES)
def test_opcheck(kind: str) -> None:
    given = made(2, 6, 3, 12)
    leaves = [part.requires_grad_() for part in given[:3]]
    if kind not in GATED:
        leaves[2] = None  # type: ignore[call-overload]
    torch.library.opcheck(combine_op, (*leaves, *given[3:], kind, "tanh", 0.1))
    detached = [None if leaf is None else leaf.detach() for leaf in leaves]
    torch.library.opcheck(in_place_op, (*detached, *given[3:], kind, "sigmoid", 0.1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({0: torch.ones(1, 4, 2).double()}, "float64 and float32"),
        ({2: torch.ones(1, 2).bfloat16()}, "logits"),
        ({4: torch.tensor([[0, 1, -1, -1]])}, "inverse"),
        ({1: torch.ones(1, 0, 2), 2: torch.ones(1, 0), 3: torch.ones(1, 0).long()}, "no rows"),
    ],
)
def test_where_the_kernels_do_not_apply_the_reference_runs(change: dict[int, Tensor], reason: str) -> None:
    given = [torch.ones(1, 4, 2), torch.ones(1, 2, 2), torch.ones(1, 2), torch.tensor([[0, 1]])]
    given.append(torch.tensor([[0, 1, -1, -1]], dtype=torch.int32))
    given = [change.get(i, part) for i, part in enumerate(given)]
    assert reason in str(applies(*given))
    assert combine(*given).shape == (1, 4, 2)
    assert combine_(given[0], *given[1:]) is given[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kind": "sum"}, "kind is 'sum'"), ({"gate": "relu"}, "gate is 'relu'"), ({"kind": "delta"}, "delta needs")],
)
def test_options_are_checked(options: dict[str, str], message: str) -> None:
    stream, rows, _, positions, inverse = made(1, 4, 2, 2)
    with pytest.raises(InputError, match=message):
        combine(stream, rows, None, positions, inverse, **options)


def test_in_place_refuses_gradients() -> None:
    stream, *rest = made(1, 4, 2, 2)
    rest[0].requires_grad_()
    with pytest.raises(InputError, match="combine_ has no gradient"):
        combine_(stream, *rest)
    with torch.no_grad():
        combine_(stream, *rest)


def test_compiled_for_hopper() -> None:
    """No stack, hence no spills; 16 bytes a load and a store; no atomics."""
    builds = []
    for float_ in ("*bf16", "*fp32"):
        types = dict.fromkeys(("stream", "rows", "out", "grad", "grad_rows", "grad_stream"), float_)
        types |= {"logits": "*fp32", "positions": "*i64", "inverse": "*i32", "grad_logits": "*fp32", "alpha": "fp32"}
        types |= dict.fromkeys(("S", "k", "stream_row", "stream_token"), "i32 even")
        for kernel in ("forward", "in_place", "rows_backward", "stream_backward"):
            constants = {"D": 2048, "GATE": "tanh", "GATED": True, "BLOCK": 2048}
            constants |= {} if kernel == "stream_backward" else {"KIND": "delta"}
            build = {"kernel": f"{kernel}_kernel", "types": types, "constants": constants, "options": {"num_warps": 4}}
            builds.append({"module": "depthc.codegen.kernels.combine.kernel", **build})
    for found in built(builds):
        assert found["STACK"] == found["LOCAL"] == found["ld.local"] == found["st.local"] == 0, found
        assert found["atom.global"] == found["red.global"] == 0, found
        assert found["ld.global.v4"] >= 2, found
        assert found["st.global.v4"] >= 2, found
        assert found["ld.global.v2"] == found["st.global.v2"] == 0, found
