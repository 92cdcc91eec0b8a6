"""The oracle of token-choice recursions is the models it stands for, and does what recipes.md says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import oracles
import pytest
import torch
from oracles import KINDS, Tied, Wide, token
from oracles.token import Result, Settings
from torch import Tensor

from .tiny import (
    DOCUMENTS,
    EVERY,
    FULL,
    PADDED,
    TOLERANCE,
    Toy,
    alone,
    changed_last,
    documents_gap,
    gap,
    math_,
    unpadded,
)

KV = ("recursion", "share_first", "update")


def towards(settings: Settings, d: int) -> Tensor:
    """A bias that sends every token to one depth."""
    return 100 * torch.eye(settings.loops, dtype=torch.float64)[d]


@torch.no_grad()
def routed(
    kind: str,
    settings: Settings,
    inputs: Mapping[str, Tensor],
    real: Tensor,
    documents: Tensor | None = None,
    **more: Any,
) -> Result:
    return token.route(math_(kind), settings, token.make_router_of(settings), inputs, real, documents, **more)


# by hand


def toy(
    settings: Settings, x: Sequence[float], weights: Sequence[float], layers: int = 2, **more: Any
) -> tuple[Result, Toy]:
    math_of_toy = Toy(layers)
    state = torch.tensor([x]).double()
    router = {"weight": torch.tensor([[w] for w in weights]).double()}
    return token.route(math_of_toy, settings, router, {"x": state}, torch.ones_like(state).bool(), **more), math_of_toy


def softmax(*logits: float) -> list[float]:
    return [math.exp(z) / sum(map(math.exp, logits)) for z in logits]


@pytest.mark.parametrize(
    ("kv", "expected", "keys"),
    [
        ("recursion", [2 + 2, -3, 7 + 2 + 7], [(0, 0), (0, 1), (0, 2), (0, 0), (0, 2)]),
        ("share_first", [2 + 1, -3, 7 + 1 - 2 + 4], [(0, 0), (0, 1), (0, 2)]),
        ("update", [2 + 2, -3, 7 + 2 - 2 + 7], [(0, 0), (0, 1), (0, 2), (0, 0), (0, 2)]),
    ],
)
def test_two_depths_by_hand(kv: str, expected: list[float], keys: list[tuple[int, int]]) -> None:
    """Tokens 1, -2, 4 are 2, -3, 7 after recursion 0, where the second one leaves."""
    found, seen = toy(Settings(2, "cycle", combine="off", kv=kv), [1.0, -2.0, 4.0], [0.0, 1.0])
    assert found.depths.tolist() == [[1, 0, 1]]
    assert [s.tolist() for s in found.selected] == [[[True] * 3], [[True, False, True]]]
    assert found.router_logits.tolist() == [[[0, 1], [0, -2], [0, 4]]]
    assert found.logits.flatten().tolist() == expected
    assert seen.keys == keys


@pytest.mark.parametrize(("gate", "share"), [("softmax", softmax(1, 3)[1]), ("sigmoid", 0.1 / (1 + math.exp(-3)))])
@pytest.mark.parametrize("combine", ["weighted", "additive", "delta", "off"])
def test_combine_by_hand(combine: str, gate: str, share: float) -> None:
    """Token 1 becomes 2 and then 4, without a gate; it is combined with what it was before recursion 0."""
    found, _ = toy(Settings(2, "cycle", combine=combine, gate=gate), [1.0], [1.0, 3.0])
    expected = {"weighted": 1 + share * 4, "additive": 1 + 4, "delta": 1 + share * 3, "off": 4}[combine]
    assert found.logits.item() == pytest.approx(expected, abs=1e-15)


def test_alpha() -> None:
    found, _ = toy(Settings(2, "cycle", alpha=0.5), [1.0], [0.0, 1.0])
    assert found.logits.item() == pytest.approx(1 + 0.5 * softmax(0, 1)[1] * 4, abs=1e-15)


def test_temperature() -> None:
    found, _ = toy(Settings(2, "cycle", temperature=2.0, combine="additive"), [3.0], [0.0, 1.0])
    assert found.router_logits.tolist() == [[[0, 1.5]]]
    assert found.logits.item() == 3 + 12


def test_losses_by_hand() -> None:
    found, _ = toy(Settings(2, "cycle", z=0.5), [1.0, -2.0, 4.0], [0.0, 1.0])
    assert found.counts.tolist() == [1, 2]
    least, most = (sum(softmax(0, x)[i] for x in (1, -2, 4)) / 3 for i in range(2))
    assert found.losses["balance"].item() == pytest.approx(0.1 * 2 * (1 / 3 * least + 2 / 3 * most), abs=1e-15)
    squares = [math.log(1 + math.exp(x)) ** 2 for x in (1, -2, 4)]
    assert found.losses["z"].item() == pytest.approx(0.5 * sum(squares) / 3, abs=1e-14)


def test_ties_go_to_the_lesser_depth() -> None:
    assert toy(Settings(3, "cycle"), [1.0], [0.0, 1.0, 1.0], 3)[0].depths.item() == 1


def test_a_bias_chooses_and_does_not_weigh() -> None:
    found, _ = toy(Settings(2, "cycle"), [1.0], [0.0, 1.0], bias=torch.tensor([1.0, 0.0]))
    assert found.depths.item() == 0
    assert found.logits.item() == pytest.approx(1 + softmax(0, 1)[0] * 2, abs=1e-15)
    balance = 0.1 * 2 * softmax(0, 1)[0]
    assert found.losses["balance"].item() == pytest.approx(balance, abs=1e-15)


def test_a_bias_moves_against_the_load() -> None:
    bias, settings = torch.tensor([0.5, 0.0, -0.5]).double(), Settings(bal_warmup=2)

    def change(counts: list[int], step: int = 2) -> list[float]:
        return (token.moved(settings, bias, torch.tensor(counts), step) - bias).tolist()

    assert change([1, 2, 6]) == pytest.approx([1e-3, 1e-3, -1e-3])
    assert change([1, 3, 5]) == pytest.approx([1e-3, 0, -1e-3])
    assert change([7, 7, 7]) == [0, 0, 0]
    assert change([0, 0, 9], step=1) == [0, 0, 0]


def test_warm_up_sends_everyone_through_all() -> None:
    settings, x = Settings(2, "cycle", combine="delta", bal_warmup=2), [1.0, -2.0, 4.0]
    depths = [toy(settings, x, [0.0, 1.0], step=t)[0].depths.tolist() for t in range(3)]
    assert depths == [[[1, 1, 1]], [[1, 1, 1]], [[1, 0, 1]]]
    found, _ = toy(settings, x, [0.0, 1.0], bias=torch.tensor([9.0, 0.0]))
    assert found.counts.tolist() == [0, 3]
    assert found.logits[0, 1].item() == pytest.approx(-2 + softmax(0, -2)[1] * (-3 + 2 - 3 + 2), abs=1e-14)


def test_a_logit_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a number"):
        toy(Settings(2, "cycle"), [math.nan], [1.0, 1.0])


@pytest.mark.parametrize("options", [{"sharing": "sequence"}, {"kv": "all"}])
def test_settings_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="routing over"):
        Settings(**options)


# on the models


@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_all_at_full_depth_without_a_gate_is_the_looped_model(kind: str, sharing: str) -> None:
    settings, inputs = Settings(2, sharing, combine="off"), oracles.inputs_of(kind, PADDED)
    expected = oracles.looped(math_(kind), oracles.tie(math_(kind), sharing, 2), inputs, PADDED)[PADDED]
    found = routed(kind, settings, inputs, PADDED, bias=towards(settings, 1))
    assert torch.equal(found.logits[PADDED], expected)
    assert torch.equal(found.depths, PADDED.long() * 2 - 1)
    updated = routed(kind, Settings(2, sharing, combine="off", kv="update"), inputs, PADDED, bias=towards(settings, 1))
    assert torch.equal(updated.logits[PADDED], expected)


@pytest.mark.parametrize("kv", KV)
@torch.no_grad()
def test_all_at_depth_zero_go_through_one_recursion(kv: str) -> None:
    settings, inputs = Settings(2, "cycle", combine="off", kv=kv), oracles.inputs_of("llama", PADDED)
    tied = oracles.tie(math_("llama"), "cycle", 2)
    expected = oracles.looped(math_("llama"), Tied(tied.slots, tied.order[:4]), inputs, PADDED)
    found = routed("llama", settings, inputs, PADDED, bias=towards(settings, 0))
    assert torch.equal(found.logits[PADDED], expected[PADDED])


@torch.no_grad()
def test_one_depth_is_the_original() -> None:
    """Softmax gives it the weight one, so that it is that with a gate as well."""
    inputs = oracles.inputs_of("llama", FULL)
    expected = oracles.unrouted(math_("llama"), inputs, FULL)
    assert torch.equal(routed("llama", Settings(1, "cycle", combine="off"), inputs, FULL).logits, expected)
    assert gap(routed("llama", Settings(1, "cycle", combine="delta"), inputs, FULL).logits, expected) < 1e-12


@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize("kind", EVERY)
def test_depths_are_the_largest_shares(kind: str, router: str) -> None:
    found = routed(kind, Settings(router=router, gate="sigmoid"), oracles.inputs_of(kind, PADDED), PADDED)
    assert torch.equal(found.depths[PADDED], found.router_logits[PADDED].argmax(-1))
    assert (found.depths[~PADDED] == -1).all()
    assert found.router_logits[~PADDED].isnan().all()
    assert found.counts.tolist() == [int((found.depths == d).sum()) for d in range(3)]
    assert len(found.depths[PADDED].unique()) > 1, "the router decides nothing"
    assert found.logits.isfinite().all()


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_changes_nothing_before_it(kind: str, kv: str) -> None:
    inputs = oracles.inputs_of(kind, FULL)
    found, other = (routed(kind, Settings(kv=kv), i, FULL) for i in (inputs, changed_last(kind, inputs)))
    assert gap(found.logits[:, :-1], other.logits[:, :-1]) < 1e-12
    assert gap(found.logits[:, -1], other.logits[:, -1]) > 1e-6
    assert torch.equal(found.depths[:, :-1], other.depths[:, :-1])
    assert len(found.depths[:, :-1].unique()) > 1, "the router decides nothing"


@pytest.mark.parametrize("kv", KV)
def test_keys_matter(kv: str) -> None:
    """The plans are not the same: what a test finds of one does not follow from another."""
    inputs = oracles.inputs_of("llama", FULL)
    found = {plan: routed("llama", Settings(kv=plan), inputs, FULL).logits for plan in KV}
    assert all(gap(found[kv], found[plan]) > 1e-6 for plan in KV if plan != kv)


@pytest.mark.parametrize("kv", ["recursion", "update"])
@pytest.mark.parametrize("kind", EVERY)
def test_a_padded_row_is_that_row_alone(kind: str, kv: str) -> None:
    settings, inputs = Settings(kv=kv), oracles.inputs_of(kind, PADDED)
    with Wide():
        found = routed(kind, settings, inputs, PADDED)
        for b in unpadded(kind):
            real = PADDED[b]
            expected = routed(kind, settings, alone(kind, inputs, b, PADDED), real[None, real])
            assert gap(found.logits[b, real], expected.logits[0]) < TOLERANCE
            assert torch.equal(found.depths[b, real], expected.depths[0])


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("kind", ["llama", "hybrid", *oracles.ENCODERS])
def test_packed_documents_are_those_documents_alone(kind: str, kv: str) -> None:
    settings, inputs = Settings(kv=kv), oracles.inputs_of(kind, FULL, documents=DOCUMENTS)
    assert documents_gap(kind, lambda *given: routed(kind, settings, *given).logits) < TOLERANCE
    with Wide():
        found, other = (routed(kind, settings, inputs, FULL, d).logits for d in (DOCUMENTS, None))
    assert gap(found, other) > 1e-3


@pytest.mark.parametrize("kind", EVERY)
def test_gradients_reach_every_tied_layer_and_router(kind: str) -> None:
    settings = Settings()
    router = token.make_router_of(settings)
    tied = oracles.tie(math_(kind), settings.sharing, settings.loops)
    with Wide():
        found = token.route(math_(kind), settings, router, oracles.inputs_of(kind, PADDED), PADDED, tied=tied)
    before, *inside = tied.slots
    leaves = [router["weight"], *before.parameters()]
    leaves += [p for slot in inside for p in slot.parameters()]
    unused = kind == "moe"  # experts that no token went to
    grads = torch.autograd.grad(found.logits[PADDED].square().sum(), leaves, retain_graph=True, allow_unused=unused)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)
    leaves = leaves[: 1 + len(list(before.parameters()))]  # the shares are taken behind the first layer
    grads = torch.autograd.grad(found.losses["balance"], leaves, allow_unused=unused)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)
