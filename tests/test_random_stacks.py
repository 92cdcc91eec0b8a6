"""Random stacks of every kind go through the whole pipeline."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import depthc

from .models import Spec, Stacked, assert_lowered, assert_same, carries, layer_outputs, outputs, seeded

MIXING = ("causal", "masked", "plain", "grouped")
# The backward of what two applications of one module share is summed in another order than in the model.
REORDERED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """A stack with at least two layers of each of its kinds, but for a partial last period."""
    period = draw(st.sampled_from([1, 1, 2, 3]))
    if period == 1:
        attention = (draw(st.sampled_from([*MIXING, "none"])),)
    else:
        attention = tuple(draw(st.permutations(MIXING))[:period])
    shared = draw(st.sampled_from(["", "", "mlp", "all"] if period == 1 else ["", "mlp"]))
    depth = draw(st.integers(2, 5)) if period == 1 else draw(st.integers(2 * period, 2 * period + 1))
    return Spec(
        norm=draw(st.sampled_from(["layer", "rms", "none"])),
        residual=draw(st.sampled_from(["pre", "post", "parallel", "sandwich"])),
        attention=attention,
        mlp=draw(st.sampled_from(["gelu", "swiglu"])),
        depth=depth,
        shared=shared,
        sides=draw(st.sampled_from([(), ("rotary",), ("window",), ("extra",), ("embeddings",), ("rotary", "window")])),
        scaled=draw(st.booleans()) and shared != "all",
        dropout=draw(st.sampled_from([0.0, 0.25])),
        rising=draw(st.booleans()) and shared != "all",
        returns=draw(st.sampled_from(["tensor", "tuple", "dict", "states"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
    )


def check(spec: Spec) -> None:
    model = seeded(lambda: Stacked(spec))
    args = model.example()
    compiled = depthc.compile(model, args=args)
    program = compiled.program
    assert program.depths == (spec.depth,)
    for batch, length in ((2, 5), (3, 9), (4, 2)):
        other = model.example(batch, length)
        assert_same(outputs(program.run, *other), outputs(model, *other))
    assert_same(carries(program, *args), layer_outputs(model, model.layers, *args))
    assert depthc.parse(str(program), weights=program.weights) == program
    assert depthc.parse(str(program)) == program
    reordered = spec.shared == "all" and "embeddings" in spec.sides
    assert_lowered(compiled, model, *args, tolerance=REORDERED[spec.dtype] if reordered else 0.0)


@pytest.mark.slow
@given(specs())
@settings(max_examples=3)
def test_random_stack(spec: Spec) -> None:
    check(spec)


@pytest.mark.thorough
@given(specs())
@settings(max_examples=15)
def test_many_random_stacks(spec: Spec) -> None:
    check(spec)


NAMED = {
    "embeddings read by every layer, the first one included": Spec(sides=("embeddings",), returns="states"),
    "an input with one slice a layer": Spec(sides=("extra",)),
    "a scale that is 1 in the first layer": Spec(scaled=True),
    "dropout rates that grow from 0": Spec(dropout=0.2, rising=True),
    "one MLP in all layers": Spec(shared="mlp"),
    "one module applied several times": Spec(shared="all", returns="states"),
    "a hybrid with a partial tail whose layers begin without mixing": Spec(
        attention=("causal", "plain"), depth=5, sides=("extra",), residual="post"
    ),
    "a hybrid of parallel layers that read the embeddings": Spec(
        attention=("causal", "grouped"), depth=5, sides=("embeddings",), residual="parallel"
    ),
    "two periods of a hybrid that reads the embeddings": Spec(
        attention=("plain", "causal"), depth=4, sides=("embeddings",), scaled=True
    ),
    "two periods of a hybrid whose last norm is followed by another": Spec(
        attention=("causal", "masked"), depth=4, sides=("extra",), residual="post"
    ),
    "two periods of a hybrid whose attention drops out from the second layer on": Spec(
        attention=("masked", "causal"), depth=4, dropout=0.2, rising=True, residual="sandwich", norm="none"
    ),
}
MISSED = [
    pytest.param(name, marks=pytest.mark.thorough if len(spec.attention) > 1 else ()) for name, spec in NAMED.items()
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MISSED)
def test_stack_that_was_once_missed(name: str) -> None:
    check(NAMED[name])
