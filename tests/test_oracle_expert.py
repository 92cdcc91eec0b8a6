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
from oracles.routers import best
from oracles.rows import Row
from torch import Tensor

from .tiny import (
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


@torch.no_grad()
def routed(
    kind: str, settings: Settings, inputs: Mapping[str, Tensor], real: Tensor, documents: Tensor | None = None
) -> Result:
    routers, aux = (expert.make_routers(settings, seed) for seed in range(2))
    return expert.route(math_(kind), settings, routers, inputs, real, documents, aux=aux)


# routing, by hand


def toy(
    settings: Settings, x: Sequence[float], weights: Sequence[float], layers: int = 1, aux: Sequence = (), step: int = 0
) -> tuple[Result, Toy]:
    math = Toy(layers)
    routers, judges = ([{"weight": torch.tensor([[w]]).double()} for w in group] for group in (weights, aux))
    state = torch.tensor([x]).double()
    real = torch.ones_like(state).bool()
    return expert.route(math, settings, routers, {"x": state}, real, aux=judges, step=step), math


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


def test_updated_keys_by_hand() -> None:
    """As above, but the last token is read as it is now: 11 + (1 + 2 + 11)."""
    settings = Settings(2, "cycle", combine="off", capacities=(1, 0.5), kv="update")
    found, math = toy(settings, [1.0, 2.0, 4.0], [1.0, 1.0], 2)
    assert found.logits.flatten().tolist() == [2.0, 5.0, 25.0]
    assert math.keys == [(0, 0), (0, 1), (0, 2), (0, 2)]


LOGITS = (1, -2), (-2, 4)


@pytest.mark.parametrize(("causal", "expected"), [(False, [True, False]), (True, [False, True])])
def test_auxiliary_router_by_hand(causal: bool, expected: list[bool]) -> None:
    """Main logits 1 and -2, auxiliary -2 and 4: the main router ranks and gates, the other one decides when causal."""
    settings = Settings(1, "cycle", capacities=(0.5,), gate="none", combine="delta", aux=True, causal=causal, loss=0.5)
    found, _ = toy(settings, [1.0, -2.0], [1.0], aux=[-2.0])
    assert found.selected[0].tolist() == [expected]
    assert found.router_logits[0].tolist() == [[1.0, -2.0]]
    assert found.aux_logits[0].tolist() == [[-2.0, 4.0]]
    assert found.logits.flatten().tolist() == ([1 + 1 * 1, -2] if not causal else [1, -2 + -2 * -2])
    signs = [1 if chosen else -1 for chosen in expected]
    main, judge = (
        sum(-math.log(gate(s * z, 1)) for s, z in zip(signs, logits, strict=True)) / 2 for logits in ((1, -2), (-2, 4))
    )
    assert found.losses["membership"].item() == pytest.approx(0.5 * main, abs=1e-15)
    assert found.losses["aux"].item() == pytest.approx(judge, abs=1e-15)


def test_temperature_by_hand() -> None:
    """Of the router's input, for both routers; the state itself is as it was."""
    settings = Settings(1, "cycle", temperature=2.0, gate="none", aux=True)
    found, _ = toy(settings, [3.0], [1.0], aux=[-1.0])
    assert [found.router_logits[0].item(), found.aux_logits[0].item()] == [1.5, -1.5]
    assert found.logits.item() == 3 + 1.5 * 6


def test_z_loss_by_hand() -> None:
    found, _ = toy(Settings(2, "cycle", combine="off", capacities=(1, 0.5), z=0.1), [1.0, 2.0, 4.0], [1.0, 1.0], 2)
    assert found.losses["z"].item() == pytest.approx(0.1 * ((1 + 4 + 16) / 3 + (4 + 25 + 121) / 3), abs=1e-12)


def test_warm_up_is_of_the_ranking() -> None:
    """From everyone to the capacities within four steps; in causal use these hold from the start."""
    options: dict[str, Any] = {"capacities": (1, 0.25), "warmup": 4, "combine": "off"}
    x = [1.0, 2, 3, 4, 5, 6, 7, 8]
    counts = [
        [int(s.sum()) for s in toy(Settings(2, "cycle", **options), x, [1.0, 1.0], 2, step=t)[0].selected]
        for t in range(6)
    ]
    assert counts == [[8, n] for n in (8, 7, 5, 2, 2, 2)]  # 1, 0.89, 0.625, 0.36, 0.25, 0.25 of 8
    causal, _ = toy(Settings(2, "cycle", causal=True, **options), x, [1.0, -1.0], 2)
    assert not causal.selected[1].any()


def test_the_best_of_each_document() -> None:
    """Documents of 1, 2, 5 and 0 real tokens; of the candidates there may be fewer than the share of a document."""
    documents = [0, 1, 1, 2, 2, 2, 2, 2, 3]
    row = Row(Toy(1), [True] * 8 + [False], documents)
    logits = {t: torch.tensor(float(t)) for t in range(8)}
    assert best(row, "document", 0.5, logits) == [0, 2, 6, 7]
    assert best(row, "row", 0.5, logits) == [4, 5, 6, 7]
    assert best(row, "document", 0.5, {t: logits[t] for t in (1, 3)}) == [1, 3]
    assert best(Row(Toy(1), [False] * 9, documents), "row", 0.5, {}) == []


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
    row = Row(Toy(1), [t % 2 == 0 and t < 2 * tokens for t in range(20)], [0] * 20)
    chosen = best(row, "row", capacity, {2 * t: torch.tensor(0.5) for t in range(tokens)})
    assert chosen == [2 * t for t in range(count)]


def test_a_logit_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="logit of recursion 0 is not a number"):
        toy(Settings(1, "cycle"), [math.nan], [1.0])


@pytest.mark.parametrize(
    "options",
    [
        {"capacities": (0.5, 0.6, 0.1)},
        {"capacities": (1.0, 0.5, 0.0)},
        {"capacities": (1.0,)},
        {"sharing": "sequence"},
        {"kv": "share_first", "capacities": (0.9, 0.5, 0.1)},
        {"kv": "update", "capacities": (0.9, 0.5, 0.1)},
        {"kv": "all"},
        {"per": "batch"},
    ],
)
def test_settings_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Settings(**options)


# routing, on the models


@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
@pytest.mark.parametrize("kind", EVERY)
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
@pytest.mark.parametrize("kind", EVERY)
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


@pytest.mark.parametrize("kv", ["recursion", "share_first", "update"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_changes_nothing_before_it_when_causal(kind: str, kv: str) -> None:
    settings = Settings(
        kv=kv, causal=True, aux=kv == "update", gate="tanh" if kv == "recursion" else "none", combine="delta"
    )
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


@pytest.mark.parametrize("kind", EVERY)
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


@pytest.mark.parametrize("kind", EVERY)
def test_keys_are_updated_to_those_of_the_recursion_where_all_are_active(kind: str) -> None:
    inputs, found = oracles.inputs_of(kind, PADDED), {}
    for kv in ("recursion", "update", "share_first"):
        found[kv] = routed(kind, Settings(kv=kv, capacities=(1, 1, 1)), inputs, PADDED).logits[PADDED]
    assert torch.equal(found["update"], found["recursion"])
    assert gap(found["update"], found["share_first"]) > 1e-6


@pytest.mark.parametrize("kind", ["llama", "hybrid", *oracles.ENCODERS])
@pytest.mark.parametrize("kv", ["recursion", "update"])
def test_packed_documents_are_those_documents_alone(kind: str, kv: str) -> None:
    """When they choose apart, or by threshold; where the best of the row go on, one takes places of another."""
    options: list[dict[str, Any]] = [{"per": "document"}, {"causal": True}, {"per": "row"}]
    forms = [Settings(kv=kv, combine="delta", **own) for own in options]
    gaps = [documents_gap(kind, lambda *given, own=own: routed(kind, own, *given).logits) for own in forms]
    assert [found < TOLERANCE for found in gaps] == [True, True, False]


def test_the_auxiliary_router_leaves_the_model_alone() -> None:
    """Its loss reaches nothing but itself, and nothing else reaches it; without it the model is the same."""
    settings = Settings(aux=True)
    routers, aux = (expert.make_routers(settings, seed) for seed in range(2))
    inputs = oracles.inputs_of("llama", PADDED)
    found = expert.route(math_("llama"), settings, routers, inputs, PADDED, aux=aux)
    leaves = [*(p for slot in math_("llama").layers for p in slot.parameters()), *(r["weight"] for r in routers)]
    own = [router["weight"] for router in aux]
    grads = torch.autograd.grad(found.losses["aux"], own + leaves, retain_graph=True, allow_unused=True)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads[: len(own)])
    assert all(grad is None for grad in grads[len(own) :])
    rest = found.logits.sum() + found.losses["membership"] + found.losses["z"]
    assert all(grad is None for grad in torch.autograd.grad(rest, own, allow_unused=True))
    without = expert.route(math_("llama"), Settings(), routers, inputs, PADDED)
    assert torch.equal(found.logits, without.logits)
    assert without.aux_logits == []
