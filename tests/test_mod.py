"""Mixture-of-Depths, judged by an independent oracle that goes token by token in fp64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import oracles
import pytest
import torch
from oracles import Wide
from oracles import mod as oracle
from scores import with_scores
from torch import Tensor, nn

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.ir.errors import InputError, RecipeError, RoutingError
from depthc.ir.evaluate import run
from depthc.passes.mod import Mod
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of
from depthc.runtime.telemetry import depth_of, report

from .models import Spec, Stacked, ids, seeded, stack_program
from .routed import (
    FORWARD,
    ROWS,
    assert_same_gradients,
    captured,
    changed_last,
    counted,
    documents_of,
    forward,
    logits_of,
    stepped,
)
from .routed import weighted as scalar

DEPTH = 8


class Case:
    """One way to route one model: the oracle's answer, and the compiler's."""

    def __init__(
        self, kind: str, rows: str = "full", causal: bool = False, capacity: float = 0.5, step: int = 0, **options: Any
    ) -> None:
        self.model, program, self.inputs = captured(kind, rows)
        self.kind, self.real, self.documents = kind, ROWS[rows], documents_of(rows)
        self.causal, self.step = causal, step
        self.numbers = options.get("layers", (1, 3, 5, 7))
        self.predicts = options.get("predictor", False)
        self.settings = oracle.Settings(
            tuple(capacity if n in self.numbers else None for n in range(DEPTH)),
            f={"difference": "delta", "block": "block"}[options.get("f", "difference")],
            per=options.get("per", "row"),
            loss=0 if self.predicts else options.get("loss", 0.001),
            z=options.get("z_loss", 0.0),
            warmup=options.get("warmup", 0),
            causal=causal,
            predictor=self.predicts,
        )
        self.program = run_recipe(program, recipe_of("mod", {"capacity": capacity, **options}))[0]
        self.compiled: DepthModule = lower(self.program)  # its parameters are the model's own
        self.compiled.set_step(step)
        self.routers = oracle.make_routers(self.settings)
        self.predictors = oracle.make_routers(self.settings, "predictor", seed=1) if self.predicts else []
        with torch.no_grad():
            for own, theirs in zip(self.own().values(), self.theirs(), strict=True):
                own.copy_(theirs.view_as(own))

    def own(self) -> dict[str, Tensor]:
        """The new parameters of the compiled module: all routers, then all predictors."""
        parts = ["router", *(["predictor.up", "predictor.down"] if self.predicts else [])]
        names = [f"depth.mod.{n}.{part}.weight" for part in parts for n in self.numbers]
        return {name: self.compiled.parameter_of(name) for name in names}

    def theirs(self) -> list[Tensor]:
        found = [router["weight"] for router in self.routers]
        return found + [p[part] for part in ("up", "down") for p in self.predictors]

    def expected(self) -> oracle.Result:
        math, real, documents = oracles.math_of(self.kind, self.model), self.real, self.documents
        with Wide():
            return oracle.route(
                math, self.settings, self.routers, self.inputs, real, documents, self.predictors, self.step
            )

    def found(self, inputs: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Any]:
        return forward(self.compiled, inputs or self.inputs, self.causal)


def agree(case: Case, backward: bool = True) -> None:
    """Forward, selections, loss and every gradient."""
    expected = case.expected()
    logits, aux = case.found()
    assert (logits[case.real] - expected.logits[case.real]).abs().max() < FORWARD
    assert [route.recursion for route in aux.routes] == list(case.numbers)
    for route, chosen in zip(aux.routes, expected.selected, strict=True):
        assert torch.equal(route.chosen, chosen)
        assert torch.equal(route.candidates, case.real)
    assert (aux.loss - expected.loss).abs() < FORWARD
    if backward:
        shared = {n: p for n, p in case.model.named_parameters() if p.requires_grad}
        found, wanted = (scalar(x, case.real) + y for x, y in ((logits, aux.loss), (expected.logits, expected.loss)))
        assert_same_gradients(found, shared | case.own(), wanted, [*shared.values(), *case.theirs()])


OTHERS = [kind for kind in oracles.KINDS if kind != "llama"]
EVERY = [*OTHERS, "encoder", pytest.param("relative_encoder", marks=pytest.mark.thorough)]
DECIDERS = pytest.mark.parametrize("predictor", [False, True], ids=["router", "predictor"])


@DECIDERS
@pytest.mark.parametrize("rows", ["full", "padded"])
def test_top_k_is_the_oracle(rows: str, predictor: bool) -> None:
    agree(Case("llama", rows, predictor=predictor))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [pytest.param("full", marks=pytest.mark.thorough), "padded"])
@pytest.mark.parametrize("kind", EVERY)
def test_top_k_on_other_architectures(kind: str, rows: str) -> None:
    agree(Case(kind, rows, predictor=kind == "parallel"))


@pytest.mark.slow
@DECIDERS
@pytest.mark.parametrize("rows", ["full", "padded"])
def test_threshold_is_the_oracle(rows: str, predictor: bool) -> None:
    agree(Case("llama", rows, causal=True, predictor=predictor))


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_threshold_on_other_architectures(kind: str) -> None:
    agree(Case(kind, "padded", causal=True, predictor=kind == "post_norm"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"f": "block"},
        {"capacity": 0.125},
        {"capacity": 1.0, "causal": True, "predictor": True},
        {"capacity": 0.01, "layers": (0, 1, 2)},
        {"layers": (0, 7), "loss": 1.0},
        {"layers": tuple(range(8)), "capacity": 0.7},
        {"z_loss": 0.1, "predictor": True},
        {"warmup": 320, "step": 160, "capacity": 0.2},
        {"warmup": 320, "step": 400, "z_loss": 0.1},
    ],
    ids=str,
)
def test_other_settings(options: dict[str, Any]) -> None:
    agree(Case("llama", "padded", **options))


@pytest.mark.slow
@pytest.mark.parametrize("per", ["row", "document"])
def test_packed_rows(per: str) -> None:
    """Documents do not see each other, and compete with each other or not."""
    agree(Case("llama", "packed", per=per))
    agree(Case("llama", "packed", per=per, causal=True), backward=False)


def test_no_gradient_passes_a_predictor() -> None:
    """Its loss alone: only the predictors get a gradient."""
    case = Case("llama", "padded", predictor=True)
    _, aux = case.found()
    grads = torch.autograd.grad(aux.loss, list(case.compiled.parameters()), allow_unused=True)
    reached = {n for (n, _), g in zip(case.compiled.named_parameters(), grads, strict=True) if g is not None}
    assert reached == {f"depth.mod.{n}.predictor.{part}.weight" for n in case.numbers for part in ("up", "down")}


def test_every_layer_chooses_anew() -> None:
    """A token that one layer left out is chosen by a later one: depths count layers, a report of recursions refuses."""
    _, aux = Case("llama", capacity=0.3).found()
    assert any((b.chosen & ~a.chosen).any() for a, b in zip(aux.routes, aux.routes[1:], strict=False))
    assert torch.equal(depth_of(aux), sum(route.chosen.long() for route in aux.routes))
    with pytest.raises(InputError, match="loop mod chose a token") as caught:
        report(aux)
    assert "aux.routes" in caught.value.remedy


@DECIDERS
@pytest.mark.parametrize("training", [True, False])
def test_evaluate_is_the_module(training: bool, predictor: bool) -> None:
    """The program's meaning, op by op, and the lowered module: forward and all gradients, bit for bit."""
    case = Case("llama", "padded", predictor=predictor)
    case.compiled.train(training)
    with Wide():
        one = logits_of(run(case.compiled.program, (), case.inputs, training=training))
        other = logits_of(case.compiled(**case.inputs))
    assert torch.equal(one, other)
    leaves = list(case.compiled.parameters())
    grads = [torch.autograd.grad(scalar(x, case.real), leaves, allow_unused=True) for x in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True) if a is not None)


@pytest.mark.slow
def test_text_reads_back() -> None:
    program = Case("encoder_decoder", "padded", predictor=True).program
    assert depthc.parse(str(program), program.weights) == program


# causality


@pytest.mark.slow
@DECIDERS
def test_a_later_token_changes_nothing_before_it(predictor: bool) -> None:
    case = Case("llama", causal=True, predictor=predictor)
    changed = changed_last("llama", case.inputs)
    (before, aux), (after, other) = case.found(), case.found(changed)
    assert (before[:, :-1] - after[:, :-1]).abs().max() < FORWARD
    assert (before[:, -1] - after[:, -1]).abs().max() > 1e-3
    assert any(0 < route.chosen.sum() < route.chosen.numel() for route in aux.routes)
    for a, b in zip(aux.routes, other.routes, strict=True):
        assert torch.equal(a.chosen[:, :-1], b.chosen[:, :-1])
    case.causal = False
    assert (case.found()[0][:, :-1] - case.found(changed)[0][:, :-1]).abs().max() > 1e-6  # top-k is not causal


STEPPED = ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]


@DECIDERS
@pytest.mark.parametrize("kind", STEPPED)
def test_token_by_token_is_the_whole_sequence(kind: str, predictor: bool) -> None:
    case = Case(kind, "padded", causal=True, predictor=predictor)
    with torch.no_grad():
        whole, aux = case.found()
    parts, past = stepped(kind, case.compiled.program, case.inputs)
    assert (parts - whole)[case.real].abs().max() < FORWARD
    lengths = [count for route in aux.routes if (count := int(route.chosen.sum(1).max()))]  # no token, no cache
    assert sorted(kept.keys.count for kept in past.caches.values()) == sorted([*lengths, 9, 9, 9, 9])


def test_generate_continues_with_the_causal_rule() -> None:
    compiled = depthc.compile(stack_program(4), "mod", std=1.0).eval()
    sequence = ids(2, 4)
    for _ in range(4):
        sequence = torch.cat([sequence, compiled(sequence)[:, -1:].argmax(-1)], 1)
    assert torch.equal(depthc.generate(compiled, ids(2, 4), 4), sequence)


@pytest.mark.slow
def test_any_length_and_one_token() -> None:
    model = oracles.build("post_norm")
    compiled = depthc.compile(model, Mod(capacity=0.3), kwargs=oracles.inputs_of("post_norm", ROWS["full"])).train()
    for length, count in ((1, 1), (2, 1), (7, 2), (10, 3)):
        _, aux = compiled.forward_with_aux(ids(3, length))
        assert all(route.chosen.sum(1).tolist() == [count] * 3 for route in aux.routes)


# identity


@pytest.mark.parametrize("kind", STEPPED)
def test_everyone_at_score_one_is_the_model(kind: str) -> None:
    """To rounding: x + 1 (Block(x) - x)."""
    model, program, inputs = captured(kind, "padded")
    routed = with_scores(run_recipe(program, recipe_of("mod", {"capacity": 1.0}))[0], 1.0)
    with Wide():
        expected = logits_of(model(**inputs))[ROWS["padded"]]
    for causal in (True, False):
        assert (forward(lower(routed), inputs, causal)[0][ROWS["padded"]] - expected).abs().max() < FORWARD


@pytest.mark.parametrize("f", ["difference", "block"])
def test_score_zero_is_the_model_without_the_layers(f: str) -> None:
    """Bit for bit, by both rules."""
    model, program, inputs = captured("llama", "full")
    routed = lower(with_scores(run_recipe(program, recipe_of("mod", {"f": f}))[0], 0.0))
    layers = model.model.layers  # type: ignore[union-attr]
    model.model.layers = nn.ModuleList(layers[0::2])  # type: ignore[union-attr]
    try:
        with Wide():
            expected = model(**inputs).logits
    finally:
        model.model.layers = layers  # type: ignore[union-attr]
    assert all(torch.equal(forward(routed, inputs, causal)[0], expected) for causal in (True, False))


def test_ties_go_to_the_lower_position() -> None:
    _, program, inputs = captured("llama", "full")
    routed = lower(with_scores(run_recipe(program, recipe_of("mod", {"capacity": 0.5}))[0], 1.0))
    _, aux = forward(routed, inputs, causal=False)
    assert all(route.chosen[:, :4].all() and not route.chosen[:, 4:].any() for route in aux.routes)


# what is computed


@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_reach_every_product(causal: bool) -> None:
    """Of a routed layer only the chosen tokens go through its products, keys and values among them."""
    case = Case("llama", causal=causal)
    _, aux = case.found()  # what is traced is not counted
    seen = counted(case.found, case.model)
    batch, length = case.real.shape
    rows = [int(route.chosen.sum()) for route in aux.routes]
    expected = [count for chosen in rows for count in (batch * length, chosen) if count]
    assert causal or rows == [8, 8, 8, 8]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert seen[name] == expected, name


def test_routers_and_predictors_are_exact_under_autocast() -> None:
    model = seeded(lambda: Stacked(Spec(depth=2)))
    compiled = depthc.compile(model, Mod(layers=(0,), predictor=True, std=1.0), args=(ids(),)).train()
    plain = compiled.forward_with_aux(ids())[1].routes[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast = compiled.forward_with_aux(ids())[1].routes[0]
    assert cast.logit.dtype == torch.float32
    assert torch.equal(plain.logit, cast.logit)
    assert torch.equal(plain.chosen, cast.chosen)


# bad inputs


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"capacity": 0}, "'capacity'", "capacity=0.125"),
        ({"capacity": 1.5}, "'capacity'", "capacity=0.125"),
        ({"capacity": True}, "'capacity'", "capacity=0.125"),
        ({"f": "sum"}, "'f'", "use"),
        ({"period": 0}, "'period'", "period=1"),
        ({"first": -1}, "'first'", "first=0"),
        ({"first": 4}, "no such layers", "layers=(3,)"),
        ({"layers": ()}, "no such layers", "layers=(3,)"),
        ({"layers": 1}, "no such layers", "layers=(3,)"),
        ({"layers": (1.0,)}, "no such layers", "layers=(3,)"),
        ({"loss": -1}, "'loss'", "loss=0"),
        ({"std": float("inf")}, "'std'", "std=0"),
        ({"layers": (1, 4)}, "no such layers", "layers=(3,)"),
        ({"layers": (-1,)}, "no such layers", "layers=(3,)"),
        ({"per": "token"}, "'per'", "use"),
        ({"per": "document"}, "keep documents apart", 'per="row"'),
        ({"warmup": -1}, "'warmup'", "warmup=0"),
        ({"z_loss": float("nan")}, "'z_loss'", "z_loss=0"),
        ({"predictor": "mlp"}, "'predictor'", "use"),
        ({"stack": "encoder"}, "no such stack", "name one"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        depthc.compile(stack_program(4), "mod", **options)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("recipe", "remedy"),
    [
        ("mod() | tie(loops=2)", "put tie earlier"),
        ("mod() | mod()", "chooses its tokens once"),
        ("mor(loops=2) | mod()", "chooses its tokens once"),
    ],
)
def test_passes_in_an_order_that_does_not_fit(recipe: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match="rewritten before") as caught:
        depthc.compile(stack_program(6), recipe)
    assert remedy in caught.value.remedy


@DECIDERS
def test_scores_that_are_not_numbers(predictor: bool) -> None:
    compiled = depthc.compile(seeded(Stacked), "mod", args=(ids(),), predictor=predictor)
    with torch.no_grad():
        for parameter in compiled.new_parameters().values():
            parameter.fill_(float("nan"))
    for training in (True, False):
        with pytest.raises(RoutingError, match="not a number"):
            compiled.train(training)(ids())
