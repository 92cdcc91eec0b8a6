"""Token-choice recursions, judged by an independent oracle that goes token by token in fp64."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from oracles import Wide, token
from torch import Tensor

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.ir.errors import InputError, RecipeError, RoutingError
from depthc.ir.evaluate import run
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of
from depthc.runtime.balance import update
from depthc.runtime.telemetry import depth_of, report

from .models import ids, stack_program
from .routed import (
    FORWARD,
    ROWS,
    assert_same_gradients,
    captured,
    changed_last,
    counted,
    documents_of,
    forward,
    stepped,
    weighted,
)

KV = ("recursion", "share_first", "update")
OTHERS = [kind for kind in oracles.KINDS if kind != "llama"]


class Case:
    """One way to route one model: the oracle's answer, and the compiler's."""

    def __init__(self, kind: str, rows: str = "full", bias: Tensor | None = None, **settings: Any) -> None:
        self.model, program, self.inputs = captured(kind, rows)
        self.kind, self.real, self.settings, self.bias = kind, ROWS[rows], token.Settings(**settings), bias
        self.documents = documents_of(rows)
        renamed = {"z_loss" if name == "z" else name: value for name, value in settings.items()}
        self.program, _ = run_recipe(program, recipe_of("mor_token", {**renamed, "bias": bias is not None}))
        self.compiled: DepthModule = lower(self.program)
        self.router = token.make_router_of(self.settings)
        with torch.no_grad():
            for slot, weight in self.router.items():
                self.own(slot).copy_(weight)
            if bias is not None:
                self.compiled.parameter_of("depth.r.bias").copy_(bias)

    def own(self, slot: str) -> Tensor:
        return self.compiled.parameter_of(f"depth.r.router.{slot if slot == 'weight' else f'{slot}.weight'}")

    def expected(self) -> token.Result:
        math = oracles.math_of(self.kind, self.model)
        with Wide():
            return token.route(math, self.settings, self.router, self.inputs, self.real, self.documents, bias=self.bias)

    def found(self, causal: bool = False) -> tuple[Tensor, Any]:
        return forward(self.compiled, self.inputs, causal)


def agree(case: Case) -> token.Result:
    """Forward, depths, losses and every gradient."""
    expected, (logits, aux) = case.expected(), case.found()
    assert (logits[case.real] - expected.logits[case.real]).abs().max() < FORWARD
    assert torch.equal(depth_of(aux)[case.real] - 1, expected.depths[case.real])
    assert not depth_of(aux)[~case.real].any()
    for name in ("balance", "z"):
        assert (aux.losses.get(f"r.{name}", torch.zeros(())) - expected.losses[name]).abs() < FORWARD
    shared = {n: p for n, p in case.model.named_parameters() if p.requires_grad}
    ours = shared | {slot: case.own(slot) for slot in case.router}
    theirs = [*shared.values(), *case.router.values()]
    loss = weighted(logits, case.real) + (0 if aux.loss is None else aux.loss)
    assert_same_gradients(loss, ours, weighted(expected.logits, case.real) + sum(expected.losses.values()), theirs)
    return expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", ["padded", *(pytest.param(rows, marks=pytest.mark.slow) for rows in ("full", "packed"))]
)
@pytest.mark.parametrize("kv", KV)
def test_depths_are_the_oracles(kv: str, rows: str) -> None:
    expected = agree(Case("llama", rows, kv=kv))
    assert (expected.counts > 0).sum() > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kv"),
    [
        *((kind, "recursion") for kind in (*OTHERS, oracles.ENCODERS[0])),
        *(pytest.param("parallel", kv, marks=pytest.mark.thorough) for kv in KV[1:]),
        *(pytest.param(kind, "recursion", marks=pytest.mark.thorough) for kind in oracles.ENCODERS[1:]),
    ],
)
def test_other_architectures(kind: str, kv: str) -> None:
    agree(Case(kind, "padded", kv=kv))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"gate": "sigmoid"},
        {"combine": "additive"},
        {"combine": "delta", "gate": "sigmoid", "alpha": 0.7},
        {"combine": "off"},
        {"router": "mlp", "z": 0.3},
        {"balance": 0.0, "z": 1.0},
        {"sharing": "cycle", "loops": 4, "temperature": 0.2},
    ],
    ids=str,
)
def test_other_settings(settings: dict[str, Any]) -> None:
    agree(Case("llama", "padded", **settings))


def test_a_bias_counts_in_the_choice_alone() -> None:
    bias = torch.tensor([0.0, 0.2, -0.1], dtype=torch.float64)
    moved = agree(Case("llama", "padded", bias=bias))
    assert not torch.equal(moved.depths, Case("llama", "padded").expected().depths)


def test_the_bias_moves_towards_depths_that_few_chose() -> None:
    case = Case("llama", "padded", bias=torch.zeros(3, dtype=torch.float64))
    expected, (_, aux) = case.expected(), case.found()
    update(case.compiled, aux, rate=0.01)
    wanted = token.moved(case.settings, case.bias, expected.counts, 0, rate=0.01)
    torch.testing.assert_close(case.compiled.parameter_of("depth.r.bias"), wanted, rtol=1e-6, atol=0)
    assert wanted.unique().numel() > 1


@pytest.mark.parametrize("step", [0, 49, 50])
def test_everyone_goes_to_full_depth_in_the_first_steps_of_training(step: int) -> None:
    case = Case("llama", "padded", bias=torch.zeros(3, dtype=torch.float64), bal_warmup=50)
    math = oracles.math_of("llama", case.model)
    with Wide():
        expected = token.route(math, case.settings, case.router, case.inputs, case.real, bias=case.bias, step=step)
        case.compiled.set_step(step)
        out, aux = case.compiled.train().forward_with_aux(**case.inputs)
        told = run(case.compiled.program, (), case.inputs, training=True, step=step)
    assert (out.logits - expected.logits)[case.real].abs().max() < FORWARD
    assert torch.equal(told.logits, out.logits)
    assert torch.equal(depth_of(aux)[case.real] - 1, expected.depths[case.real])
    assert (expected.counts[:2].sum() == 0) == (step < 50)
    update(case.compiled, aux)
    assert case.compiled.parameter_of("depth.r.bias").any() == (step == 50)
    assert len(set(depth_of(case.found(causal=True)[1])[case.real].tolist())) > 1  # in inference they choose


def test_there_is_a_bias_to_move_or_an_error() -> None:
    case = Case("llama")
    with pytest.raises(InputError, match="no bias") as caught:
        update(case.compiled, case.found()[1])
    assert "bias=True" in caught.value.remedy


@pytest.mark.slow
@pytest.mark.parametrize("deepest", [0, 1, 2])
def test_everyone_may_go_to_one_depth(deepest: int) -> None:
    """Also where deeper recursions are empty."""
    bias = torch.full((3,), -9.0, dtype=torch.float64)
    bias[deepest] = 9.0
    expected = agree(Case("llama", "padded", bias=bias))
    assert expected.counts.tolist() == [int(ROWS["padded"].sum()) * (i == deepest) for i in range(3)]


def test_ties_go_to_the_lower_depth() -> None:
    case = Case("llama")
    with torch.no_grad():
        for slot, weight in case.router.items():
            case.own(slot).zero_()
            weight.zero_()
    assert not agree(case).depths.any()


def test_a_later_token_changes_nothing_before_it() -> None:
    case = Case("llama")
    (before, aux), (after, other) = case.found(), forward(case.compiled, changed_last("llama", case.inputs), False)
    assert (before[:, :-1] - after[:, :-1]).abs().max() < FORWARD
    assert (before[:, -1] - after[:, -1]).abs().max() > 1e-3
    assert torch.equal(depth_of(aux)[:, :-1], depth_of(other)[:, :-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kv"),
    [
        *(("llama", kv) for kv in KV),
        *(pytest.param(kind, "recursion", marks=pytest.mark.slow) for kind in OTHERS),
    ],
)
def test_token_by_token_is_the_whole_sequence(kind: str, kv: str) -> None:
    case = Case(kind, "padded", kv=kv)
    whole, aux = case.found(causal=True)
    logits, past = stepped(kind, case.compiled.program, case.inputs)
    assert (logits - whole)[case.real].abs().max() < FORWARD
    if kv == "recursion":
        lengths = {int(route.chosen.sum(1).max()) for route in aux.routes} - {0}  # nothing is kept of no token
        assert {kept.keys.count for site, kept in past.caches.items() if "[" in site} == lengths


@pytest.mark.slow
def test_everyone_at_full_depth_without_combining_is_the_tied_model() -> None:
    bias = torch.tensor([-9.0, -9.0, 9.0], dtype=torch.float64)
    case = Case("llama", bias=bias, combine="off")
    tied = lower(run_recipe(captured("llama", "full")[1], recipe_of("tie", {"loops": 3, "sharing": "middle_cycle"}))[0])
    with Wide():
        assert torch.equal(case.found()[0], tied.eval()(**case.inputs).logits)


def test_only_tokens_that_are_as_deep_reach_the_products() -> None:
    """No row is there to fill up another: neither padding nor a token that left reaches a product."""
    case = Case("llama", "padded")
    _, aux = case.found()
    assert [len(set(route.chosen.sum(1).tolist())) > 1 for route in aux.routes[:2]] == [True, True]
    chosen = [int(route.chosen.sum()) for route in aux.routes]
    assert chosen[0] == case.real.sum() > chosen[-1]
    everywhere = case.real.numel()
    seen = counted(case.found, case.model)
    for name in ("q_proj", "k_proj", "o_proj", "down_proj"):
        assert seen[name] == [everywhere, *(rows for rows in chosen if rows for _ in range(2)), everywhere], name


@pytest.mark.parametrize("loops", [1, 2])
def test_shares_that_are_not_numbers(loops: int) -> None:
    module = depthc.compile(stack_program(8), f"tie(loops={loops}) | tokenchoice()")
    with torch.no_grad():
        module.parameter_of("depth.r.router.weight").fill_(float("nan"))
    with pytest.raises(RoutingError, match="not a number"):
        module(ids())


@pytest.mark.slow
def test_reports_say_how_deep_tokens_go() -> None:
    module = depthc.compile(stack_program(8), "mor_token", std=1.0)
    found = report(module.forward_with_aux(ids(2, 12))[1])
    assert sum(found.tokens_per_depth) == found.tokens == 24
    assert found.tokens_per_depth[0] == 0
    assert all(accuracy != accuracy for accuracy in found.accuracy)  # nothing foretells what is chosen at once


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "tanh"}, "'gate'"),
        ({"combine": "sum"}, "'combine'"),
        ({"balance": -0.1}, "'balance'"),
        ({"bias": "yes"}, "'bias'"),
        ({"alpha": "one"}, "'alpha'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        depthc.compile(stack_program(8), "mor_token", **options)
    assert caught.value.remedy


def test_layers_that_are_not_tied_have_no_loop() -> None:
    with pytest.raises(RecipeError, match="no loop to route"):
        depthc.compile(stack_program(8), "tokenchoice")
