"""Recipes: one object written in three ways; what each pass did; what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import depthc
from depthc.ir.errors import RecipeError, VerifyError
from depthc.ir.program import Program
from depthc.passes.base import PASSES, Pass
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipe import Recipe
from depthc.passes.recipes import RECIPES, recipe_of
from depthc.passes.route import Route
from depthc.passes.tie import Tie

from .models import Spec, Stacked, ids, seeded, stack_program


@pytest.fixture(scope="module")
def program() -> Program:
    return depthc.capture(seeded(lambda: Stacked(Spec(depth=6))), (ids(),))


RECIPE = Tie(loops=3, sharing="middle_cycle") | Route()


def test_three_ways_are_one_object(tmp_path: Path) -> None:
    text = 'tie(loops=3, sharing="middle_cycle") | route()'
    assert str(RECIPE) == text
    assert Recipe.parse(text) == RECIPE == RECIPES["mor"]
    file = tmp_path / "recipe.toml"
    file.write_text('[[passes]]\nname = "tie"\nloops = 3\nsharing = "middle_cycle"\n[[passes]]\nname = "route"\n')
    assert Recipe.from_toml(file) == RECIPE
    file.write_text('recipe = "mor"\n[options]\nloops = 2\ncapacities = [1.0, 0.5]\n')
    assert Recipe.from_toml(file) == RECIPE.with_options({"loops": 2, "capacities": (1.0, 0.5)})


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_read_back(name: str) -> None:
    recipe = RECIPES[name]
    assert Recipe.parse(name) == recipe
    assert not recipe.passes or Recipe.parse(str(recipe)) == recipe


@pytest.mark.slow
def test_history_says_what_each_pass_did(program: Program) -> None:
    after, history = run_recipe(program, recipe_of("tie", {"loops": 2, "init": "upper"}))
    (step,) = history
    assert str(step) == '1. tie(init="upper"): 6 ops -> 4'
    assert all(
        text == f'ref("{name.replace(name.split(".")[1], str(int(name.split(".")[1]) + 3), 1)}")'
        for name, text in step.made
    )
    assert len(step.made) == len(step.dropped) == 3 * len([n for n in program.params if n.startswith("layers.0.")])
    assert any(name.startswith("layers.5.") for name in step.dropped)
    assert step.seconds > 0
    assert depthc.parse(str(after), weights=after.weights) == after


def test_a_pass_may_be_skipped(program: Program) -> None:
    after, history = run_recipe(program, recipe_of("mor", {"loops": 2}), skip=("route",))
    assert [step.text for step in history] == ['tie(sharing="middle_cycle")']
    assert after == run_recipe(program, recipe_of("tie", {"loops": 2, "sharing": "middle_cycle"}))[0]
    with pytest.raises(RecipeError, match="no pass 'rout'") as caught:
        run_recipe(program, recipe_of("mor", {}), skip=("rout",))
    assert "'route'" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("mro", "no recipe or pass 'mro'", "'mor'"),
        ("tie() | rout()", "no recipe or pass 'rout'", "'route'"),
        ("tie(lops=2)", "no option 'lops'", "'loops'"),
        ("mor(capacites=(1.0,))", "no option 'capacites'", "'capacities'"),
        ("tie(2)", "not a recipe", "keywords"),
        ("tie(loops=2", "not a recipe", "keywords"),
        ("tie(loops=open('x'))", "not a recipe", "keywords"),
        ("tie(loops=2) + route()", "not a recipe", "keywords"),
        ("__import__('os').system('x')", "not a recipe", "keywords"),
        ("", "not a recipe", "keywords"),
    ],
)
def test_texts_that_are_no_recipes(text: str, message: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.parse(text)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("recipe = ", "not TOML"),
        ('recipe = "mor"\nseed = 3', "unknown key 'seed'"),
        ("", "no recipe, or two"),
        ('recipe = "mor"\n[options]\ncapacites = [1.0]', "no option 'capacites'"),
        ("[[passes]]\nloops = 3", "has no name"),
        ('[[passes]]\nname = "ti"', "no pass 'ti'"),
        ("recipe = 3", "not a recipe"),
        ('[[passes]]\nname = "tie"\nloops = "three"', "'loops'"),
    ],
)
def test_files_that_are_no_recipes(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.from_toml(file)
    assert "recipe.toml" in caught.value.where
    assert caught.value.remedy


@pytest.mark.slow
def test_options_of_compile_reach_the_passes() -> None:
    with pytest.raises(RecipeError, match="no option 'lops'"):
        depthc.compile(stack_program(6), "mor", lops=3)


def test_a_pass_that_breaks_the_program_is_named(program: Program) -> None:
    @dataclass(frozen=True)
    class Broken(Pass):
        def apply(self, program: Program) -> Program:
            return replace(program, params={})

    try:
        with pytest.raises(VerifyError) as caught:
            run_recipe(program, Recipe((Tie(), Broken())))
    finally:
        del PASSES["broken"]
    assert "after pass 2, broken()" in caught.value.where


@pytest.mark.slow
def test_a_program_is_captured_once_for_many_recipes() -> None:
    model = seeded(lambda: Stacked(Spec(depth=6)))
    program = depthc.capture(model, (ids(),))
    found, expected = (depthc.compile(*given, loops=2) for given in ((program, "tie"), (model, "tie", (ids(),))))
    assert str(found.program) == str(expected.program)
    assert torch.equal(found(ids(3, 7)), expected(ids(3, 7)))
    assert found.training
    with pytest.raises(depthc.DepthError, match="takes no example arguments"):
        depthc.compile(program, "tie", (ids(),))
