"""The oracle of Mixture-of-Recursions is the models it stands for, and does what recipes.md says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import oracles
import pytest
import torch
from oracles import KINDS, Tied, Wide, expert
from oracles.expert import Result, Settings
from torch import Tensor

from .tiny import EVERY, FULL, PADDED, TOLERANCE, Toy, alone, changed_last, gap, math_, unpadded


@torch.no_grad()
def routed(kind: str, settings: Settings, inputs: Mapping[str, Tensor], real: Tensor) -> Result:
    return expert.route(math_(kind), settings, expert.make_routers(settings), inputs, real)


# routing, by hand


def toy(settings: Settings, x: Sequence[float], weights: Sequence[float], layers: int = 1) -> tuple[Result, Toy]:
    math = Toy(layers)
    routers = [{"weight": torch.tensor([[w]]).double()} for w in weights]
    state = torch.tensor([x]).double()
    return expert.route(math, settings, routers, {"x": state}, torch.ones_like(state).bool()), math


def gate(value: float, alpha: float = 0.1) -> float:
    return alpha / (1 + math.exp(-value))


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("off", 2.0), ("additive", 3.0), ("weighted", 1 + gate(3) * 2), ("delta", 1 + gate(3) * 1)],
)
def test_combine_by_hand(combine: str, expected: float) -> None:
    found, _ = toy(Settings(1, "cycle", combine=combine), [1.0], [3.0])
    assert found.logits.item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("kind", "s"), [("sigmoid", gate(3)), ("tanh", 0.1 * math.tanh(3)), ("none", 3.0)])
def test_gates_by_hand(kind: str, s: float) -> None:
    found, _ = toy(Settings(1, "cycle", gate=kind), [1.0], [3.0])
    assert found.logits.item() == pytest.approx(1 + 2 * s, abs=1e-15)


def test_two_recursions_by_hand() -> None:
    """Tokens 1, 2, 4; everyone in recursion 0, with outputs 2, 5, 11; in recursion 1 only the last, alone, 22."""
    found, _ = toy(Settings(2, "cycle", combine="off", capacities=(1, 0.5)), [1.0, 2.0, 4.0], [1.0, 1.0], 2)
    assert found.logits.flatten().tolist() == [2.0, 5.0, 22.0]
    assert [s.tolist() for s in found.selected] == [[[True] * 3], [[False, False, True]]]
    assert [z.tolist() for z in found.router_logits] == [[[1.0, 2.0, 4.0]], [[2.0, 5.0, 11.0]]]
    losses = [-math.log(gate(z, 1)) for z in (1, 2, 4)], [-math.log(gate(-z, 1)) for z in (2, 5, -11)]
    assert found.loss.item() == pytest.approx(0.001 * sum(sum(part) / 3 for part in losses), abs=1e-15)


def test_shared_keys_by_hand() -> None:
    """As above, but the last token reads recursion 0 of everyone, itself too: 11 + (1 + 2 + 4)."""
    settings = Settings(2, "cycle", combine="off", capacities=(1, 0.5), kv="share_first")
    found, math = toy(settings, [1.0, 2.0, 4.0], [1.0, 1.0], 2)
    assert found.logits.flatten().tolist() == [2.0, 5.0, 18.0]
    assert math.keys == [(0, 0), (0, 1), (0, 2)]


def test_threshold_by_hand() -> None:
    """Logits 1, -2, 4 then 2, _, 7: with capacity 1 all pass, below it the positive ones, who then see each other."""
    settings = Settings(2, "cycle", combine="off", causal=True)
    found, _ = toy(settings, [1.0, -2.0, 4.0], [-1.0, 1.0], 2)
    assert [s.tolist() for s in found.selected] == [[[True] * 3], [[True, False, True]]]
    assert found.logits.flatten().tolist() == [4.0, -3.0, 7 + 2 + 7]
    nested, _ = toy(
        Settings(2, "cycle", combine="off", causal=True, capacities=(0.9, 0.5)), [1.0, -2.0], [-1.0, 1.0], 2
    )
    assert nested.router_logits[1].isnan().tolist() == [[True, False]]
    assert [s.tolist() for s in nested.selected] == [[[False, True]], [[False, False]]]


@pytest.mark.parametrize(
    ("capacity", "tokens", "count"), [(1.0, 7, 7), (2 / 3, 3, 2), (1 / 3, 1, 1), (0.01, 9, 1), (0.5, 0, 0), (0.5, 7, 3)]
)
def test_counts_and_ties(capacity: float, tokens: int, count: int) -> None:
    logits = {2 * t: torch.tensor(0.5) for t in range(tokens)}
    chosen = expert.choose(Settings(1, capacities=(capacity,)), 0, logits, tokens)
    assert chosen == [2 * t for t in range(count)]


def test_a_logit_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a number"):
        expert.choose(Settings(), 0, {0: torch.tensor(torch.nan)}, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"capacities": (0.5, 0.6, 0.1)},
        {"capacities": (1.0, 0.5, 0.0)},
        {"capacities": (1.0,)},
        {"sharing": "sequence"},
        {"kv": "share_first", "capacities": (0.9, 0.5, 0.1)},
    ],
)
def test_settings_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Settings(**options)


# routing, on the models


@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_off_at_full_capacity_is_the_looped_model(kind: str, sharing: str) -> None:
    settings = Settings(2, sharing, combine="off", capacities=(1, 1), causal=sharing == "cycle")
    inputs = oracles.inputs_of(kind, PADDED)
    expected = oracles.looped(math_(kind), oracles.tie(math_(kind), sharing, 2), inputs, PADDED)
    assert torch.equal(routed(kind, settings, inputs, PADDED).logits[PADDED], expected[PADDED])


def test_one_loop_is_the_original() -> None:
    inputs = oracles.inputs_of("llama", FULL)
    found = routed("llama", Settings(1, "cycle", combine="off"), inputs, FULL)
    assert torch.equal(found.logits, oracles.unrouted(math_("llama"), inputs, FULL))


@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_tokens_are_selected_as_there_must_be(kind: str, router: str) -> None:
    settings = Settings(router=router)
    found = routed(kind, settings, oracles.inputs_of(kind, PADDED), PADDED)
    counts = PADDED.sum(1).tolist()
    candidates = PADDED
    for capacity, selected, logits in zip(settings.capacities, found.selected, found.router_logits, strict=True):
        assert selected.sum(1).tolist() == [max(1, int(capacity * n)) for n in counts]
        assert not (selected & ~candidates).any()
        assert torch.equal(~logits.isnan(), candidates)
        for b in range(len(counts)):
            left = candidates[b] & ~selected[b]
            assert not left.any() or logits[b][selected[b]].min() >= logits[b][left].max()
        candidates = selected
    assert found.logits.isfinite().all()


@pytest.mark.parametrize("kv", ["recursion", "share_first"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_changes_nothing_before_it_when_causal(kind: str, kv: str) -> None:
    settings = Settings(kv=kv, causal=True, gate="tanh" if kv == "recursion" else "none", combine="delta")
    counts = set()
    for seed in range(2):
        inputs = oracles.inputs_of(kind, FULL, seed)
        found, other = (routed(kind, settings, i, FULL) for i in (inputs, changed_last(kind, inputs)))
        assert gap(found.logits[:, :-1], other.logits[:, :-1]) < 1e-12
        assert gap(found.logits[:, -1], other.logits[:, -1]) > 1e-6
        for a, b in zip(found.selected, other.selected, strict=True):
            assert torch.equal(a[:, :-1], b[:, :-1])
        counts |= set(found.selected[1].sum(1).tolist())
    assert counts - {0, 7}, "the threshold decides nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_changes_an_earlier_one_by_ranking(kind: str) -> None:
    def moved(seed: int) -> bool:
        inputs = oracles.inputs_of(kind, FULL, seed)
        found, other = (routed(kind, Settings(combine="off"), i, FULL) for i in (inputs, changed_last(kind, inputs)))
        return gap(found.logits[:, :-1], other.logits[:, :-1]) > 1e-6

    assert any(moved(seed) for seed in range(10))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_a_padded_row_is_that_row_alone(kind: str, causal: bool) -> None:
    settings, inputs = Settings(causal=causal), oracles.inputs_of(kind, PADDED)
    with Wide():
        found = routed(kind, settings, inputs, PADDED)
        for b in unpadded(kind):
            real = PADDED[b]
            expected = routed(kind, settings, alone(kind, inputs, b, PADDED), real[None, real])
            assert gap(found.logits[b, real], expected.logits[0]) < TOLERANCE
            for ours, theirs in zip(found.selected, expected.selected, strict=True):
                assert torch.equal(ours[b, real], theirs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_tied_layer_and_router(kind: str) -> None:
    settings = Settings()
    routers = expert.make_routers(settings)
    tied: Tied = oracles.tie(math_(kind), settings.sharing, settings.loops)
    inputs = oracles.inputs_of(kind, PADDED)
    with Wide():
        found = expert.route(math_(kind), settings, routers, inputs, PADDED, tied=tied)
        loss = found.logits[PADDED].square().sum() + found.loss
    leaves = [p for slot in tied.slots for p in slot.parameters()] + [router["weight"] for router in routers]
    for grad in torch.autograd.grad(loss, leaves, allow_unused=kind == "moe"):
        assert grad is not None
        assert grad.abs().max() > 0
