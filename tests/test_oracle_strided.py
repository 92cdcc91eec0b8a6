"""The oracle of Sequence-AltUp is the models it stands for, and does what recipes.md says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import oracles
import pytest
import torch
from oracles import KINDS, LayerMath, Wide
from oracles.strided import Settings, make_parameters, stride
from torch import Tensor

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
)
from .whole import WHOLE, whole_of

LAYERS, NOISE = 4, 0.2


@cache
def math_(kind: str) -> LayerMath:
    return oracles.math_of(kind, oracles.build(kind, layers=LAYERS))


@cache
def parameters_of(kind: str) -> dict[str, Tensor]:
    return make_parameters(math_(kind), NOISE)


def toy(form: Settings, numbers: Sequence[float], steps: bool = False) -> tuple[list[float], Toy]:
    """The tokens 1, 2, 4, 8 through three layers; the second one has the numbers a1, a2, b."""
    seen, x = Toy(3), torch.tensor([[1.0, 2.0, 4.0, 8.0]]).double()
    parameters = dict(zip(("a1.1", "a2.1", "b.1"), torch.tensor(numbers).double(), strict=True))
    real = torch.ones_like(x).bool()
    return stride(seen, form, parameters, {"x": x}, real, steps=steps).flatten().tolist(), seen


@pytest.mark.parametrize("steps", [False, True])
def test_a_strided_layer_by_hand(steps: bool) -> None:
    """Tokens are 2, 5, 11, 23 behind layer 0; its own layer makes 2 + 1 + 2 and 11 + 1 + 13 of the anchors 2 and 11.

    Predicted are 2 x + 3 anchor: 10, 16, 55, 79, of which the layer would make 10 + 1 + 10 and 55 + 1 + 65.
    """

    def last(x: Sequence[float]) -> list[float]:
        return [value + 2 + sum(x[: t + 1]) for t, value in enumerate(x)]

    guess = [10, 16, 55, 79]
    news = {"old": (5 - 10, 25 - 55), "predicted": (21 - 10, 121 - 55)}
    for compute_on, (first, second) in news.items():
        found, seen = toy(Settings(2, compute_on), (2, 3, 10), steps)
        added = [10 * first, 10 * first, 10 * second, 10 * second]
        assert found == last([g + a for g, a in zip(guess, added, strict=True)])
        ran_at = [(0, t) for t in range(4)] + [(1, 0), (1, 2)] + [(2, t) for t in range(4)]
        assert sorted(seen.keys) == ran_at, "a layer makes keys of its anchors alone"


def test_anchors() -> None:
    def anchors(real: Sequence[int], documents: Sequence[int], q: int) -> dict[int, int]:
        (row,) = oracles.rows_of(Toy(1), torch.tensor([real]).bool(), torch.tensor([documents]))
        return Settings(q).anchors(row)

    assert anchors([1] * 5, [0] * 5, 2) == {0: 0, 1: 0, 2: 2, 3: 2, 4: 4}
    assert anchors([0, 1, 1, 1, 0], [0] * 5, 2) == {1: 1, 2: 1, 3: 3}
    assert anchors([1] * 6, [0, 0, 0, 1, 1, 1], 2) == {0: 0, 1: 0, 2: 2, 3: 3, 4: 3, 5: 5}


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_stride_one_is_the_identity(kind: str) -> None:
    inputs = oracles.inputs_of(kind, PADDED)
    plain = oracles.unrouted(math_(kind), inputs, PADDED)[PADDED]
    parameters = make_parameters(math_(kind))
    one, two = (stride(math_(kind), Settings(q), parameters, inputs, PADDED)[PADDED] for q in (1, 2))
    assert gap(one, plain) < TOLERANCE
    assert gap(two, plain) > 1e-3


@pytest.mark.parametrize("compute_on", ["old", "predicted"])
@pytest.mark.parametrize("kind", WHOLE)
def test_strided_layers_on_all_positions_at_once(kind: str, compute_on: str) -> None:
    """Anchors taken out of the row, at their positions."""
    q, inputs, parameters = 3, oracles.inputs_of(kind, FULL), parameters_of(kind)
    math, at = math_(kind), torch.arange(7)
    with Wide():
        every, some = (whole_of(kind, math.model, positions) for positions in (at, at[::q]))
        found = stride(math, Settings(q, compute_on), parameters, inputs, FULL)
        x = every.embed(inputs[oracles.token_input(kind)], math.tables()[0])
        for depth, layer in enumerate(math.layers):
            if depth in (0, LAYERS - 1):
                x = every.layer(layer, x)
                continue
            a1, a2, b = (parameters[f"{name}.{depth}"] for name in ("a1", "a2", "b"))
            guess = a1 * x + a2 * x[:, at // q * q]
            done = some.layer(layer, (x if compute_on == "old" else guess)[:, ::q])
            x = guess + b * (done - guess[:, ::q])[:, at // q]
        expected = torch.stack([torch.stack([math.finish(token) for token in row]) for row in x])
        assert gap(found, expected) < TOLERANCE
        assert_same_gradients((found, expected), parameters | dict(math.model.named_parameters()))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_strided_steps_are_all_positions_at_once(kind: str) -> None:
    parameters = parameters_of(kind)
    inputs, form = oracles.inputs_of(kind, PADDED), Settings(2, "predicted")
    with Wide():
        pair = [stride(math_(kind), form, parameters, inputs, PADDED, steps=steps)[PADDED] for steps in (True, False)]
    assert gap(*pair) < TOLERANCE


@pytest.mark.parametrize("options", [{"stride": 0}, {"compute_on": "new"}])
def test_settings_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Settings(**options)


@torch.no_grad()
def test_an_encoder_has_no_steps() -> None:
    with pytest.raises(ValueError, match="encoder"):
        stride(math_("encoder"), Settings(), {}, oracles.inputs_of("encoder", FULL), FULL, steps=True)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(kind: str) -> None:
    inputs = oracles.inputs_of(kind, FULL)
    found, other = (
        stride(math_(kind), Settings(3), parameters_of(kind), i, FULL) for i in (inputs, changed_last(kind, inputs))
    )
    assert gap(found[:, :-1], other[:, :-1]) < 1e-12
    assert gap(found[:, -1], other[:, -1]) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_padded_row_is_that_row_alone(kind: str) -> None:
    assert padding_gap(kind, partial(stride, math_(kind), Settings(2), parameters_of(kind))) < TOLERANCE


@pytest.mark.parametrize("kind", ["llama", "hybrid", *oracles.ENCODERS])
@torch.no_grad()
def test_packed_documents_are_those_documents_alone(kind: str) -> None:
    """Anchors restart with a document."""
    assert documents_gap(kind, partial(stride, math_(kind), Settings(3), parameters_of(kind))) < TOLERANCE
