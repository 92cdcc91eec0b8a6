"""Packed rows: a block on the members of all batch rows, one behind the other, equals the block on padded rows."""

from typing import Any

import pytest
import torch
from blocks import LEGAL, legal_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Wide
from test_causal import NOT_QUITE, Masked, behind
from test_rows import ONE_PORT, close, plans, rows_of
from torch import Tensor, nn
from traced import BATCH, LENGTH, WIDTH, Case, draw, inputs

import depthc
from depthc.codegen.rows import _MEMBERS, _ROWS
from depthc.ir.axes.ports import ports_of
from depthc.ir.evaluate import run
from depthc.ir.rows import varlen
from depthc.ir.rows.packing import packable
from depthc.ir.tokens import TokenSet

from .models import WIDTH as MODEL_WIDTH
from .models import Layer, Spec, seeded, states
from .test_tokenchoice import Case as Routed
from .test_tokenchoice import agree

PADDED = ("conditioned", "memory_keys", "memory_keys_by_hand")  # read something that has a row a sequence
PACKABLE = [name for name in LEGAL if name not in PADDED]
COUNTS = (3, 0, 5)


def ragged(counts: tuple[int, ...] = COUNTS, length: int = LENGTH, seed: int = 0) -> TokenSet:
    """A set with so many members in every batch row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(counts), length, dtype=torch.bool)
    for row, count in zip(mask, counts, strict=True):
        row[torch.randperm(length, generator=generator)[:count]] = True
    return TokenSet(mask)


def padded(tokens: TokenSet, **options: object) -> dict[str, object]:
    return {"positions": tokens.positions, "valid": tokens.valid, "ordered": True, **options}


def both(case: Case, tokens: TokenSet, h: Tensor, feeds: dict[str, Tensor], **options: object) -> tuple:
    """Results on packed rows and the members among those on padded rows, with the caches of each."""
    found, kept = rows_of(case, tokens.pack(h), feeds, slots=tokens.slots, **padded(tokens, **options))
    wide, expected = rows_of(case, tokens.take(h), feeds, **padded(tokens, **options))
    return found[0], wide[tokens.valid], kept, expected


@pytest.mark.slow
def test_what_is_read_by_the_sequence_cannot_be_packed() -> None:
    assert [name for name, case in legal_cases().items() if packable(case.block)] == [
        name for name in legal_cases() if name not in PADDED
    ]


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("counts", [COUNTS, (0, 0, 1), (LENGTH,) * BATCH])
def test_packed_rows_are_padded_ones(name: str, counts: tuple[int, ...]) -> None:
    case, feeds = legal_cases()[name], inputs()
    h, tokens = feeds.pop("h"), ragged(counts)
    found, wanted, kept, expected = both(case, tokens, h, feeds, kv=plans(case, "store"))
    assert found.shape == (sum(counts), WIDTH)
    close(found, wanted)
    for port, new, old in zip(ports_of(case.block), kept, expected, strict=True):
        for a, b in zip(new, old, strict=True):
            assert a.shape == b.shape
            if port.cross:
                close(a, b)


@pytest.mark.parametrize("name", [name for name in ONE_PORT if name in PACKABLE])
@pytest.mark.parametrize("mode", ["read", "update"])
def test_keys_of_other_passes(name: str, mode: str) -> None:
    """Also those that later passes find in the cache."""
    case, feeds = legal_cases()[name], inputs()
    h, tokens = feeds.pop("h"), ragged()
    _, caches = rows_of(case, h, feeds, kv=plans(case, "store"))
    changed = h + draw(BATCH, LENGTH, WIDTH, seed=7)
    found, wanted, kept, expected = both(case, tokens, changed, feeds, kv=plans(case, mode), caches=caches)
    close(found, wanted)
    for new, old in zip(kept, expected, strict=True):
        for a, b in zip(new, old, strict=True):
            close(a, b)


@pytest.mark.parametrize("name", PACKABLE)
def test_gradients(name: str) -> None:
    case, feeds = legal_cases()[name], inputs()
    h, tokens = feeds.pop("h").requires_grad_(), ragged()
    for weight in case.params:
        weight.requires_grad_()
    found, wanted, *_ = both(case, tokens, h, feeds)
    leaves, weight = [h, *(p for p in case.params if p.is_floating_point())], draw(*wanted.shape, seed=9)
    got, expected = (torch.autograd.grad((x * weight).sum(), leaves, allow_unused=True) for x in (found, wanted))
    for a, b in zip(got, expected, strict=True):
        close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)


@settings(max_examples=25)
@given(
    name=st.sampled_from(PACKABLE),
    length=st.integers(1, 9),
    batch=st.integers(2, 4),
    data=st.data(),
)
def test_any_set(name: str, length: int, batch: int, data: st.DataObject) -> None:
    case, feeds = legal_cases()[name], inputs(batch, length)
    counts = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch).filter(any))
    h, tokens = feeds.pop("h"), ragged(tuple(counts), length, data.draw(st.integers(0, 99)))
    found, wanted, *_ = both(case, tokens, h, feeds)
    close(found, wanted)
    assert torch.equal(tokens.unpack(h, tokens.pack(-h)), torch.where(tokens.mask.unsqueeze(-1), -h, h))


# The library's kernel, which runs on CUDA alone: here with masked attention among all rows in its place.


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_of_keys: Tensor, *most: int, **options: Any
) -> Tensor:
    """Attention of every sequence to itself; queries, keys and values are [rows, heads, features]."""
    assert ends is ends_of_keys
    assert ends.dtype == torch.int32
    assert most[0] is most[1]
    at = torch.arange(q.shape[0])
    owner = torch.searchsorted(ends, at, right=True)
    allowed = owner[:, None] == owner[None]
    if options["window_size"] == (-1, 0):
        allowed = allowed & (at[:, None] >= at[None])
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*rows, allowed, scale=options["scale"])
    return out[0].transpose(0, 1)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the kernel's place be taken on any device; the number of rows of every call of it."""
    calls: list[int] = []

    def attend(q: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append(q.shape[0])
        return masked_attention(q, *rest, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend)
    monkeypatch.setattr(varlen, "available", lambda device: True)
    monkeypatch.setattr(varlen, "runs", lambda *rows: True)
    return calls


def test_causal_attention_takes_the_kernel(kernel: list[int]) -> None:
    case, feeds = legal_cases()["causal_flag"], inputs()
    h, tokens = feeds.pop("h"), ragged()
    found, wanted, *_ = both(case, tokens, h, feeds)
    close(found, wanted)
    assert kernel == [sum(COUNTS)]


@pytest.mark.parametrize("name", [name for name in PACKABLE if name != "causal_flag"])
def test_what_the_kernel_cannot_express(name: str, kernel: list[int]) -> None:
    """Masks and biases, keys of others, products by hand, heads that attend to each other."""
    case, feeds = legal_cases()[name], inputs()
    h, tokens = feeds.pop("h"), ragged()
    found, wanted, *_ = both(case, tokens, h, feeds)
    close(found, wanted)
    assert kernel == []


def test_keys_of_another_pass_do_not_take_the_kernel(kernel: list[int]) -> None:
    case, feeds = legal_cases()["causal_flag"], inputs()
    h, tokens = feeds.pop("h"), ragged()
    _, caches = rows_of(case, h, feeds, kv=plans(case, "store"))
    found, wanted, *_ = both(case, tokens, h, feeds, kv=plans(case, "read"), caches=caches)
    close(found, wanted)
    assert kernel == []


@pytest.mark.slow
def test_token_choice_by_the_kernel(kernel: list[int]) -> None:
    """Forward and gradients are the oracle's, though the model makes a mask of its own; grouped queries share keys."""
    case = Routed("llama", "full", bias=torch.tensor([0.0, 0.1, 0.0], dtype=torch.float64))
    agree(case)
    assert kernel  # of what was traced
    kernel.clear()
    with Wide():
        run(case.compiled.program, (), case.inputs)
    chosen = [int(route.chosen.sum()) for route in case.found()[1].routes]
    assert kernel == [rows for rows in chosen[1:] if rows for _ in range(2)]  # the first recursion has no set to pack
    assert 0 == chosen[2] < chosen[1] < chosen[0] == case.real.numel()


@pytest.mark.slow
def test_padding_is_a_mask_that_the_kernel_does_not_know(kernel: list[int]) -> None:
    agree(Routed("llama", "padded"))
    assert kernel == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "taken"), [("a window in a tensor", False), ("a small bias", False), ("", True)])
def test_masks_that_are_not_shown_to_be_causality_alone(name: str, taken: bool, kernel: list[int]) -> None:
    """At any length that is tried they look so."""
    torch.manual_seed(0)
    x, make = torch.randn(2, 9, 8), NOT_QUITE.get(name, lambda layer, b, t: behind(t) >= 0)
    model = nn.Sequential(*[Masked(make, 0) for _ in range(5)])
    module = depthc.compile(model, "mor_token", args=(x,), std=1.0).eval()
    torch.testing.assert_close(module(x), run(module.program, (x,), {}))
    assert bool(kernel) == taken


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [_ROWS, _MEMBERS])
def test_a_fixed_number_of_tokens_is_not_taken_for_one_of_rows(tokens: int) -> None:
    """Blocks on rows are traced at sizes of their own; an image model has as many patches as its table has rows."""
    model = seeded(lambda: Patches(tokens)).double()
    keep = torch.ones(3, tokens, dtype=torch.bool)
    for recipe in ("mor_token", "mor"):
        module = depthc.compile(model, recipe, args=(states(3, tokens, dtype=torch.float64), keep), std=1.0).eval()
        for seed in range(2):  # other numbers of rows
            x = states(3, tokens, dtype=torch.float64, seed=seed)
            assert torch.equal(module(x, keep), run(module.program, (x, keep), {}))


class Patches(nn.Module):
    """Layers on a fixed number of tokens with learned positions."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, tokens, MODEL_WIDTH))
        self.layers = nn.ModuleList(Layer(Spec(attention=("masked",)), i) for i in range(5))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        h = x + self.positions
        mask = keep[:, None, None].expand(-1, 1, x.shape[1], -1)
        for layer in self.layers:
            h = layer(h, mask)
        return h
