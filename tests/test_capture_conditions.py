"""Under which sizes, modes and arguments a captured graph is the model, and that it is refused under others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import depthc
from depthc.ir.graph.guards import holds_always
from depthc.ir.sizes import evaluate

from .models import WIDTH, Chain, Residual, assert_same, captured, outputs, seeded, states


@settings(max_examples=200)
@given(st.data())
def test_guards_that_are_dropped_hold(data: st.DataObject) -> None:
    """What is taken to hold always does, at random sizes from the lowest on."""
    terms = "b; s; 7; 4 * b; b * s; 2 * s + 1; 16 * b // b; s // 3; s % 4; 64 * b % (4 * b); max(s, 2)".split("; ")
    left, right = data.draw(st.sampled_from(terms)), data.draw(st.sampled_from(terms))
    sign = data.draw(st.sampled_from(["==", "!=", "<", "<=", ">", ">="]))
    lowest = data.draw(st.fixed_dictionaries({"b": st.integers(1, 3), "s": st.integers(1, 4)}))
    guard = f"{left} {sign} {right}"
    if holds_always(guard, lowest):
        sizes = {name: data.draw(st.integers(low, low + 20)) for name, low in lowest.items()}
        assert evaluate(guard, sizes), sizes


class Halved(Chain):
    """A length that is no size expression."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, : int(x.shape[1] * 0.5)])


def test_conditions_that_cannot_be_written_fix_their_sizes() -> None:
    program = captured(seeded(Halved), states(2, 6))
    assert "s == 6" in program.signature.guards
    with pytest.raises(depthc.InputError, match="condition"):
        program.run(states(2, 11))


class Renamed(Chain):
    """Groups of four tokens. The arguments have names that programs give to other things."""

    def forward(self, training: dict[str, Tensor]) -> Tensor:
        x = training["a.b"]
        return super().forward(x.reshape(x.shape[0], x.shape[1] // 4, 4, x.shape[2]).sum(2))


def test_guards_find_their_argument_by_path() -> None:
    program = captured(seeded(Renamed), {"a.b": states(2, 8)})
    assert program.run({"a.b": states(3, 12)}).shape == (3, 3, WIDTH)
    with pytest.raises(depthc.InputError, match="condition"):
        program.run({"a.b": states(2, 14)})


class Ones(Chain):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 3 if x.shape[1] == 1 else y


def test_sizes_of_one_are_taken_only_where_the_model_does_the_same() -> None:
    program = captured(seeded(Ones), states())
    assert program.signature.ranges == {"b": (1, None), "s": (2, None)}
    assert_same(outputs(program.run, states(1, 7)), outputs(seeded(Ones), states(1, 7)))
    with pytest.raises(depthc.InputError, match="does not fit"):
        program.run(states(2, 1))


class Noisy(Chain):
    """Dropout that does not follow the mode."""

    on: bool = True

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.on)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_that_does_not_follow_the_mode(on: bool, training: bool) -> None:
    model = seeded(Noisy).train(training)
    model.on = on
    compiled = depthc.compile(model, args=(states(),))
    assert compiled.program.modes == (training,)
    assert_same(outputs(compiled, states()), outputs(model, states()))
    assert (outputs(compiled, states()) == 0).any() == on


def test_a_part_in_another_mode_is_captured_as_it_is() -> None:
    model = seeded(lambda: Chain(4, rate=0.5)).train()
    for layer in (model.layers[0], model.layers[1]):
        layer.eval()
    compiled = depthc.compile(model, args=(states(),))
    assert compiled.program.modes == (True,)
    assert_same(outputs(compiled, states()), outputs(model, states()))


class Scaled(Chain):
    def forward(self, x: Tensor, scale: float | None = 2.0) -> Tensor:
        return super().forward(x) * (1.0 if scale is None else scale)


def test_defaults_are_part_of_what_is_captured() -> None:
    program = captured(seeded(Scaled), states())
    assert_same(outputs(program.run, states(), scale=2.0), outputs(seeded(Scaled), states()))
    for other in (None, 3.0, 2, torch.tensor(2.0)):
        with pytest.raises(depthc.InputError, match="another value"):
            program.run(states(), scale=other)


class Stochastic(Residual):
    """Stochastic depth: what it draws depends on no token."""

    def forward(self, x: Tensor) -> Tensor:
        kept = (torch.rand(x.shape[0], 1, 1, device=x.device) < 0.5).to(x.dtype)
        return x + kept * self.drop(self.linear(self.norm(x)))


def test_random_numbers_are_drawn_in_the_order_of_the_model() -> None:
    model = seeded(lambda: nn.Sequential(*[Stochastic(0.5) for _ in range(3)])).train()
    compiled = depthc.compile(model, args=(states(4),))
    assert compiled.program.depths == (3,)
    assert_same(outputs(compiled, states(4)), outputs(model, states(4)))


class Shown(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x), self.scale.to(x.dtype), self.scale.clone(), self.scale


def test_parameters_that_are_returned() -> None:
    captured(seeded(Shown), states())


@pytest.mark.slow
def test_many_sizes() -> None:
    class Wide(Chain):
        def forward(self, xs: list[Tensor]) -> Tensor:
            return super().forward(xs[0]) * sum(x.sum() for x in xs)

    xs = [states(), *(torch.randn(2 * i + 7, 2 * i + 8) for i in range(13))]
    captured(seeded(lambda: Wide(3)), xs)


class Remembering(Chain):
    """Keeps what it made in its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.last = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            self.last = self.table = torch.arange(x.shape[1], dtype=x.dtype)
        return super().forward(x)


def test_nothing_without_data_stays_in_the_model() -> None:
    model = seeded(Remembering)
    depthc.capture(model, (states(),))
    assert torch.equal(model.last, torch.zeros(1))
    assert torch.equal(model.table, torch.zeros(1))
