"""Explain and bisect: numbers before and after, on the meta device too; the pass that changes a result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import depthc
from depthc.ir.errors import InputError, RecipeError
from depthc.ir.params import Init
from depthc.ir.program import Program
from depthc.passes.base import PASSES, Pass

from .models import Spec, Stacked, ids, seeded

SIZES = {"b": 2, "s": 64}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return seeded(lambda: Stacked(Spec(depth=6)))


@pytest.mark.slow
def test_figures_are_those_of_the_compiled_module(model: nn.Module) -> None:
    found = depthc.explain(model, "mor", (ids(),), loops=2)
    compiled = depthc.compile(model, "mor", (ids(),), loops=2)
    figures = found.figures(**SIZES)
    assert figures["before"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert figures["after"]["parameters"] == sum(p.numel() for p in compiled.parameters())
    assert (figures["before"]["layers_applied"], figures["before"]["layers_stored"]) == (6, 6)
    assert (figures["after"]["layers_applied"], figures["after"]["layers_stored"]) == (6, 4)
    assert figures["after"]["capacities"] == {"c_chosen_1": "1/2"}
    assert figures["passes"] == [str(step) for step in compiled.history]
    assert figures["recipe"] == str(compiled.recipe)
    assert figures["sizes"] == SIZES


@pytest.mark.slow
def test_capacities_and_sets_may_be_given(model: nn.Module) -> None:
    cost = depthc.explain(model, "mor", (ids(),), loops=2).stages[-1].cost
    half, quarter = cost.at(**SIZES), cost.at(**SIZES, c_chosen_1=0.25)
    assert cost.at(**SIZES, c_chosen_1=0.5) == half
    assert quarter.flops < half.flops
    assert not half.at_most
    token = depthc.explain(model, "mor_token", (ids(),), loops=2).stages[-1].cost
    most, fewer = token.at(**SIZES), token.at(**SIZES, chosen_1=16)
    assert most == replace(token.at(**SIZES, chosen_1=64), at_most=True)
    assert not fewer.at_most
    assert fewer.flops < most.flops


@pytest.mark.slow
def test_tables_are_for_people(model: nn.Module) -> None:
    text = str(depthc.explain(model, "mor_token", (ids(),), loops=2))
    assert text.startswith('Stacked | tie(sharing="middle_cycle") | tokenchoice()\n1. tie(')
    assert "layers stored" in text
    assert "at most: how many tokens are chosen, only the data decide" in text


@pytest.mark.slow
def test_no_weights_are_needed() -> None:
    with torch.device("meta"):
        model = Stacked(Spec(depth=6)).eval()
        example = torch.zeros(2, 5, dtype=torch.int64)
    found = depthc.explain(model, "mor", (example,), loops=2)
    assert found.figures()["after"]["parameters"] < found.figures()["before"]["parameters"]


@pytest.mark.slow
def test_bad_sizes_and_recipes_are_refused(model: nn.Module) -> None:
    found = depthc.explain(model, "tie", (ids(),))
    with pytest.raises(InputError, match=r"no size 'length'[\s\S]*expected: b, s[\s\S]*remedy: use"):
        found.figures(length=9)
    with pytest.raises(InputError, match="the size 's' is missing"):
        found.stages[0].cost.at(b=1)
    with pytest.raises(RecipeError, match="loops"):
        depthc.explain(model, "tie", (ids(),), loops=4)


# bisect


@dataclass(frozen=True)
class Harmless(Pass):
    """Changes nothing."""

    preserves_numerics: ClassVar[bool] = True

    def apply(self, program: Program) -> Program:
        return program


@dataclass(frozen=True)
class Liar(Pass):
    """Says that it changes nothing, and sets a norm to `value`."""

    value: str = "zeros"
    preserves_numerics: ClassVar[bool] = True

    def apply(self, program: Program) -> Program:
        name = next(name for name in program.params if "norm" in name)
        param = program.params[name]
        return replace(program, params={**program.params, name: replace(param, expr=Init(param.type, self.value))})


del PASSES["harmless"], PASSES["liar"]  # the tests of recipes count passes


@pytest.mark.slow
def test_the_pass_that_changes_the_result_is_named(model: nn.Module) -> None:
    found = depthc.bisect(model, Harmless() | Liar() | Harmless(), (ids(),))
    assert [d.largest > 0 for d in found.differences] == [False, True, False]
    assert found.first is found.differences[1]
    assert "first to differ: 2. liar() (tolerance 1e-05) (it claims to change nothing: please report it)" in str(found)
    assert depthc.bisect(model, Liar(), (ids(),), tolerance=1e9).first is None


@pytest.mark.slow
def test_results_that_are_no_numbers_differ(model: nn.Module) -> None:
    found = depthc.bisect(model, Liar("normal(nan)"), (ids(),))
    assert found.first is not None
    assert found.first.largest == float("inf")


@pytest.mark.slow
def test_a_pass_that_may_change_results_is_not_blamed(model: nn.Module) -> None:
    found = depthc.bisect(model, "loop() | tie()", (ids(),))
    assert [d.title for d in found.differences] == ["loop()", "tie()"]
    assert found.differences[0].largest == 0
    assert found.first is found.differences[1]
    assert "please report" not in str(found)
    skipped = depthc.bisect(model, "loop() | tie()", (ids(),), skip=("tie",))
    assert str(skipped) == "1. loop(): 0\nno pass differs (tolerance 1e-05)"


@pytest.mark.slow
def test_bisect_needs_weights() -> None:
    with torch.device("meta"):
        model = Stacked(Spec(depth=4)).eval()
        example = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(InputError, match="no weights to evaluate"):
        depthc.bisect(model, "tie", (example,))
