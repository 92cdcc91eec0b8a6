"""The models of the oracles are the models they stand for; tying does what recipes.md says."""

from __future__ import annotations

import math
from contextlib import nullcontext

import oracles
import pytest
import torch
from oracles import Wide
from oracles.routers import make_router, router_logits

from .tiny import DOCUMENTS, EVERY, FULL, PADDED, TOLERANCE, gap, logits_of, math_, model

ROWS = {"full": FULL, "padded": PADDED}
NOT_PLAIN = {  # models that run in fp64 only when wide
    ("moe", "full"),  # grouped products have no fp64
    ("moe", "padded"),
    ("hybrid", "padded"),  # a fully masked row becomes all -inf when it is cast to fp32: NaN
}


# the models


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", EVERY)
def test_unrouted_is_the_model_in_value_and_gradient(kind: str, rows: str) -> None:
    real = ROWS[rows]
    inputs = oracles.inputs_of(kind, real)
    named = dict(model(kind).named_parameters())
    with Wide():
        pair = [oracles.unrouted(math_(kind), inputs, real)[real], logits_of(kind, inputs)[real]]
        weights = torch.linspace(-1, 1, pair[0].numel()).double().view_as(pair[0])
        ours, theirs = (
            torch.autograd.grad((out * weights).sum(), list(named.values()), allow_unused=True) for out in pair
        )
    assert gap(*pair) < TOLERANCE
    for name, found, expected in zip(named, ours, theirs, strict=True):
        assert found is not None, name
        assert gap(found, expected) < TOLERANCE, name


@pytest.mark.parametrize(("kind", "rows"), [(k, r) for k in EVERY for r in ROWS if (k, r) not in NOT_PLAIN])
@torch.no_grad()
def test_islands_of_fp32_are_those_of_the_model(kind: str, rows: str) -> None:
    real = ROWS[rows]
    inputs = oracles.inputs_of(kind, real)
    assert gap(oracles.unrouted(math_(kind), inputs, real)[real], logits_of(kind, inputs)[real]) < TOLERANCE


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(kind: str) -> None:
    inputs = oracles.inputs_of(kind, FULL, documents=DOCUMENTS)
    with Wide():
        found = oracles.unrouted(math_(kind), inputs, FULL, DOCUMENTS)
        assert gap(found, logits_of(kind, inputs)) < TOLERANCE
        assert gap(found, oracles.unrouted(math_(kind), inputs, FULL)) > 1e-3


@pytest.mark.parametrize("kind", EVERY)
def test_no_two_parameters_are_equal(kind: str) -> None:
    values = [parameter.flatten() for parameter in model(kind).parameters()]
    assert all(value.dtype is torch.float64 for value in values)
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


# tying


@pytest.mark.parametrize(
    ("sharing", "depth", "loops", "slots"),
    [
        ("cycle", 8, 2, [0, 1, 2, 3, 0, 1, 2, 3]),
        ("sequence", 8, 2, [0, 0, 1, 1, 2, 2, 3, 3]),
        ("middle_cycle", 8, 3, [0, 1, 2, 1, 2, 1, 2, 3]),
        ("middle_sequence", 8, 3, [0, 1, 1, 1, 2, 2, 2, 3]),
        ("cycle_rev", 6, 3, [0, 1, 1, 0, 0, 1]),
        ("cycle", 3, 3, [0, 0, 0]),
    ],
)
def test_slots(sharing: str, depth: int, loops: int, slots: list[int]) -> None:
    assert [oracles.slot_of(sharing, depth, loops, layer) for layer in range(depth)] == slots


@pytest.mark.parametrize(
    ("sharing", "depth", "loops", "init", "sources"),
    [
        ("cycle", 8, 2, "stepwise", [(0,), (2,), (4,), (7,)]),
        ("cycle", 8, 8, "stepwise", [(0,)]),
        ("cycle", 8, 2, "lower", [(0,), (1,), (2,), (3,)]),
        ("cycle", 8, 2, "upper", [(4,), (5,), (6,), (7,)]),
        ("cycle", 6, 3, "average", [(0, 2, 4), (1, 3, 5)]),
        ("cycle_rev", 6, 3, "average", [(0, 3, 4), (1, 2, 5)]),
        ("sequence", 6, 3, "average", [(0, 1, 2), (3, 4, 5)]),
        ("middle_cycle", 8, 2, "stepwise", [(0,), (1,), (3,), (6,), (7,)]),
        ("middle_cycle", 8, 6, "stepwise", [(0,), (1,), (7,)]),
        ("middle_cycle", 8, 3, "lower", [(0,), (1,), (2,), (7,)]),
        ("middle_cycle", 8, 3, "upper", [(0,), (5,), (6,), (7,)]),
        ("middle_cycle", 8, 3, "average", [(0,), (1, 3, 5), (2, 4, 6), (7,)]),
        ("middle_sequence", 8, 3, "average", [(0,), (1, 2, 3), (4, 5, 6), (7,)]),
    ],
)
def test_sources(sharing: str, depth: int, loops: int, init: str, sources: list[tuple[int, ...]]) -> None:
    assert oracles.sources_of(sharing, depth, loops, init) == sources


@pytest.mark.parametrize(("sharing", "depth", "loops"), [("cycle", 8, 3), ("middle_cycle", 8, 4), ("cycle", 2, 3)])
def test_layers_that_loops_do_not_divide_are_refused(sharing: str, depth: int, loops: int) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        oracles.sources_of(sharing, depth, loops, "stepwise")


def test_an_average_is_a_new_layer() -> None:
    layers = math_("encoder_decoder").layers
    tied = oracles.tie(math_("encoder_decoder"), "cycle", 4, "average")
    for name, parameter in tied.slots[0].named_parameters():
        mean = torch.stack([layers[i].get_parameter(name) for i in (0, 2, 4, 6)]).mean(0)
        torch.testing.assert_close(parameter, mean, rtol=0, atol=1e-15)
    assert tied.order == [0, 1] * 4


# routers


def test_routers_by_hand() -> None:
    """The temperature divides the state; between the layers of an MLP is the exact GELU."""
    x = torch.tensor([4.0, -2.0]).double()
    linear = {"weight": torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double()}
    assert router_logits(linear, x).tolist() == [0, -2]
    assert router_logits(linear, x, 4.0).tolist() == [0, -0.5]
    mlp = {"up": torch.tensor([[1.0, 0.5], [0.0, 1.0]]).double(), "down": torch.tensor([[1.0, 10.0]]).double()}
    gelu = [z * (1 + math.erf(z / math.sqrt(2))) / 2 for z in (1.5, -1)]
    assert router_logits(mlp, x, 2.0).item() == pytest.approx(gelu[0] + 10 * gelu[1], abs=1e-14)


def test_routers_have_the_shapes_of_their_kind() -> None:
    def shapes(kind: str, outputs: int = 1) -> dict[str, tuple[int, ...]]:
        router = make_router(kind, torch.Generator().manual_seed(0), outputs, width=8)
        return {name: tuple(value.shape) for name, value in router.items()}

    assert shapes("linear", 3) == {"weight": (3, 8)}
    assert shapes("mlp", 3) == {"up": (16, 8), "down": (3, 16)}
    assert shapes("predictor") == {"up": (2, 8), "down": (1, 2)}


@pytest.mark.parametrize("wide", [False, True])
def test_wide_leaves_no_fp32(wide: bool) -> None:
    with Wide() if wide else nullcontext():
        x = torch.ones(2, dtype=torch.float64)
        found = [x.float(), x.to(torch.float32), x.softmax(0, dtype=torch.float32), torch.zeros(2, dtype=torch.float)]
    assert {value.dtype for value in found} == {torch.float64 if wide else torch.float32}
