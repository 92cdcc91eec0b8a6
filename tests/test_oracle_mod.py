"""The oracle of Mixture-of-Depths is the models it stands for, and does what recipes.md says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import oracles
import pytest
import torch
from oracles import KINDS, Wide, mod
from oracles.mod import Result, Settings
from oracles.routers import warmed
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
    model,
    unpadded,
)

HALF = mod.odd(8, 0.5)


@torch.no_grad()
def routed(
    kind: str, settings: Settings, inputs: Mapping[str, Tensor], real: Tensor, documents: Tensor | None = None
) -> Result:
    predictors = mod.make_routers(settings, "predictor", seed=1) if settings.predictor else ()
    return mod.route(math_(kind), settings, mod.make_routers(settings), inputs, real, documents, predictors)


# by hand


def toy(
    settings: Settings, x: Sequence[float], scorers: Sequence[mod.Scorer], predictors: Sequence = (), step: int = 0
) -> tuple[Result, Toy]:
    math_of_toy = Toy(len(settings.capacities))
    state = torch.tensor([x]).double()
    real = torch.ones_like(state).bool()
    return mod.route(math_of_toy, settings, scorers, {"x": state}, real, None, predictors, step), math_of_toy


def weight(value: float) -> dict[str, Tensor]:
    return {"weight": torch.tensor([[value]]).double().requires_grad_()}


def cross_entropy(logit: float, chosen: bool) -> float:
    return math.log1p(math.exp(-logit if chosen else logit))


@pytest.mark.parametrize(("f", "expected"), [("delta", 11 + 11 * 12), ("block", 11 + 11 * 23), ("off", 23)])
def test_one_routed_layer_by_hand(f: str, expected: float) -> None:
    """Tokens 1, 2, 4 are 2, 5, 11 after layer 0; the last alone goes through layer 1, which makes it 11 + 1 + 11."""
    found, seen = toy(Settings((None, 0.5), f=f, loss=0.5, z=0.25), [1.0, 2.0, 4.0], [weight(1.0)])
    assert found.logits.flatten().tolist() == [2, 5, expected]
    assert found.selected[0].tolist() == [[False, False, True]]
    assert found.router_logits[0].tolist() == [[2, 5, 11]]
    assert seen.keys == [(0, 0), (0, 1), (0, 2), (1, 2)]
    bce = [cross_entropy(2, False), cross_entropy(5, False), cross_entropy(11, True)]
    assert found.losses["membership"].item() == pytest.approx(0.5 * sum(bce) / 3, abs=1e-15)
    assert found.losses["z"].item() == pytest.approx(0.25 * (4 + 25 + 121) / 3, abs=1e-12)
    assert found.losses["predictor"].item() == 0


def test_losses_are_summed_over_layers() -> None:
    """Tokens 1, 2: the second one is taken by both layers, as 2 and as 4; the predictor says the contrary of each."""
    settings = Settings((0.5, 0.5), f="off", loss=0.5, z=0.25, predictor=True)
    found, _ = toy(settings, [1.0, 2.0], [weight(1.0)] * 2, [weight(-1.0)] * 2)
    assert found.logits.flatten().tolist() == [1, 9]
    pairs = [(1, 2), (1, 4)]
    bce = [cross_entropy(a, False) + cross_entropy(b, True) for a, b in pairs]
    assert found.losses["membership"].item() == pytest.approx(0.5 * sum(bce) / 2, abs=1e-15)
    bce = [cross_entropy(-a, False) + cross_entropy(-b, True) for a, b in pairs]
    assert found.losses["predictor"].item() == pytest.approx(sum(bce) / 2, abs=1e-15)
    assert found.losses["z"].item() == pytest.approx(0.25 * (1 + 4 + 1 + 16) / 2, abs=1e-15)
    assert found.loss == found.losses["membership"] + found.losses["predictor"] + found.losses["z"]


@pytest.mark.parametrize(("nested", "second"), [(False, [False, True]), (True, [True, False])])
def test_layers_choose_apart_unless_nested(nested: bool, second: list[bool]) -> None:
    scores = [torch.tensor([row]).double() for row in ([2.0, 1.0], [1.0, 2.0])]
    found, _ = toy(Settings((0.5, 0.5), f="off", nested=nested), [1.0, 1.0], scores)
    assert [s.tolist() for s in found.selected] == [[[True, False]], [second]]
    assert found.router_logits[1].isnan().tolist() == [[False, nested]]
    assert found.losses["membership"] == 0  # of given scores


def test_a_function_of_the_state_ranks() -> None:
    found, _ = toy(Settings((0.5,), f="off"), [-3.0, 1.0, 2.0, -2.5], [lambda x: x.norm()])
    assert found.selected[0].tolist() == [[True, False, False, True]]


def test_threshold_and_predictor_by_hand() -> None:
    """Scores 1, -2; the predictor says the contrary. With capacity 1 all pass."""
    contrary = {"up": torch.tensor([[-5.0], [5.0]]).double(), "down": torch.tensor([[1.0, -1.0]]).double()}
    for capacity, settings, expected in [
        (0.5, {}, [True, False]),
        (0.5, {"predictor": True}, [False, True]),
        (1.0, {"predictor": True}, [True, True]),
        (1.0, {}, [True, True]),
    ]:
        options = Settings((capacity,), f="off", causal=True, **settings)
        found, _ = toy(options, [1.0, -2.0], [weight(1.0)], [contrary] if options.predictor else ())
        assert found.selected[0].tolist() == [expected]


def test_warm_up() -> None:
    assert [warmed(0.2, t, 4) for t in (0, 4, 9)] == [1, 0.2, 0.2]
    assert warmed(0.2, 0, 0) == 0.2
    assert warmed(0.2, 2, 4) == pytest.approx(0.6)
    assert warmed(0.2, 1, 4) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    counts = [
        int(toy(Settings((0.25,), warmup=4), [1.0, 2, 3, 4, 5, 6, 7, 8], [weight(1.0)], step=t)[0].selected[0].sum())
        for t in range(6)
    ]
    assert counts == [8, 7, 5, 2, 2, 2]  # 1, 0.89, 0.625, 0.36, 0.25, 0.25 of 8


@pytest.mark.parametrize(
    "options",
    [
        {"capacities": (None, None)},
        {"capacities": (None, 0.0)},
        {"capacities": (None, 1.5)},
        {"capacities": (0.5,), "f": "weighted"},
        {"capacities": (0.5,), "per": "batch"},
    ],
)
def test_settings_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Settings(**options)


def test_odd_layers_are_routed() -> None:
    assert mod.odd(5) == (None, 0.125, None, 0.125, None)
    assert Settings(mod.odd(5)).routed == [1, 3]


# on the models


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_full_capacity_and_score_one_is_the_model(kind: str, causal: bool) -> None:
    inputs = oracles.inputs_of(kind, PADDED)
    expected = oracles.unrouted(math_(kind), inputs, PADDED)[PADDED]
    ones = [torch.ones(PADDED.shape, dtype=torch.float64)] * 4
    for f in ("delta", "off"):
        settings = Settings(mod.odd(8, 1.0), f=f, causal=causal)
        found = mod.route(math_(kind), settings, ones, inputs, PADDED).logits[PADDED]
        assert torch.equal(found, expected) if f == "off" else gap(found, expected) < 1e-12


@torch.no_grad()
def test_score_zero_leaves_the_layers_out() -> None:
    inputs = oracles.inputs_of("llama", PADDED)
    zeros = [torch.zeros(PADDED.shape, dtype=torch.float64)] * 4
    ordinary = oracles.Tied(list(math_("llama").layers), [0, 2, 4, 6])
    expected = oracles.looped(math_("llama"), ordinary, inputs, PADDED)
    for f in ("delta", "block"):
        found = mod.route(math_("llama"), Settings(HALF, f=f), zeros, inputs, PADDED)
        assert torch.equal(found.logits[PADDED], expected[PADDED])


@pytest.mark.parametrize("kind", EVERY)
def test_the_best_are_selected_and_as_many_as_there_must_be(kind: str) -> None:
    found = routed(kind, Settings(HALF), oracles.inputs_of(kind, PADDED), PADDED)
    for selected, scores in zip(found.selected, found.router_logits, strict=True):
        assert selected.sum(1).tolist() == [3, 2]
        assert torch.equal(~scores.isnan(), PADDED)
        for b in range(2):
            assert scores[b][selected[b]].min() > scores[b][PADDED[b] & ~selected[b]].max()
    taken = torch.stack(found.selected)
    assert (taken[1:] & ~taken[:-1]).any(), "no token came back"
    assert found.logits.isfinite().all()


@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_changes_nothing_before_it_when_causal(kind: str, predictor: bool) -> None:
    settings = Settings(HALF, causal=True, predictor=predictor)
    inputs = oracles.inputs_of(kind, FULL)
    found, other = (routed(kind, settings, i, FULL) for i in (inputs, changed_last(kind, inputs)))
    assert gap(found.logits[:, :-1], other.logits[:, :-1]) < 1e-12
    assert gap(found.logits[:, -1], other.logits[:, -1]) > 1e-6
    for a, b in zip(found.selected, other.selected, strict=True):
        assert torch.equal(a[:, :-1], b[:, :-1])
    counts = {int(n) for s in found.selected for n in s.sum(1)}
    assert counts - {0, 7}, "the threshold decides nothing"


@pytest.mark.parametrize("kind", ["llama", "post_norm"])
def test_a_later_token_changes_an_earlier_one_by_ranking(kind: str) -> None:
    def moved(seed: int) -> bool:
        inputs = oracles.inputs_of(kind, FULL, seed)
        found, other = (routed(kind, Settings(HALF), i, FULL) for i in (inputs, changed_last(kind, inputs)))
        return gap(found.logits[:, :-1], other.logits[:, :-1]) > 1e-6

    assert any(moved(seed) for seed in range(10))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_a_padded_row_is_that_row_alone(kind: str, causal: bool) -> None:
    settings, inputs = Settings(HALF, causal=causal, predictor=causal), oracles.inputs_of(kind, PADDED)
    with Wide():
        found = routed(kind, settings, inputs, PADDED)
        for b in unpadded(kind):
            real = PADDED[b]
            expected = routed(kind, settings, alone(kind, inputs, b, PADDED), real[None, real])
            assert gap(found.logits[b, real], expected.logits[0]) < TOLERANCE
            for ours, theirs in zip(found.selected, expected.selected, strict=True):
                assert torch.equal(ours[b, real], theirs[0])


@pytest.mark.parametrize("kind", ["llama", "hybrid", *oracles.ENCODERS])
def test_packed_documents_are_those_documents_alone(kind: str) -> None:
    """When they choose apart; where the best of the row are taken, one document takes places of another."""
    forms = [Settings(HALF, per=per) for per in ("document", "row")]
    gaps = [documents_gap(kind, lambda *given, own=own: routed(kind, own, *given).logits) for own in forms]
    assert [found < TOLERANCE for found in gaps] == [True, False]


def test_gradients() -> None:
    """Of the output and the membership loss to everything; of the predictor's loss to the predictor alone."""
    settings = Settings(HALF, predictor=True)
    routers, predictors = (mod.make_routers(settings, kind, seed) for seed, kind in enumerate(("linear", "predictor")))
    inputs = oracles.inputs_of("llama", PADDED)
    found = mod.route(math_("llama"), settings, routers, inputs, PADDED, None, predictors)
    first = list(model("llama").model.layers[0].parameters())
    own = [p for router in routers for p in router.values()]
    theirs = [p for predictor in predictors for p in predictor.values()]

    def reached(loss: Tensor, leaves: list[Tensor]) -> list[bool]:
        grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        return [grad is not None and bool(grad.abs().max() > 0) for grad in grads]

    for loss in (found.logits[PADDED].square().sum(), found.losses["membership"]):
        assert all(reached(loss, first + own))
        assert not any(reached(loss, theirs))
    assert all(reached(found.losses["predictor"], theirs))
    assert not any(reached(found.losses["predictor"], first + own))
