"""The oracle of Mixture-of-Recursions: it is the models it stands for, and it does what recipes.md says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import oracles
import pytest
import torch
from oracles import KINDS, Key, LayerMath, Tied, Visible, Wide, expert
from oracles.expert import Result, Settings
from torch import Tensor, nn

TOLERANCE = 1e-10
FULL = torch.ones(2, 7, dtype=torch.bool)
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]]).bool()
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 2, 2]])
ROWS = {"full": FULL, "padded": PADDED}
NOT_PLAIN = {  # models that run in fp64 only when wide
    ("moe", "full"),  # grouped products have no fp64
    ("moe", "padded"),
    ("hybrid", "padded"),  # a fully masked row becomes all -inf when it is cast to fp32: NaN
}


@cache
def model(kind: str) -> nn.Module:
    return oracles.build(kind)


def math_(kind: str) -> LayerMath:
    return oracles.math_of(kind, model(kind))


def logits_of(kind: str, inputs: Mapping[str, Tensor]) -> Tensor:
    out = model(kind)(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def gap(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


@torch.no_grad()
def routed(kind: str, settings: Settings, inputs: Mapping[str, Tensor], real: Tensor) -> Result:
    return expert.route(math_(kind), settings, expert.make_routers(settings), inputs, real)


def changed_last(kind: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with another last token in every row."""
    tokens = inputs[oracles.token_input(kind)].clone()
    tokens[:, -1] = tokens[:, -1] % (oracles.VOCAB - 1) + 1
    return dict(inputs) | {oracles.token_input(kind): tokens}


# the models


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize(("kind", "rows"), [(k, r) for k in KINDS for r in ROWS if (k, r) not in NOT_PLAIN])
@torch.no_grad()
def test_islands_of_fp32_are_those_of_the_model(kind: str, rows: str) -> None:
    real = ROWS[rows]
    inputs = oracles.inputs_of(kind, real)
    assert gap(oracles.unrouted(math_(kind), inputs, real)[real], logits_of(kind, inputs)[real]) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(kind: str) -> None:
    inputs = oracles.inputs_of(kind, FULL, documents=DOCUMENTS)
    with Wide():
        found = oracles.unrouted(math_(kind), inputs, FULL, DOCUMENTS)
        assert gap(found, logits_of(kind, inputs)) < TOLERANCE
        assert gap(found, oracles.unrouted(math_(kind), inputs, FULL)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
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


# routing, by hand


class Toy:
    """One feature. A layer adds its number to the state, and the states that it sees."""

    def __init__(self, layers: int) -> None:
        self.layers: Sequence[nn.Module] = [nn.Identity() for _ in range(layers)]
        self.keys: list[tuple[int, int]] = []  # layer, token

    def embed(self, inputs: Mapping[str, Tensor], row: int) -> list[Tensor]:
        return list(inputs["x"][row, :, None])

    def key(self, layer: nn.Module, x: Tensor, t: int) -> Key:
        self.keys.append((self.layers.index(layer), t))
        return x, x

    def apply(self, layer: nn.Module, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        return x + self.layers.index(layer) + sum(v for _, (_, v) in visible)

    def finish(self, x: Tensor) -> Tensor:
        return x


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
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_row_is_that_row_alone(kind: str, causal: bool) -> None:
    """On the right; on the left too where positions are relative."""
    settings, inputs = Settings(causal=causal), oracles.inputs_of(kind, PADDED)
    with Wide():
        found = routed(kind, settings, inputs, PADDED)
    for b in [1] if kind == "post_norm" else [0, 1]:
        real, name = PADDED[b], oracles.token_input(kind)
        alone = {key: value[b : b + 1] for key, value in inputs.items()} | {name: inputs[name][b : b + 1, real]}
        with Wide():
            expected = routed(kind, settings, alone, real[None, real])
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


@pytest.mark.parametrize("wide", [False, True])
def test_wide_leaves_no_fp32(wide: bool) -> None:
    with Wide() if wide else nullcontext():
        x = torch.ones(2, dtype=torch.float64)
        found = [x.float(), x.to(torch.float32), x.softmax(0, dtype=torch.float32), torch.zeros(2, dtype=torch.float)]
    assert {value.dtype for value in found} == {torch.float64 if wide else torch.float32}
