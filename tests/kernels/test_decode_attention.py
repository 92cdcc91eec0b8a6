"""Attention of one token to its caches: against a loop over heads and rows in fp64, and in a decoder."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from ahead import built
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import depthc
from depthc.codegen.kernels.decode_attention import applies, attend, decode_attention, op, reference, tiles
from depthc.ir.errors import InputError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULE = "depthc.codegen.kernels.decode_attention.kernel"
KINDS = ("none", "bool", "float", "bool a head")


def looped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, place: int | None, scale: float) -> Tensor:
    """Head by head and row by row, in Python's fp64."""
    batch, heads, _, features = q.shape
    groups, size = heads // k.shape[1], k.shape[2]
    told = None if mask is None else mask.expand(batch, heads, 1, size).tolist()
    out = torch.zeros(batch, heads, 1, features, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            query, scores = q[b, h, 0].tolist(), {}
            for r in range(size):
                seen = told is None or told[b][h][0][r] is not False
                if seen and (place is None or r <= place):
                    score = scale * sum(x * y for x, y in zip(query, k[b, h // groups, r].tolist(), strict=True))
                    scores[r] = score + (0.0 if told is None or told[b][h][0][r] is True else told[b][h][0][r])
            total = sum(math.exp(score) for score in scores.values())
            for r, score in scores.items():
                out[b, h, 0] += math.exp(score) / total * v[b, h // groups, r].double().cpu()
    return out


def made(batch: int, groups: int, key_heads: int, size: int, features: int, kind: str) -> tuple[Any, ...]:
    """Queries laid out as a projection makes them, caches, and a mask."""
    q = torch.randn(batch, 1, groups * key_heads, features, device=DEVICE).transpose(1, 2)
    k, v = (torch.randn(batch, key_heads, size, features, device=DEVICE) for _ in range(2))
    mask = None
    if kind.startswith("bool"):
        mask = torch.rand(batch, q.shape[1] if kind.endswith("head") else 1, 1, size, device=DEVICE) > 0.4
    if kind == "float":
        mask = torch.randn(1, q.shape[1], 1, size, device=DEVICE)
    return q, k, v, mask


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 150), st.sampled_from((5, 16, 24)),
    st.sampled_from(KINDS), st.one_of(st.none(), st.integers(0, 200)), st.booleans(),
)  # fmt: skip
def test_against_a_loop(
    batch: int, groups: int, key_heads: int, size: int, features: int, kind: str, place: int | None, shared: bool
) -> None:
    """In one share and in several; places before the last row, and in a later round."""
    q, k, v, mask = made(batch, groups, key_heads, size, features, kind)
    assert applies(q, k, v) is None
    at = None if place is None else torch.tensor([[place]], device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "SPLITS", 3 if shared else 1)
        found = decode_attention(q, k, v, mask=mask, place=at, scale=0.3)
    expected = looped(q, k, v, mask, place, 0.3)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reference(q, k, v, mask, at, 0.3).double().cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [17, pytest.param(71, marks=pytest.mark.thorough)])
def test_many_queries_of_a_key_head(groups: int) -> None:
    q, k, v, mask = made(1, groups, 1, 20, 16, "bool a head")
    assert applies(q, k, v) is None
    found = decode_attention(q, k, v, mask=mask, scale=0.3)
    torch.testing.assert_close(found.double().cpu(), looped(q, k, v, mask, None, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [40, 300])
def test_rows_that_are_not_seen_may_be_anything(size: int) -> None:
    q, k, v, mask = made(2, 2, 2, size, 16, "bool")
    place = torch.tensor([[size - 9]], device=DEVICE)
    expected = decode_attention(q, k, v, mask=mask, place=place)
    hidden = ~mask[:, 0, 0] | (torch.arange(size, device=DEVICE) > place)
    k, v = (x.masked_fill(hidden[:, None, :, None], float("nan")) for x in (k, v))
    assert torch.equal(decode_attention(q, k, v, mask=mask, place=place), expected)


def test_a_query_that_sees_nothing() -> None:
    q, k, v, _ = made(1, 2, 1, 300, 16, "none")
    mask = torch.zeros(1, 1, 1, 300, dtype=torch.bool, device=DEVICE)
    for each in (mask, torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, float("-inf"))):
        assert torch.equal(decode_attention(q, k, v, mask=each), torch.zeros_like(q))
        assert torch.equal(reference(q, k, v, each, None, 1.0), torch.zeros_like(q))


def test_the_lowest_number_everywhere() -> None:
    """As `scaled_dot_product_attention` has it: the mean of all values."""
    q, k, v, _ = made(1, 2, 1, 300, 16, "none")
    mask = torch.full((1, 1, 1, 300), torch.finfo(torch.float32).min, device=DEVICE)
    expected = v.mean(2, keepdim=True).expand(q.shape)
    torch.testing.assert_close(decode_attention(q, k, v, mask=mask), expected)


def test_runs_are_equal_and_masks_need_not_be_spread() -> None:
    q, k, v, mask = made(2, 2, 2, 300, 16, "float")
    first = decode_attention(q, k, v, mask=mask)
    assert torch.equal(decode_attention(q, k, v, mask=mask), first)
    assert torch.equal(decode_attention(q, k, v, mask=mask[0]), first)


def test_what_does_not_apply() -> None:
    q, k, v, _ = made(1, 2, 1, 8, 16, "none")
    assert attend(q, k, v) is not None
    assert attend(q.double(), k.double(), v.double()) is None
    assert attend(q.expand(-1, -1, 2, -1), k, v) is None  # two tokens
    assert attend(q, k[..., :8], v[..., :8]) is None
    assert "gradients" in str(applies(q.requires_grad_(), k, v))
    wide = torch.zeros(1, 600, 1, 16, device=DEVICE)
    assert "bytes" in str(applies(wide, k, v))


def test_shapes_that_do_not_fit() -> None:
    q, k, v, mask = made(1, 2, 1, 8, 16, "bool")
    for wrong in ({"mask": mask[..., :7]}, {"place": torch.tensor([3], device=DEVICE)}):
        with pytest.raises(InputError, match="do not fit together"):
            decode_attention(q, k, v, **wrong)
    for wrong in ((q.expand(-1, -1, 2, -1), k, v), (q[0], k, v), (q, k[:, :0], v[:, :0]), (q, k, v[:, :, :7])):
        with pytest.raises(InputError, match="one query a head"):
            decode_attention(*wrong)
    with pytest.raises(InputError, match="int64"):
        decode_attention(q, k, v, mask=mask.long())
    empty = [x[:0] for x in (q, k, v)]
    assert decode_attention(*empty).shape == (0, 2, 1, 16)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU: test_gpu_decode.py")
@pytest.mark.thorough  # test_few_rows.py has both kernels in a decoder
@pytest.mark.parametrize("recipe", ["identity", "stagger(window=3)", "stagger(shared=True)"])
@torch.no_grad()
def test_a_decoder(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attention to a cache is the kernel's, and the logits are those of the whole sequence."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    tokens = torch.randint(31, (2, 9))
    model = depthc.compile(LlamaForCausalLM(config).eval(), recipe, kwargs={"input_ids": tokens}).eval()
    for param in model.parameters():
        param.add_(0.05 * torch.randn_like(param))  # cross-attention starts at zero
    expected = model(input_ids=tokens).logits
    launched: list[Tensor] = []
    monkeypatch.setattr(op, "_like", lambda q, own=op._like: launched.append(q) or own(q))
    heads: list[int] = []
    monkeypatch.setattr(op, "tiles_of", lambda *sizes: heads.append(sizes[1]) or tiles.tiles_of(*sizes))
    decoder, plain = (depthc.Decoder(model, tokens[:, :4], 9, kernels=kernels) for kernels in (True, False))
    for at in range(4, 9):
        launched.clear()
        token = tokens[:, at : at + 1]
        found = decoder.step(token)
        wanted = {"identity": 4, "stagger(window=3)": 4 + 2, "stagger(shared=True)": 4 + 4}[recipe]
        assert len([q for q in launched if q.device.type != "meta" and not _is_fake(q)]) == wanted
        assert {*heads} == {2}  # they are not repeated for the queries
        launched.clear()
        torch.testing.assert_close(found, plain.step(token), rtol=1e-4, atol=1e-5)
        assert not launched
        torch.testing.assert_close(found, expected[:, at], rtol=1e-4, atol=1e-5)


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


AHEAD = [  # dtype, features, queries of a key head, mask
    *(("bf16", 128, 8, mask) for mask in (None, "*i1", "*bf16")),
    *(("bf16", features, heads, None) for features, heads in ((64, 1), (64, 71), (256, 16))),
    *(("fp32", features, 4, None) for features in (64, 128, 256)),
]


@pytest.mark.slow
def test_compiled_ahead() -> None:
    """No spills, 16-byte loads, and as little shared memory as GPUs of compute capability 8.6 have."""
    floats = {"acc": "*fp32", "top": "*fp32", "total": "*fp32", "scale": "fp32", "place": "*i64"}
    builds = []
    for dtype, features, heads, mask in AHEAD:
        torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        q, k = (torch.empty(1, n, 1, features, dtype=torch_dtype, device="meta") for n in (heads, 1))
        width = tiles.width_of(q)
        keys = tiles.tiles_of(64, 64, 4096, width * q.element_size()).keys
        types = floats | dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | ({"mask": mask} if mask else {})
        constants = {"ADDED": mask == "*bf16", "WHOLE": False, "PRECISION": "ieee", "D": features, "WIDTH": width}
        constants |= {"QUERIES": tiles.queries_of(q, k), "KEYS": keys} | ({} if mask else {"mask": None})
        one = {"module": MODULE, "types": types}
        options = tiles.options_of(features)
        builds.append({**one, "kernel": "share_kernel", "constants": constants, "options": options})
        constants = {"D": features, "WIDTH": width, "SPLITS": 32}
        builds.append({**one, "kernel": "sum_kernel", "constants": constants, "options": {}})
    for build, found in zip(builds, built(builds), strict=True):
        assert found["LOCAL"] == found["st.local"] == 0, build
        assert found["SHARED"] <= 99 * 1024, (build, found)
        if build["kernel"] == "share_kernel":
            assert found["cp.async.cg"] + found["ld.global.v4"] > 0, build
