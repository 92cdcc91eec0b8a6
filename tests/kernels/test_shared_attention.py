"""Kernels of shared-KV attention, in fp32, against every query by itself in fp64."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from depthc.codegen.kernels.shared_attention import launch
from depthc.codegen.kernels.shared_attention.op import _backward, _forward, applies, shared_attention
from depthc.codegen.kernels.shared_attention.reference import reference
from depthc.codegen.kernels.shared_attention.tiles import Plan, Tiles

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU: test_gpu_kernels.py")
SMALL = Tiles(16, 16, 4, 1)


@dataclass(frozen=True)
class Case:
    """Sizes and options of one attention."""

    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    count: int = 21
    size: int = 45
    features: int = 16
    valid: bool = False
    keep: bool = False
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    seed: int = 0

    def inputs(self) -> dict[str, Tensor | None]:
        """Tensors laid out as projections make them, [batch, token, head, feature], seen the other way round."""
        g = torch.Generator().manual_seed(self.seed)

        def rows(tokens: int, heads: int) -> Tensor:
            return torch.randn(self.batch, tokens, heads, self.features, generator=g).transpose(1, 2)

        def some(tokens: int) -> Tensor:
            return torch.rand(self.batch, tokens, generator=g) > 0.3

        order = torch.rand(self.batch, self.size, generator=g).argsort(1)
        return {
            "q": rows(self.count, self.heads),
            "k": rows(self.size, self.key_heads),
            "v": rows(self.size, self.key_heads),
            "positions": order[:, : self.count].sort(1).values,
            "valid": some(self.count) if self.valid else None,
            "keep": some(self.size) if self.keep else None,
        }

    @property
    def options(self) -> dict[str, float | int | None]:
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap}


def one_by_one(case: Case, x: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """Output and logsumexp: for every query, the keys that it sees, and nothing else."""
    q, k, v = (x[name].double() for name in "qkv")
    scale = case.features**-0.5 if case.scale is None else case.scale
    outs, logs = [], []
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        place, group = int(x["positions"][b, i]), h // (case.heads // case.key_heads)
        earliest = 0 if case.window is None else max(0, place - case.window + 1)
        seen = [j for j in range(earliest, min(place + 1, case.size)) if x["keep"] is None or x["keep"][b, j]]
        if not seen or (x["valid"] is not None and not x["valid"][b, i]):
            outs.append(q[b, h, i] * 0)
            logs.append(torch.tensor(-torch.inf).double())
            continue
        scores = k[b, group, seen] @ q[b, h, i] * scale
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        outs.append(scores.softmax(0) @ v[b, group, seen])
        logs.append(scores.logsumexp(0))
    return torch.stack(outs).view(q.shape), torch.stack(logs).view(q.shape[:3])


def gradients(out: Tensor, lse: Tensor, x: dict[str, Tensor | None], seed: int = 0) -> tuple[Tensor, ...]:
    """Gradients of q, k, v for random ones of output and of exp(logsumexp), which is 0 where nothing is seen."""
    g = torch.Generator().manual_seed(seed)
    loss = sum((t * torch.randn(t.shape, generator=g)).sum() for t in (out, lse.exp() * 0.01))
    return torch.autograd.grad(loss, [x[n] for n in "qkv"], materialize_grads=True)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert found.shape == expected.shape
    atol = tolerance * (1 + expected.detach().abs().max().item())
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


def agree(case: Case, x: dict[str, Tensor | None] | None = None) -> None:
    """The op and the reference are what every query by itself gives: outputs and gradients."""
    x = case.inputs() if x is None else x
    for name in "qkv":
        x[name].requires_grad_()
    expected = one_by_one(case, x)
    grads = gradients(*expected, x)
    assert applies(x["q"], x["k"], x["v"]) is None
    for function in (shared_attention, reference):
        out, lse = function(**x, **case.options)
        assert lse.dtype == torch.float32
        close(out, expected[0])
        close(lse.exp(), expected[1].exp())
        assert torch.equal(lse.isinf(), expected[1].isinf())
        for found, wanted in zip(gradients(out, lse, x), grads, strict=True):
            close(found, wanted)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that small shapes have many."""
    monkeypatch.setattr(launch, "plan_of", lambda *_: Plan(SMALL, SMALL, SMALL))


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("small")
def test_every_query_by_itself(window: int | None, masked: bool) -> None:
    agree(Case(valid=masked, keep=masked, window=window))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.usefixtures("small")
def test_softcap_and_scale(window: int | None) -> None:
    agree(Case(softcap=1.5, scale=0.7, window=window, keep=window is not None))


@pytest.mark.usefixtures("small")
def test_at_the_tiles_of_the_plan() -> None:
    agree(Case(valid=True))


@pytest.mark.parametrize("features", [16, 24, 40, 64])
def test_head_sizes(features: int) -> None:
    agree(Case(batch=1, heads=2, key_heads=1, features=features))


@pytest.mark.slow
@pytest.mark.parametrize("features", [80, 128, 256])
def test_large_head_sizes(features: int) -> None:
    agree(Case(batch=1, heads=2, key_heads=1, features=features))


@pytest.mark.parametrize(
    "change", [{"count": 1}, {"size": 1, "count": 1}, {"heads": 3, "key_heads": 3}, {"key_heads": 1}]
)
@pytest.mark.usefixtures("small")
def test_edges(change: dict[str, int]) -> None:
    agree(replace(Case(batch=1), **change))


@pytest.mark.usefixtures("small")
def test_queries_at_the_first_key() -> None:
    x = Case(count=3).inputs()
    agree(Case(count=3), {**x, "positions": torch.zeros(2, 3, dtype=torch.int64)})


@pytest.mark.usefixtures("small")
def test_any_order_and_repeated_positions() -> None:
    case = Case(count=33, window=6, valid=True)
    agree(case, {**case.inputs(), "positions": torch.randint(0, case.size, (2, 33))})


@pytest.mark.usefixtures("small")
def test_positions_behind_the_last_key() -> None:
    case = Case(count=20, size=20)
    agree(case, {**case.inputs(), "positions": torch.arange(20).expand(2, -1) + 17})
    agree(replace(case, window=5), {**case.inputs(), "positions": torch.arange(20).expand(2, -1) + 17})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size, key_heads = draw(st.integers(1, 40)), draw(st.integers(1, 2))
    return Case(
        batch=draw(st.integers(1, 2)),
        heads=key_heads * draw(st.integers(1, 2)),
        key_heads=key_heads,
        count=draw(st.integers(1, size)),
        size=size,
        features=draw(st.sampled_from([8, 16, 17])),
        valid=draw(st.booleans()),
        keep=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, size + 1)),
        softcap=draw(st.none() | st.just(2.0)),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=12)
@given(case=cases())
def test_random_cases(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "plan_of", lambda *_: Plan(SMALL, SMALL, SMALL))
        agree(case)


@pytest.mark.thorough
@settings(max_examples=40)
@given(case=cases())
def test_many_random_cases(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "plan_of", lambda *_: Plan(SMALL, SMALL, SMALL))
        agree(case)


@pytest.mark.usefixtures("small")
def test_all_tokens_are_ordinary_causal_attention() -> None:
    case = Case(count=37, size=37)
    x = case.inputs()
    out, _ = shared_attention(**x)
    close(out, F.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True, enable_gqa=True))


@pytest.mark.parametrize("queries", [32, 64, 128])
@pytest.mark.parametrize("keys", [32, 64, 128])
def test_gradients_at_tile_sizes(queries: int, keys: int) -> None:
    """dq, dk and dv do not depend on how the work is cut."""
    case, tiles = Case(batch=1, heads=2, key_heads=1, count=50, size=64), Tiles(queries, keys, 4, 1)
    x = case.inputs()
    for name in "qkv":
        x[name].requires_grad_()
    out, lse = reference(**x)
    dout = torch.randn(out.shape)
    wanted = torch.autograd.grad(out, [x[n] for n in "qkv"], dout)
    inputs = launch.Inputs(*(t if t is None else t.detach() for t in x.values()), 0.25, None, None)
    dq, delta = launch.gradient_of_queries(inputs, out.detach(), lse.detach(), dout, None, tiles)
    for found, expected in zip(
        (dq, *launch.gradients_of_keys(inputs, lse.detach(), dout, delta, tiles)), wanted, strict=True
    ):
        close(found, expected)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.usefixtures("small")
def test_what_nobody_may_see_does_not_leak(window: int | None) -> None:
    """NaN in keys behind the last position, in padding and in queries that are not valid stay out of everything."""
    case = Case(valid=True, keep=True, window=window)
    x = case.inputs()
    x["positions"] = torch.arange(20, 41).expand(2, -1).clone()
    kept = x["keep"] & (torch.arange(case.size) < 41)
    if window is not None:
        kept &= torch.arange(case.size) > 20 - window
    clean = {**x, **{n: x[n].masked_fill(~kept[:, None, :, None], 0) for n in "kv"}}
    clean["q"] = x["q"].masked_fill(~x["valid"][:, None, :, None], 0)
    x |= {n: x[n].masked_fill(~kept[:, None, :, None], torch.nan) for n in "kv"}
    x["q"] = x["q"].masked_fill(~x["valid"][:, None, :, None], torch.nan)
    x["positions"] = x["positions"].where(x["valid"], 1 << 40)
    found, wanted = [], []
    for given_, results in ((x, found), (clean, wanted)):
        for name in "qkv":
            given_[name].requires_grad_()
        out, lse = shared_attention(**given_, **case.options)
        results.extend([out, lse, *gradients(out, lse, given_)])
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("small")
def test_runs_are_bitwise_equal() -> None:
    x = Case(batch=1, valid=True).inputs()
    for name in "qkv":
        x[name].requires_grad_()
    runs = [(out, lse, *gradients(out, lse, x)) for out, lse in (shared_attention(**x) for _ in range(2))]
    assert all(map(torch.equal, *runs))


@pytest.mark.usefixtures("small")
def test_layouts() -> None:
    """Slices of a fused projection, keys expanded over the batch, and expanded gradients, as `sum` gives them."""
    case = Case(batch=2, heads=2, key_heads=2, count=20, size=20)
    fused = torch.randn(2, 20, 3, 2, 16, requires_grad=True)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    k = k[:1].expand(2, -1, -1, -1)
    positions = torch.arange(20).expand(2, -1)
    out, _ = shared_attention(q, k, v, positions)
    (found,) = torch.autograd.grad(out.sum(), fused)
    out, _ = one_by_one(case, {"q": q, "k": k, "v": v, "positions": positions, "keep": None, "valid": None})
    (wanted,) = torch.autograd.grad(out.sum(), fused)
    close(found, wanted)


@pytest.mark.usefixtures("small")
def test_outputs_are_laid_out_as_the_queries() -> None:
    x = Case().inputs()
    out, _ = shared_attention(**x)
    assert out.stride() == x["q"].stride()
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.usefixtures("small")
def test_logsumexp_alone_has_gradients() -> None:
    """Its gradient where nothing is seen may be NaN: that of -inf often is."""
    x = Case(batch=1, valid=True, keep=True).inputs()
    x["keep"][:, :9] = False
    for name in "qkv":
        x[name].requires_grad_()
    grads = []
    for function in (shared_attention, reference):
        _, lse = function(**x)
        given_ = torch.ones_like(lse).where(lse > -torch.inf, torch.nan)
        grads.append(torch.autograd.grad(lse, [x["q"], x["k"]], given_))
    for found, wanted in zip(*grads, strict=True):
        close(found, wanted)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("small")
def test_opcheck(masked: bool) -> None:
    window = 9 if masked else None
    x = Case(1, 2, 1, 9, 18, valid=masked, keep=masked, window=window).inputs()
    for name in "qkv":
        x[name].requires_grad_()
    rest = 0.25, window, 2.0 if masked else None
    torch.library.opcheck(_forward, (*x.values(), *rest))
    with torch.no_grad():
        out, lse = _forward(*x.values(), *rest)
        dlse = torch.randn(lse.shape) if masked else None
        plain = [t if t is None else t.detach() for t in x.values()]
        torch.library.opcheck(_backward, (torch.randn(out.shape), dlse, out, lse, *plain, *rest))


def test_compiled_by_aot_eager() -> None:
    x = Case(batch=1).inputs()
    found = torch.compile(shared_attention, backend="aot_eager", fullgraph=True)(**x)
    assert all(map(torch.equal, found, shared_attention(**x)))
