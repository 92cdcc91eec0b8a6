"""The oracle of AltUp is the models it stands for, and does what recipes.md says."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import oracles
import pytest
import torch
from oracles import KINDS, WIDTH, LayerMath, Wide, widened
from oracles.widened import Settings, widen
from torch import Tensor
from torch.nn import functional as F
from transformers import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAltUp

from .tiny import (
    EVERY,
    FULL,
    PADDED,
    TOLERANCE,
    Toy,
    assert_same_gradients,
    changed_last,
    documents_gap,
    gap,
    padding_gap,
    scalar,
)
from .whole import WHOLE, whole_of

LAYERS, NOISE = 4, 0.2
FORMS = {
    "old": Settings(),
    "predicted": Settings(3, active=1, compute_on="predicted"),
    "recycled": Settings(4, embedding="recycled"),
    "wide": Settings(2, embedding="wide", compute_on="predicted"),
    "gemma3n": Settings(4, active=0, compute_on="predicted", coefficients="router"),
    "router": Settings(3, coefficients="router", reads=None),
}


@cache
def math_(kind: str) -> LayerMath:
    return oracles.math_of(kind, oracles.build(kind, layers=LAYERS))


@cache
def parameters_of(kind: str, settings: Settings, noise: float = NOISE) -> dict[str, Tensor]:
    return widened.make_parameters(math_(kind), settings, noise)


def ran(
    kind: str, settings: Settings, inputs: Mapping[str, Tensor], real: Tensor = FULL, *more: Any, **steps: Any
) -> Tensor:
    return widen(math_(kind), settings, parameters_of(kind, settings), inputs, real, *more, **steps)


# by hand


def toy(settings: Settings, numbers: Mapping[str, Any], layers: int = 1, steps: bool = False) -> list[float]:
    x = torch.tensor([[1.0, 2.0]]).double()
    parameters = {name: torch.tensor(value).double() for name, value in numbers.items()}
    real = torch.ones_like(x).bool()
    return widen(Toy(layers), settings, parameters, {"x": x}, real, steps=steps).flatten().tolist()


FIRST = {"predict.0": [[1, 2], [0, 1]], "correct.0": [3, 10]}
SECOND = {"predict.1": [[1, 0], [0, 1]]}


@pytest.mark.parametrize("steps", [False, True])
def test_one_layer_by_hand(steps: bool) -> None:
    """Blocks 1, 1 and 2, 2 are predicted as 3, 1 and 6, 2; the layer makes 2 and 5 of the old, 6 and 15 of these."""
    assert toy(Settings(), FIRST, steps=steps) == [(0 - 9) / 2, (3 - 8) / 2]
    assert toy(Settings(compute_on="predicted"), FIRST, steps=steps) == [(12 + 31) / 2, (33 + 92) / 2]
    assert toy(Settings(embedding="recycled"), FIRST, steps=steps) == [-9, -5]


@pytest.mark.parametrize("steps", [False, True])
def test_active_blocks_by_hand(steps: bool) -> None:
    """Behind layer 0 are 0, -9 and 3, -8. Layer 1 computes the second block, or again the first one."""
    in_turn, fixed = ({**FIRST, **SECOND, "correct.1": gains} for gains in ([0, 1], [1, 0]))
    assert toy(Settings(), in_turn, 2, steps) == [(0 - 17) / 2, (3 - 24) / 2]
    assert toy(Settings(active=0), fixed, 2, steps) == [(1 - 9) / 2, (7 - 8) / 2]


def test_blocks_in_turn() -> None:
    assert [Settings(3).block_of(layer) for layer in range(5)] == [0, 1, 2, 0, 1]
    assert [Settings(3, active=2).block_of(layer) for layer in range(3)] == [2, 2, 2]


@pytest.mark.parametrize(
    "options",
    [{"compute_on": "new"}, {"coefficients": "free"}, {"embedding": "sum"}, {"active": 2}, {"reads": 2}, {"blocks": 0}],
)
def test_settings_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Settings(**options)


# against gemma3n


def altup(seed: int, active: int = 0, count: int = 4) -> Gemma3nTextAltUp:
    config = Gemma3nTextConfig(hidden_size=WIDTH, altup_num_inputs=count, altup_active_idx=active)
    module = Gemma3nTextAltUp(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return module


def weights_of(module: Gemma3nTextAltUp, layer: int) -> dict[str, Tensor]:
    found = {
        "norm": module.router_norm.weight,
        "mix": module.modality_router.weight,
        "predict": module.prediction_coefs.weight,
        "correct": module.correction_coefs.weight,
    }
    return {f"router.{layer}.{name}": weight for name, weight in found.items()}


@pytest.mark.parametrize(("active", "reads"), [(0, 0), (2, None)])
@torch.no_grad()
def test_predict_and_correct_are_those_of_gemma3n(active: int, reads: int | None) -> None:
    module = altup(0, active)
    settings = Settings(4, active, "predicted", "router", reads=reads)
    parameters = {name: weight.double() for name, weight in weights_of(module, 0).items()}
    states, y = torch.randn(4, 2, 3, WIDTH), torch.randn(2, 3, WIDTH)
    predicted = module.predict(states)
    corrected = module.correct(predicted, y)
    for b in range(2):
        for t in range(3):
            guess = widened.predict(settings, parameters, 0, list(states[:, b, t].double()))
            found = widened.correct(settings, parameters, 0, guess, y[b, t].double())
            assert gap(torch.stack(list(guess)).float(), predicted[:, b, t]) < 1e-5
            assert gap(torch.stack(list(found)).float(), corrected[:, b, t]) < 1e-5


def test_layers_between_predictions_of_gemma3n() -> None:
    """A model with its module around every layer; gradients of its coefficients, too."""
    settings, inputs, modules = FORMS["gemma3n"], oracles.inputs_of("llama", FULL), []
    parameters: dict[str, Tensor] = {}
    for depth in range(LAYERS):
        modules.append(altup(depth).double())
        parameters |= weights_of(modules[-1], depth)
    math = math_("llama")
    with Wide():
        whole = whole_of("llama", math.model, torch.arange(7))
        found = widen(math, settings, parameters, inputs, FULL)
        states = whole.embed(inputs["input_ids"], math.tables()[0]).repeat(4, 1, 1, 1)
        for module, layer in zip(modules, math.layers, strict=True):
            predicted = module.predict(states)
            states = module.correct(predicted, whole.layer(layer, predicted[0]))
        expected = math.model.lm_head(math.model.model.norm(states.mean(0)))
        assert gap(found, expected) < TOLERANCE
        assert_same_gradients((found, expected), parameters | dict(math.model.named_parameters()))


# against all positions at once


def batched(kind: str, settings: Settings, parameters: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    math, count = math_(kind), settings.blocks
    whole, (table, head) = whole_of(kind, math.model, torch.arange(ids.shape[1])), math.tables()
    wide = parameters.get("table", table.repeat(1, count)).unflatten(1, (count, -1))
    x = torch.stack([whole.embed(ids, part) for part in wide.unbind(1)])
    for depth, layer in enumerate(math.layers):
        at = depth % count if settings.active is None else settings.active
        guess = torch.einsum("ij,jbsd->ibsd", parameters[f"predict.{depth}"], x)
        y = whole.layer(layer, (x if settings.compute_on == "old" else guess)[at])
        x = guess + parameters[f"correct.{depth}"][:, None, None, None] * (y - guess[at])
    if settings.embedding == "wide":
        return F.linear(math.final_norm(x).movedim(0, -2).flatten(-2), parameters["head"])
    return F.linear(math.final_norm(x.sum(0) if settings.embedding == "recycled" else x.mean(0)), head)


@pytest.mark.parametrize("form", ["old", "predicted", "recycled", "wide"])
@pytest.mark.parametrize("kind", WHOLE)
def test_all_positions_at_once_in_value_and_gradient(kind: str, form: str) -> None:
    settings, inputs = FORMS[form], oracles.inputs_of(kind, FULL)
    parameters = parameters_of(kind, settings)
    with Wide():
        pair = ran(kind, settings, inputs), batched(kind, settings, parameters, inputs[oracles.token_input(kind)])
        assert gap(*pair) < TOLERANCE
        assert_same_gradients(pair, parameters | dict(math_(kind).model.named_parameters()))


# identities


@pytest.mark.parametrize(
    "settings",
    [
        Settings(1),
        Settings(2),
        Settings(4, active=2, compute_on="predicted"),
        Settings(3, coefficients="router"),
        Settings(1, coefficients="router", compute_on="predicted"),
    ],
)
@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_identity(kind: str, settings: Settings) -> None:
    inputs = oracles.inputs_of(kind, PADDED)
    parameters = parameters_of(kind, settings, noise=0) if kind in KINDS else coefficients(settings)
    found = widen(math_(kind), settings, parameters, inputs, PADDED)
    assert gap(found[PADDED], oracles.unrouted(math_(kind), inputs, PADDED)[PADDED]) < TOLERANCE


def coefficients(settings: Settings) -> dict[str, Tensor]:
    """Of a model whose embedding and head stay as they are, which is any; here those of a decoder."""
    return parameters_of("llama", settings, noise=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_identity_of_a_wide_embedding(kind: str) -> None:
    """A table of copies and a head of M parts of itself; a head that is tied is divided by M in use."""
    settings, inputs = Settings(3, embedding="wide"), oracles.inputs_of(kind, PADDED)
    parameters = parameters_of(kind, settings, noise=0)
    table, head = math_(kind).tables()
    assert parameters["table"].shape == (oracles.VOCAB, 3 * WIDTH)
    assert ("head" in parameters) == (head is not table)
    found = widen(math_(kind), settings, parameters, inputs, PADDED)
    assert gap(found[PADDED], oracles.unrouted(math_(kind), inputs, PADDED)[PADDED]) < TOLERANCE


@torch.no_grad()
def test_recycled_blocks_are_summed() -> None:
    """Of M equal blocks the sum is M times one: a final norm makes nearly the same of it; no norm does not."""
    for kind, expected in (("llama", 1), ("post_norm", 3)):
        settings, inputs = Settings(3, embedding="recycled"), oracles.inputs_of(kind, FULL)
        found = widen(math_(kind), settings, parameters_of(kind, settings, noise=0), inputs, FULL)
        assert gap(found, expected * oracles.unrouted(math_(kind), inputs, FULL)) < 1e-3


def test_gradients_of_the_identity_are_the_models() -> None:
    """And every coefficient is trained from the start, once layers differ: predictions of the last layer, too."""
    settings, inputs = Settings(), oracles.inputs_of("llama", FULL)
    parameters, own = parameters_of("llama", settings, noise=0), dict(math_("llama").model.named_parameters())
    found = widen(math_("llama"), settings, parameters, inputs, FULL)
    assert_same_gradients((found, oracles.unrouted(math_("llama"), inputs, FULL)), own)
    for name, grad in zip(parameters, torch.autograd.grad(scalar(found), list(parameters.values())), strict=True):
        assert (grad != 0).any(), name


@pytest.mark.parametrize("compute_on", ["old", "predicted"])
@torch.no_grad()
def test_blocks_that_nothing_corrects_stay(compute_on: str) -> None:
    """With predictions of themselves and a gain for the active block alone, it is the model, and the others frozen."""
    settings = Settings(3, active=1, compute_on=compute_on)
    parameters = parameters_of("llama", settings, noise=0)
    parameters |= {n: torch.eye(3).double()[1] for n in parameters if n.startswith("correct")}
    inputs = oracles.inputs_of("llama", FULL)
    row = oracles.rows_of(math_("llama"), FULL, None)[0]
    begun = widened.begin(math_("llama"), settings, parameters, inputs, 0)
    done = widened.run_row(row, settings, parameters, begun)
    expected = oracles.unrouted(math_("llama"), inputs, FULL)[0]
    for t, blocks in done.items():
        assert torch.equal(blocks[0], begun[t][0])
        assert torch.equal(blocks[2], begun[t][2])
        assert gap(math_("llama").finish(blocks[1]), expected[t]) < TOLERANCE


# step by step, and who sees what


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["llama", "parallel"])
@torch.no_grad()
def test_steps_are_all_positions_at_once(kind: str, form: str) -> None:
    inputs = oracles.inputs_of(kind, PADDED)
    with Wide():
        pair = [ran(kind, FORMS[form], inputs, PADDED, steps=steps)[PADDED] for steps in (True, False)]
    assert gap(*pair) < TOLERANCE


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("llama", "parallel")])
@torch.no_grad()
def test_steps_of_every_kind(kind: str) -> None:
    for form in ("old", "gemma3n"):
        test_steps_are_all_positions_at_once(kind, form)


@torch.no_grad()
def test_an_encoder_has_no_steps() -> None:
    inputs = oracles.inputs_of("encoder", FULL)
    with pytest.raises(ValueError, match="encoder"):
        widen(math_("encoder"), Settings(), coefficients(Settings()), inputs, FULL, steps=True)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(kind: str) -> None:
    inputs = oracles.inputs_of(kind, FULL)
    for settings in (FORMS["wide"], FORMS["router"]):
        found, other = (ran(kind, settings, i) for i in (inputs, changed_last(kind, inputs)))
        assert gap(found[:, :-1], other[:, :-1]) < 1e-12
        assert gap(found[:, -1], other[:, -1]) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_padded_row_is_that_row_alone(kind: str) -> None:
    assert padding_gap(kind, partial(ran, kind, FORMS["router"])) < TOLERANCE


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
@torch.no_grad()
def test_packed_documents_are_those_documents_alone(kind: str) -> None:
    assert documents_gap(kind, partial(ran, kind, FORMS["old"])) < TOLERANCE
