"""Shared-KV attention without the interpreter: when it applies, what runs otherwise, and what compiles for Hopper.

What the kernels compute is tested in `kernels/test_shared_attention.py`.
"""

from __future__ import annotations

import os

import pytest
import torch
from ahead import SHARED, built
from torch import Tensor
from torch.nn import functional as F

from depthc.codegen.kernels.shared_attention.op import applies, shared_attention
from depthc.codegen.kernels.shared_attention.reference import reference
from depthc.codegen.kernels.shared_attention.tiles import PLANS, plan_of, width_of
from depthc.ir.errors import InputError

SPILLED = 64  # bytes a thread: tiles without any were slower on an H200
needs_compiler = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
TYPES = {
    **dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), "*bf16"),
    **dict.fromkeys(("lse", "dlse", "delta"), "*fp32"),
    **dict.fromkeys(("valid", "keep"), "*i1"),
    "positions": "*i64",
    "spans": "*i32",
    "scale": "fp32",
    "softcap": "fp32",
}


def rows(dtype: torch.dtype = torch.float32, features: int = 16, tokens: int = 6) -> Tensor:
    return torch.randn(1, 2, tokens, features, dtype=dtype)


REASONS = {
    "queries, keys and values are torch.float64, torch.float64 and torch.float64": (rows(torch.float64),) * 3,
    "queries, keys and values are torch.float32, torch.float16 and torch.float16": (
        rows(),
        rows(torch.float16),
        rows(torch.float16),
    ),
    "heads have 264 features, more than 256": (rows(features=264),) * 3,
    "there are no queries or no keys": (rows(tokens=0), rows(), rows()),
    "there are more than 65535 sequences or heads": (torch.empty(1).expand(1 << 16, 1, 1, 1),) * 3,
    "features do not lie side by side": (rows(features=6).mT,) * 3,
    "tokens lie more than 8388608 numbers apart": (torch.empty(16).as_strided((1, 1, 1, 16), (0, 0, 1 << 24, 1)),) * 3,
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_not_to_apply(reason: str) -> None:
    assert reason in str(applies(*REASONS[reason]))


@needs_compiler
def test_the_cpu_takes_the_reference() -> None:
    assert applies(rows(), rows(), rows()) == "the tensors are on cpu, and Triton runs on cuda"
    q, k, positions = rows(tokens=3), rows(), torch.tensor([[0, 2, 5]])
    assert all(map(torch.equal, shared_attention(q, k, k, positions), reference(q, k, k, positions)))


@pytest.mark.parametrize(("count", "size"), [(0, 6), (6, 0)])
def test_nothing_is_a_size_too(count: int, size: int) -> None:
    q, k = rows(tokens=count), rows(tokens=size)
    out, lse = shared_attention(q, k, k, torch.zeros(1, count, dtype=torch.int64))
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full((1, 2, count), -torch.inf))


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(
        InputError, match=r"(?s)expected: q \[B, H, K, d\].*found: q \[1, 2, 6, 16\].*positions \[1, 5\]"
    ):
        shared_attention(rows(), rows(), rows(), torch.zeros(1, 5, dtype=torch.int64))


@needs_compiler
def test_the_meta_device_has_shapes_and_no_autocast() -> None:
    q, k, positions = (x.to("meta") for x in (rows(tokens=3), rows(), torch.tensor([[0, 2, 5]])))
    out, lse = shared_attention(q, k, k, positions)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])


def test_autocast_attends_in_half_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = shared_attention(rows(), rows(), rows(), torch.arange(6)[None])
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("window", [None, 2])
def test_gradients_of_the_reference(window: int | None) -> None:
    """In fp64, by finite differences; the third query is not valid, the first sees no key."""
    x = [
        torch.randn(1, heads, tokens, 3, dtype=torch.float64, requires_grad=True)
        for heads, tokens in ((2, 4), (1, 5), (1, 5))
    ]
    positions, valid = torch.tensor([[0, 2, 3, 4]]), torch.tensor([[True, True, False, True]])
    keep = torch.tensor([[False, True, True, True, True]])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference(q, k, v, positions, valid, keep, 0.8, window, 2.0)
        return out, lse.exp()

    assert torch.autograd.gradcheck(attend, x)
    out, lse = attend(*x)
    assert out[:, :, [0, 2]].eq(0).all()
    assert lse[:, :, [0, 2]].eq(0).all()


def test_the_reference_is_ordinary_attention_where_all_tokens_ask() -> None:
    q, k, v = rows(), rows(), rows()
    out, _ = reference(q, k, v, torch.arange(6)[None])
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize(("features", "width"), [(1, 16), (16, 16), (80, 128), (96, 128), (128, 128), (200, 256)])
def test_every_head_size_has_a_plan(features: int, width: int) -> None:
    assert width_of(features) == width
    assert plan_of(features, 2) == PLANS[2, max(64, width)]


@pytest.mark.thorough
@needs_compiler
@pytest.mark.parametrize("features", [64, 128])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("name", ["forward", "queries", "keys"])
def test_kernels_compile_for_hopper(name: str, window: bool, features: int) -> None:
    """Products on tensor cores, loads in 16 bytes, hardly anything spilled, in the shared memory that there is."""
    found = taken(name, features, 2, window)
    assert found["wgmma.mma_async"]
    assert bool(found["cp.async.cg"]) == (getattr(plan_of(features, 2), name).stages > 1)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("itemsize", "features"), [p if p[0] == 2 else pytest.param(*p, marks=pytest.mark.thorough) for p in PLANS]
)
@pytest.mark.parametrize("name", ["forward", "queries", "keys"])
def test_all_plans_compile_for_hopper(name: str, itemsize: int, features: int) -> None:
    taken(name, features, itemsize, False)


def taken(name: str, features: int, itemsize: int, window: bool) -> dict[str, int]:
    tiles = getattr(plan_of(features, itemsize), name)
    constants = {"valid": None, "keep": None, "softcap": None, "D": features, "WIDTH": features}
    constants |= {"QUERIES": tiles.queries, "KEYS": tiles.keys, "PRECISION": "ieee"}
    constants |= {} if window else {"window": None}
    constants |= {"dlse": None} if name == "queries" else {}
    module = f"depthc.codegen.kernels.shared_attention.kernel_{name}"
    types = {n: "*fp32" if itemsize == 4 and t == "*bf16" else t for n, t in TYPES.items()}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    build = {"module": module, "kernel": f"{name}_kernel", "types": types, "constants": constants, "options": options}
    (found,) = built([build])
    print(f"{name}, {features} features of {itemsize} bytes, {'a window' if window else 'no window'}: {found}")
    assert found["SHARED"] <= SHARED
    assert found["STACK"] <= SPILLED
    return found
