"""Masks and positions: what a program's layers read, told from what they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depthc
from depthc.ir.masks.factors import Factor, explain, fit, product
from depthc.ir.masks.masks import Mask, masks_of
from depthc.ir.masks.positions import positions_of
from depthc.ir.program import Program

WIDTH, HEADS, LENGTH = 16, 2, 17
MaskFunction = Callable[..., Any]


def places(x: Tensor) -> tuple[Tensor, Tensor]:
    """Places of queries (rows) and keys (columns)."""
    place = torch.arange(x.shape[1])
    return place[:, None], place[None, :]


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    if mask == "is_causal":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / 3 + mask, -1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax((q @ k.transpose(-1, -2)).masked_fill(~mask, -1e9), -1) @ v


def masked_late(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The softmax sees all keys."""
    return (torch.softmax(q @ k.transpose(-1, -2), -1) * mask) @ v


def scaled_by_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The weights are of the allowed keys, a factor on the result of all."""
    scores = q @ k.transpose(-1, -2)
    weights = torch.softmax(scores.masked_fill(~mask, -1e9), -1)
    return weights @ v * torch.sigmoid(scores.logsumexp(-1, keepdim=True))


def summed_by_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.exp(q @ k.transpose(-1, -2))
    return (weights * mask) @ v / weights.sum(-1, keepdim=True)


class Layer(nn.Module):
    """A pre-norm attention layer; `own` makes a mask inside the layer."""

    def __init__(self, attend: Callable[..., Tensor], own: MaskFunction | None = None) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attend, self.own = attend, own

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        b, s, _ = x.shape
        mask = self.own(x) if self.own else mask
        q, k, v = (p.view(b, s, HEADS, -1).transpose(1, 2) for p in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(self.attend(q, k, v, mask).transpose(1, 2).reshape(b, s, WIDTH))


class Model(nn.Module):
    """One layer a mask, all of one structure; the masks come from the tokens' count, and maybe from an argument."""

    def __init__(self, masks: Sequence[MaskFunction], attend: Callable[..., Tensor] = fused) -> None:
        super().__init__()
        self.masks = masks
        self.layers = nn.ModuleList(Layer(attend) for _ in masks)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        x = 2 * x
        for layer, mask in zip(self.layers, self.masks, strict=True):
            x = layer(x, mask(x) if extra is None else mask(x, extra))
        return x


def texts(program: Program) -> list[str]:
    """The masks of all calls, in execution order."""
    return [", ".join(map(str, masks)) for masks in masks_of(program).values()]


def found(masks: Sequence[MaskFunction], *extra: Tensor, attend: Callable[..., Tensor] = fused) -> list[str]:
    return texts(depthc.capture(Model(masks, attend).eval(), (torch.randn(3, LENGTH, WIDTH), *extra)))


def causal(x: Tensor, *_: Tensor) -> Tensor:
    i, j = places(x)
    return j <= i


def ahead(x: Tensor) -> Tensor:
    i, j = places(x)
    return j - i


def chunked(x: Tensor) -> Tensor:
    i, j = places(x)
    return (j <= i) & (i // 16 == j // 16)


def alibi(x: Tensor, *_: Tensor) -> Tensor:
    slopes = 0.5 ** torch.arange(1, 3).reshape(2, 1, 1)
    return slopes * ahead(x)


BOOL_MASKS: dict[str, MaskFunction] = {
    "causal": causal,
    "causal & window(8)": lambda x: causal(x) & (ahead(x) > -8),
    "causal & window(4096)": lambda x: causal(x) & (ahead(x) > -4096),
    "tensor": lambda x: causal(x) & (ahead(x) > -9000),  # more tokens than are looked at
    "full": lambda x: ahead(x) < x.shape[1],
    "band(4)": lambda x: ahead(x).abs() <= 4,
    "window(-2, 7)": lambda x: (ahead(x) >= -2) & (ahead(x) <= 7),
    "window(inf, 1)": lambda x: ahead(x) <= 1,
    "window(inf, -1)": lambda x: ahead(x) < 0,
    "causal & chunk(16)": chunked,
    "tensor ": lambda x: (ahead(x) % 3 == 0) & causal(x),
}


@pytest.mark.parametrize("attend", [masked_late, scaled_by_all, summed_by_all])
def test_every_op_over_the_keys_is_asked(attend: Callable[..., Tensor]) -> None:
    """What reads later keys is not causal, though the weights are zero there."""
    assert found([causal, causal], attend=attend) == ["full"] * 2


@pytest.mark.slow
def test_masks_of_sizes_alone() -> None:
    assert found([*BOOL_MASKS.values()]) == [name.strip() for name in BOOL_MASKS]


ADDED_MASKS: dict[str, MaskFunction] = {
    "causal & keys(extra)": lambda x, e: (
        (1.0 - e[:, None, None, :].float()) * -10000.0 + torch.where(causal(x), 0.0, -3.4e38)
    ).expand(x.shape[0], 2, -1, -1),
    "causal + bias": lambda x, e: (alibi(x) + (1.0 - causal(x).float()) * -10000.0).expand(x.shape[0], 2, -1, -1),
}


@pytest.mark.slow
def test_masks_that_are_added() -> None:
    extra = torch.ones(3, LENGTH, dtype=torch.long)
    assert found([*ADDED_MASKS.values()] * 2, extra, attend=added) == [*ADDED_MASKS] * 2


def same(extra: Tensor) -> Tensor:
    return extra[:, None, :] == extra[:, :, None]


DATA: dict[str, MaskFunction] = {
    "causal & keys(extra)": lambda x, e: causal(x) & e[:, None, :].bool(),
    "keys(extra)": lambda x, e: (e != 5)[:, None, :].expand(-1, x.shape[1], -1),  # a padding id
    "keys(extra) & queries(extra)": lambda x, e: e.bool()[:, None, :] & e.bool()[:, :, None],
    "document(extra)": lambda x, e: same(e),
    "causal & document(extra)": lambda x, e: same(e) & causal(x),
    "document(extra) & keys(extra)": lambda x, e: same(e) & (e != 0)[:, None],
    "tensor(extra)": lambda x, e: causal(x) | e[:, None, :].bool(),  # a prefix that all may read
}


@pytest.mark.slow
def test_masks_of_an_argument() -> None:
    extra = torch.ones(3, LENGTH, dtype=torch.long)
    masks = [lambda x, e, m=mask: m(x, e)[:, None] for mask in DATA.values()]
    assert found(masks, extra, attend=filled) == [*DATA]


def test_lengths_switch_keys_off() -> None:
    masks = [lambda x, e: (places(x)[1] < e[:, None, None])[:, None].expand(-1, -1, x.shape[1], -1)] * 2
    assert found(masks, torch.tensor([17, 5, 9])) == ["keys(extra)"] * 2


def test_a_mask_that_is_handed_through() -> None:
    given = torch.ones(3, 1, LENGTH, LENGTH).tril().bool()
    assert found([lambda x, e: e] * 2, given) == ["tensor(extra)"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "attend", "expected"),
    [
        (lambda x: "is_causal", fused, "causal"),
        (lambda x: None, fused, "full"),
        (lambda x: torch.ones(x.shape[1], x.shape[1]).tril().bool(), filled, "causal"),
    ],
)
def test_masks_made_inside_a_layer(own: MaskFunction, attend: Callable[..., Tensor], expected: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *[Layer(attend, own) for _ in range(2)])
    assert texts(depthc.capture(model.eval(), (torch.randn(3, LENGTH, WIDTH),))) == [expected] * 2


def test_a_mask_of_hidden_states_is_never_folded() -> None:
    masks = [lambda x: (x[:, None, None, :, 0] > -2).expand(-1, 1, x.shape[1], -1)] * 2
    assert all("causal" not in text and text != "full" for text in found(masks))


def test_causality() -> None:
    assert Mask((Factor("causal"), Factor("window", (8,)))).causal
    assert Mask((Factor("span", (None, -1)),)).causal
    assert not Mask((Factor("span", (None, 1)),)).causal
    assert not Mask((Factor("tensor", ("mask",)),)).causal
    assert not Mask().causal


@pytest.mark.parametrize("factors", [
    (), (Factor("causal"),), (Factor("causal"), Factor("window", (3,))), (Factor("band", (2,)),),
    (Factor("span", (-4, 1)),), (Factor("chunk", (5,)),), (Factor("causal"), Factor("chunk", (5,))),
    (Factor("causal"), Factor("window", (3,)), Factor("chunk", (7,))),
])  # fmt: skip
def test_fit_finds_what_was_multiplied(factors: tuple[Factor, ...]) -> None:
    assert fit(product(factors, 41, 41)) == factors


def test_fit_takes_no_random_relation() -> None:
    assert fit(torch.rand(20, 20) > 0.5) is None


def test_explain_needs_all_trials() -> None:
    base = torch.ones(6, 6, dtype=torch.bool)
    values = torch.tensor([1, 1, 0, 1, 0, 1])
    keys = base & (values == 1)
    assert explain("m", base, [(values, keys)]) == (Factor("keys", ("m",)),)
    assert explain("m", base, [(values, keys), (values, keys.T)]) is None


def test_explain_lets_a_query_whose_keys_are_all_off_read_them_alike() -> None:
    base = product((Factor("causal"),), 6, 6)
    values = torch.tensor([0, 0, 1, 1, 1, 1])
    relative = base & (values == 1)
    relative[:2] = base[:2]  # what adding -10000 does where padding is on the left
    assert explain("m", base, [(values, relative)]) == (Factor("keys", ("m",)),)


def transformers_model(family: str, **options: Any) -> nn.Module:
    import transformers

    shared = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
    shared |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = getattr(transformers, family.replace("Model", "Config"))(**(shared | options))
    return getattr(transformers, family)(config).eval()


tokens = torch.arange(3, 30).reshape(3, 9)


@pytest.mark.slow
def test_mistral_has_a_window_and_padding() -> None:
    padding = torch.ones_like(tokens)
    padding[0, :3] = 0
    program = depthc.capture(
        transformers_model("MistralModel", sliding_window=8), (), {"input_ids": tokens, "attention_mask": padding}
    )
    assert texts(program) == ["causal & window(8) & keys(attention_mask)"] * 2
    assert {(p.size, p.start) for p in positions_of(program)} == {("s", 0)}


@pytest.mark.slow
def test_packed_llama_has_documents() -> None:
    place = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(3, -1).clone()
    program = depthc.capture(transformers_model("LlamaModel"), (), {"input_ids": tokens, "position_ids": place})
    assert texts(program) == ["causal & document(position_ids)"] * 2


@pytest.mark.slow
@pytest.mark.slow
def test_t5_has_biases_and_a_cross_port() -> None:
    model = transformers_model("T5Model", d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2).to("meta")
    program = depthc.capture(model, (), {"input_ids": tokens, "decoder_input_ids": tokens[:, :7]})
    assert texts(program) == ["full + bias"] * 2 + ["causal + bias, full"] * 2


class Stored(Model):
    """Positions come out of a buffer."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__([causal, causal])
        self.register_buffer("table", torch.arange(64)[None])
        self.embed = nn.Embedding(70, WIDTH)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        return super().forward(x + self.embed(self.table[:, : x.shape[1]] + 2))


def test_positions_are_found_by_value() -> None:
    positions = positions_of(depthc.capture(Stored().eval(), (torch.randn(3, LENGTH, WIDTH),)))
    assert {(p.size, p.start) for p in positions} == {("s", 0)}
    assert any(p.dim == 1 for p in positions)  # the slice of the buffer; the others are the mask's
