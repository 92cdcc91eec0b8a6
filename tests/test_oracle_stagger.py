"""The oracle of StagFormer is the models it stands for, and does what recipes.md says."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import permutations
from typing import Any

import oracles
import pytest
import torch
from oracles import KINDS, QK_NORM, CrossMath, Visible, Wide, staggered
from oracles.crossing import Crossing, copied
from oracles.staggered import Settings, decode, recurrent, stagger
from torch import Tensor, nn
from torch.nn import functional as F

from .tiny import (
    DOCUMENTS,
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

EVERY = (*KINDS, QK_NORM)
LAYERS, NOISE = 4, 0.3
ROWS = {"full": FULL, "padded": PADDED, "packed": FULL}
FORMS = {
    "separate": Settings(),
    "four": Settings(4, window=3),
    "shared": Settings(2, shared=True, lag=2, window=2),
}


@cache
def math_(kind: str) -> CrossMath:
    return oracles.math_of(kind, oracles.build(kind, layers=LAYERS))


@cache
def parameters_of(kind: str, settings: Settings, noise: float = NOISE) -> dict[str, Tensor]:
    return staggered.make_parameters(math_(kind), settings, noise)


def ran(kind: str, settings: Settings, inputs: Mapping[str, Tensor], real: Tensor = FULL, *more: Any) -> Tensor:
    return stagger(math_(kind), settings, parameters_of(kind, settings), inputs, real, *more)


# by hand


class CrossToy(Toy):
    """Between its halves, or in front of all, the layer adds the mean of the memory that a token sees."""

    def __init__(self, layers: int, cross_first: bool = False) -> None:
        super().__init__(layers)
        self.cross_first = cross_first

    def first_half(self, layer: nn.Module, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        return x + sum(v[0] for _, (_, v) in visible)

    def second_half(self, layer: nn.Module, x: Tensor) -> Tensor:
        return x + self.layers.index(layer)

    def attend(self, layer: nn.Module, q: Tensor, t: int, visible: Visible) -> Tensor:
        return oracles.attend(q, visible, 1.0)

    def turn(self, x: Tensor, t: int) -> Tensor:
        return x

    def norms(self, layer: nn.Module) -> dict[str, nn.Module]:
        return {}

    def projections(self, layer: nn.Module) -> dict[str, Tensor]:
        one = torch.ones(1, 1, dtype=torch.float64)
        return {"q.weight": 0 * one, "k.weight": one, "v.weight": one, "o.weight": one}

    def head_size(self, layer: nn.Module) -> int:
        return 1

    def key(self, layer: nn.Module, x: Tensor, t: int) -> oracles.Key:
        return x[None], x[None]

    def apply(self, layer: nn.Module, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        return self.second_half(layer, self.first_half(layer, depth, x, t, visible))


def toy(
    settings: Settings, layers: int, run: Any = stagger, combine: Sequence[float] = (), first: bool = False, **more: Any
) -> list[float]:
    math_of_toy = CrossToy(layers, first)
    parameters = staggered.make_parameters(math_of_toy, settings)
    parameters |= {n: torch.ones_like(p) for n, p in parameters.items() if n.endswith("o.weight")}
    parameters |= {"combine": torch.tensor(combine).double()} if combine else {}
    parameters |= more.pop("parameters", {})
    x = torch.tensor([[1.0, 2.0, 4.0]]).double()
    return run(math_of_toy, settings, parameters, {"x": x}, torch.ones_like(x).bool(), **more).flatten().tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2 + 1, 5 + 2 + 1, 11 + 3.5 + 1]),
        ({"window": 1}, [2 + 1, 5 + 2 + 1, 11 + 5 + 1]),
        ({"window": 2}, [2 + 1, 5 + 2 + 1, 11 + 3.5 + 1]),
        ({"lag": 2}, [2 + 1, 5 + 1, 11 + 2 + 1]),
        ({"lag": 2, "window": 1}, [2 + 1, 5 + 1, 11 + 2 + 1]),
        ({"lag": 3}, [2 + 1, 5 + 1, 11 + 1]),
        ({"lag": 0}, [2 + 2 + 1, 5 + 3.5 + 1, 11 + 6 + 1]),
        ({"lag": 0, "window": 1}, [2 + 2 + 1, 5 + 5 + 1, 11 + 11 + 1]),
        ({"reinject": False}, [4 + 1, 12 + 2 + 1, 29 + 3.5 + 1]),
        ({"reinject": False, "lag": 0}, [4 + 2 + 1, 12 + 3.5 + 1, 29 + 6 + 1]),
    ],
)
def test_two_stacks_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    """Stack 0 makes 2, 5, 11 of the tokens 1, 2, 4; so does the first half of stack 1, when it begins with them."""
    for run in (stagger, decode):
        assert toy(Settings(**options), 2, run) == expected


def test_cross_attention_in_front_of_a_layer_by_hand() -> None:
    """The tokens of stack 1 are 1, 2 + 2, 4 + 3.5 when its layer begins: the others see them so."""
    for run in (stagger, decode):
        assert toy(Settings(), 2, run, first=True) == [2 + 1, 9 + 1, 20 + 1]


def test_combination_by_hand() -> None:
    assert toy(Settings(), 2, combine=(10, -1)) == [20 - 3, 50 - 8, 110 - 15.5]


def test_shared_stacks_by_hand() -> None:
    """Every stack sees the one before: 2, 5, 11; then 2, 5 + 2, 11 + 3.5; then 2, 5 + 2, 11 + (2 + 7) / 2."""
    assert toy(Settings(2, shared=True), 1) == [2, 7, 14.5]
    assert toy(Settings(3, shared=True), 1) == [2, 7, 15.5]
    assert toy(Settings(3, shared=True), 1, combine=(1, 10, 100)) == [222, 775, 11 + 145 + 1550]


def test_an_empty_set_contributes_nothing_with_a_bias_too() -> None:
    bias = {"cross.1.0.o.bias": torch.tensor([5.0]).double()}
    assert toy(Settings(lag=2), 2, parameters=bias) == [2 + 1, 5 + 1, 11 + 2 + 5 + 1]


@pytest.mark.parametrize(
    ("stacks", "prompt", "memory", "expected"),
    [
        (2, 3, 0, [2, 7, 14.5]),
        (2, 2, 0, [2, 7, 14.5]),
        (2, 1, 0, [2, 7, 11 + (2 + 7) / 2]),
        (2, 0, 0, [2, 7, 11 + (2 + 7) / 2]),
        (3, 3, 0, [2, 7, 15.5]),
        (3, 2, 0, [2, 7, 11 + (2 + 5) / 2]),
        (3, 2, 1, [2, 7, 11 + (2 + 7) / 2]),
    ],
)
def test_recurrent_by_hand(stacks: int, prompt: int, memory: int, expected: list[float]) -> None:
    """The last stack sees what stack `memory` made of the prompt, and then what it made itself."""
    assert toy(Settings(stacks, shared=True), 1, recurrent, prompt=prompt, memory=memory) == expected


def test_recurrent_combines_what_runs() -> None:
    found = toy(Settings(2, shared=True), 1, recurrent, combine=(10, 1), prompt=1)
    assert found == [20 + 2, 7, 15.5]


@pytest.mark.parametrize("options", [{"stacks": 0}, {"lag": -1}, {"window": 0}])
def test_settings_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="stacks"):
        Settings(**options)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        toy(Settings(2), 3)
    for settings in (Settings(lag=0), Settings(reinject=False)):
        with pytest.raises(ValueError, match="order"):
            toy(settings, 2, decode, order=(1, 0))
    for options in ({}, {"shared": True, "lag": 0}, {"shared": True, "reinject": False}):
        with pytest.raises(ValueError, match="recurrent"):
            toy(Settings(**options), 2, recurrent, prompt=1)
    encoder = oracles.math_of("encoder", oracles.build("encoder", layers=2))
    with pytest.raises(ValueError, match="encoder"):
        stagger(encoder, Settings(), {}, oracles.inputs_of("encoder", FULL), FULL)


# against all positions at once


def crossed(parts: Mapping[str, Tensor], x: Tensor, m: Tensor, allowed: Tensor, turn: Any) -> Tensor:
    """The cross-attention of [B, S, D], where some queries are allowed nothing."""
    q, k, v = (
        F.linear(y, parts[f"{n}.weight"], parts.get(f"{n}.bias")).unflatten(-1, (-1, 8)).transpose(1, 2)
        for n, y in (("q", x), ("k", m), ("v", m))
    )
    q, k = turn(q, k)
    some = allowed.any(-1, keepdim=True)
    mixed = F.scaled_dot_product_attention(q, k, v, allowed | ~some, enable_gqa=True)
    return some * F.linear(mixed.transpose(1, 2).flatten(2), parts["o.weight"], parts.get("o.bias"))


def batched(kind: str, settings: Settings, parameters: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    math, at = math_(kind), torch.arange(ids.shape[1])
    whole = whole_of(kind, math.model, at)
    distance = at[:, None] - at
    allowed = (distance >= settings.lag) & (distance < settings.lag + (settings.window or len(at)))
    outs: list[Tensor] = []
    for q in range(settings.stacks):
        x = whole.embed(ids, math.tables()[0]) if not q or settings.reinject else outs[-1]
        height = LAYERS if settings.shared else LAYERS // settings.stacks
        for i in range(height):
            layer = math.layers[i if settings.shared else q * height + i]
            prefix = f"cross.{q}.{i}."
            parts = {n.removeprefix(prefix): p for n, p in parameters.items() if n.startswith(prefix)}
            x = whole.first_half(layer, x)
            if parts:
                normed = x
                if "norm.weight" in parts:
                    (norm,) = math.norms(layer).values()
                    own = {n: parts[f"norm.{n}"] for n, _ in norm.named_parameters()}
                    normed = torch.func.functional_call(norm, own, (x,))
                x = x + crossed(parts, normed, outs[-1], allowed, whole.turn)
            x = whole.second_half(layer, x)
        outs.append(x)
    mixed = torch.einsum("q,qbsd->bsd", parameters["combine"], torch.stack(outs))
    return torch.stack([torch.stack([math.finish(x) for x in row]) for row in mixed])


@pytest.mark.parametrize("settings", [FORMS["four"], FORMS["shared"], Settings(reinject=False, lag=0)])
@pytest.mark.parametrize("kind", WHOLE)
def test_all_positions_at_once_in_value_and_gradient(kind: str, settings: Settings) -> None:
    parameters, inputs = parameters_of(kind, settings), oracles.inputs_of(kind, FULL)
    leaves = parameters | dict(math_(kind).model.named_parameters())
    with Wide():
        pair = ran(kind, settings, inputs), batched(kind, settings, parameters, inputs[oracles.token_input(kind)])
        assert gap(*pair) < TOLERANCE
        assert_same_gradients(pair, leaves)


# what it starts as


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_cross_attention_starts_as_a_copy_of_the_layers_own(kind: str) -> None:
    """Keys of a normed state are the layer's own; where queries can be asked for, so is what is attended."""
    math, layer = math_(kind), math_(kind).layers[1]
    states = math.embed(oracles.inputs_of(kind, FULL), 0)
    parts = copied(math, layer)
    assert all((p == 0).all() for n, p in parts.items() if n.startswith("o."))
    own = math.projections(layer)
    crossing = Crossing(math, layer, 1, parts | {n: p for n, p in own.items() if n.startswith("o.")})
    keys = [math.key(layer, x, t) for t, x in enumerate(states)]
    for t, x in enumerate(states):
        for a, b in zip(crossing.memory_key(crossing.normed("norm", x), t), keys[t], strict=True):
            assert torch.equal(a, b)
    if hasattr(math, "query"):
        seen = list(enumerate(keys))
        mixed = math.attend(layer, math.query(layer, states[-1], 6), 6, seen)
        assert torch.equal(crossing.cross(states[-1], 6, seen), F.linear(mixed, own["o.weight"], own.get("o.bias")))


IDENTITIES = {
    "separate": Settings(reinject=False),
    "separate lag 0": Settings(4, reinject=False, lag=0),
    "separate lag 2": Settings(4, reinject=False, lag=2, window=1),
    "shared": Settings(2, shared=True),
}


@pytest.mark.parametrize("form", IDENTITIES)
@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_identity(kind: str, form: str) -> None:
    settings, inputs = IDENTITIES[form], oracles.inputs_of(kind, PADDED)
    parameters = parameters_of(kind, settings, noise=0)
    found = stagger(math_(kind), settings, parameters, inputs, PADDED)
    assert torch.equal(found[PADDED], oracles.unrouted(math_(kind), inputs, PADDED)[PADDED])


@pytest.mark.parametrize("form", ["separate", "shared"])
def test_gradients_of_the_identity_are_the_models(form: str) -> None:
    """And new parameters are trained from the start: `o` of every layer; all stacks that are combined."""
    settings, inputs = IDENTITIES[form], oracles.inputs_of("llama", FULL)
    parameters, own = parameters_of("llama", settings, noise=0), dict(math_("llama").model.named_parameters())
    found = stagger(math_("llama"), settings, parameters, inputs, FULL)
    assert_same_gradients((found, oracles.unrouted(math_("llama"), inputs, FULL)), own)
    for name, grad in zip(parameters, torch.autograd.grad(scalar(found), list(parameters.values())), strict=True):
        assert bool(grad.abs().sum() > 0) == (name == "combine" or name.endswith(".o.weight")), name


def test_an_identity_needs_its_conditions() -> None:
    """Separate stacks that begin with the embeddings are not the model; shared ones that do not, neither."""
    inputs = oracles.inputs_of("llama", FULL)
    plain = oracles.unrouted(math_("llama"), inputs, FULL)
    for settings in (Settings(), Settings(shared=True, reinject=False)):
        found = stagger(math_("llama"), settings, parameters_of("llama", settings, noise=0), inputs, FULL)
        assert gap(found, plain) > 1e-3


# step by step


STEPPED = [("llama", "separate", rows) for rows in ROWS] + [
    ("llama", "shared", "padded"),
    ("parallel", "four", "packed"),
]
STEPPED += [(kind, "separate", "padded") for kind in EVERY if kind != "llama"]


@pytest.mark.parametrize(("kind", "form", "rows"), STEPPED)
@torch.no_grad()
def test_steps_in_either_order_are_all_positions_at_once(kind: str, form: str, rows: str) -> None:
    settings, real, documents = FORMS[form], ROWS[rows], DOCUMENTS if rows == "packed" else None
    inputs, parameters = oracles.inputs_of(kind, real, documents=documents), parameters_of(kind, settings)
    with Wide():
        expected = ran(kind, settings, inputs, real, documents)
        for order in (range(settings.stacks), range(settings.stacks)[::-1]):
            found = decode(math_(kind), settings, parameters, inputs, real, documents, order)
            assert gap(found[real], expected[real]) < TOLERANCE, order


@torch.no_grad()
def test_steps_in_any_order() -> None:
    settings, inputs = FORMS["four"], oracles.inputs_of("llama", FULL)
    expected = ran("llama", settings, inputs)
    for order in list(permutations(range(4)))[::5]:
        found = decode(math_("llama"), settings, parameters_of("llama", settings), inputs, FULL, None, order)
        assert gap(found, expected) < TOLERANCE, order


@pytest.mark.parametrize("settings", [Settings(lag=0), Settings(reinject=False), Settings(4, reinject=False, lag=0)])
@torch.no_grad()
def test_dependent_stacks_step_in_their_order(settings: Settings) -> None:
    inputs = oracles.inputs_of("llama", FULL)
    found = decode(math_("llama"), settings, parameters_of("llama", settings), inputs, FULL)
    assert gap(found, ran("llama", settings, inputs)) < TOLERANCE


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_recurrent_decode(kind: str) -> None:
    """The prompt, and the step behind it when that sees what it was trained to see, are as ever; then it departs."""
    settings, one = Settings(3, shared=True), FULL[:1]
    inputs = oracles.inputs_of(kind, one)
    parameters = parameters_of(kind, settings) | {"combine": torch.eye(3).double()[-1]}
    with Wide():
        expected = stagger(math_(kind), settings, parameters, inputs, one)
        near, far = (
            recurrent(math_(kind), settings, parameters, inputs, one, prompt=4, memory=memory) for memory in (1, 0)
        )
    assert gap(near[:, :5], expected[:, :5]) < TOLERANCE
    assert gap(far[:, :4], expected[:, :4]) < TOLERANCE
    assert min(gap(near[:, 5:], expected[:, 5:]), gap(far[:, 4], expected[:, 4])) > 1e-6


@torch.no_grad()
def test_recurrent_decode_of_the_identity_is_the_model() -> None:
    settings, inputs = Settings(shared=True), oracles.inputs_of("llama", PADDED)
    parameters = parameters_of("llama", settings, noise=0)
    with Wide():
        found = recurrent(math_("llama"), settings, parameters, inputs, PADDED, prompt=3)
        assert gap(found[PADDED], oracles.unrouted(math_("llama"), inputs, PADDED)[PADDED]) < TOLERANCE


# who sees what


@pytest.mark.parametrize(("kind", "form"), [("llama", "separate"), ("llama", "shared"), *((k, "four") for k in EVERY)])
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(kind: str, form: str) -> None:
    inputs = oracles.inputs_of(kind, FULL)
    found, other = (ran(kind, FORMS[form], i) for i in (inputs, changed_last(kind, inputs)))
    assert gap(found[:, :-1], other[:, :-1]) < 1e-12
    assert gap(found[:, -1], other[:, -1]) > 1e-6


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_a_token_sees_memory_of_its_lag_at_most(lag: int) -> None:
    """The newest memory that moves a token's output is `lag` positions behind it."""
    settings, math = Settings(lag=lag), math_("llama")
    stack = staggered.stacks_of(math, settings, parameters_of("llama", settings))[1]
    row = oracles.rows_of(math, FULL, None)[0]
    states = dict(enumerate(math.embed(oracles.inputs_of("llama", FULL), 0)))
    memory = {j: x.detach().flip(0).requires_grad_() for j, x in states.items()}
    done = staggered.run_stack(row, settings, stack, states, memory)
    for t in range(7):
        grads = torch.autograd.grad(done[t].sum(), list(memory.values()), retain_graph=True, allow_unused=True)
        moved = [j for j, grad in enumerate(grads) if grad is not None and grad.abs().max() > 0]
        assert moved == list(range(t - lag + 1))


@torch.no_grad()
def test_windows() -> None:
    """As wide as the row it is none; of one token there is nothing to weigh, and queries and keys do not count."""
    inputs = oracles.inputs_of("llama", FULL)
    parameters = parameters_of("llama", Settings())

    def under(window: int | None, given: Mapping[str, Tensor] = parameters) -> Tensor:
        return stagger(math_("llama"), Settings(window=window), given, inputs, FULL)

    weighing = (".q.", ".k.", ".norm.")
    other = {n: p + 1 if any(part in n for part in weighing) else p for n, p in parameters.items()}
    assert torch.equal(under(6), under(None))
    assert gap(under(5), under(None)) > 1e-6
    assert gap(under(1, other), under(1)) < TOLERANCE
    assert gap(under(2, other), under(2)) > 1e-3


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_a_padded_row_is_that_row_alone(kind: str) -> None:
    assert padding_gap(kind, partial(ran, kind, FORMS["four"])) < TOLERANCE


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
@torch.no_grad()
def test_packed_documents_are_those_documents_alone(kind: str) -> None:
    assert documents_gap(kind, partial(ran, kind, FORMS["separate"])) < TOLERANCE


@torch.no_grad()
def test_shared_is_separate_with_equal_weights() -> None:
    shared, separate = Settings(2, shared=True), Settings(2)
    model = oracles.build("llama", layers=2 * LAYERS)
    for own, copy_ in zip(model.model.layers[:LAYERS], model.model.layers[LAYERS:], strict=True):
        copy_.load_state_dict(own.state_dict())
    half = copy.deepcopy(model)
    half.model.layers = half.model.layers[:LAYERS]
    parameters = staggered.make_parameters(oracles.math_of("llama", half), shared, NOISE)
    inputs = oracles.inputs_of("llama", FULL)
    pair = [
        stagger(oracles.math_of("llama", m), s, parameters, inputs, FULL)
        for m, s in ((half, shared), (model, separate))
    ]
    assert torch.equal(*pair)


# nothing seen


@pytest.mark.parametrize("kind", EVERY)
def test_nothing_is_nan_where_nothing_is_seen(kind: str) -> None:
    """A row of one token, in which no cross-attention takes part; its parameters get no gradient."""
    settings, one = Settings(2), FULL[:1, :1]
    parameters, own = parameters_of(kind, settings), dict(math_(kind).model.named_parameters())
    logits = ran(kind, settings, oracles.inputs_of(kind, one), one)
    assert logits.isfinite().all()
    grads = torch.autograd.grad(scalar(logits), list((parameters | own).values()), allow_unused=True)
    for name, grad in zip(parameters | own, grads, strict=True):
        assert grad is None or grad.isfinite().all(), name
        assert not name.startswith("cross.") or grad is None or not grad.any(), name


@pytest.mark.parametrize("kind", EVERY)
def test_nothing_is_nan_in_a_row_with_padding(kind: str) -> None:
    settings, inputs = FORMS["four"], oracles.inputs_of(kind, PADDED)
    leaves = parameters_of(kind, settings) | dict(math_(kind).model.named_parameters())
    with Wide():
        logits = ran(kind, settings, inputs, PADDED)
        grads = torch.autograd.grad(scalar(logits[PADDED]), list(leaves.values()), allow_unused=True)
    assert logits.isfinite().all()
    for name, grad in zip(leaves, grads, strict=True):
        if name.startswith("cross.") or name == "combine":
            assert grad.isfinite().all(), name
            assert grad.any(), name
        assert grad is None or grad.isfinite().all(), name
