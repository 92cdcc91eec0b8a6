"""The recipes that have a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from depthc.passes.keep import Keep as Keep
from depthc.passes.loop import Loop
from depthc.passes.mod import Mod
from depthc.passes.recipe import Recipe
from depthc.passes.route import Route
from depthc.passes.stagger import Stagger
from depthc.passes.stride import Stride
from depthc.passes.tie import Tie
from depthc.passes.tokenchoice import TokenChoice
from depthc.passes.widen import Widen

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe((), "identity"),
        Recipe((Loop(),), "roll"),
        Recipe((Tie(loops=0, sharing="cycle"),), "albert"),
        Recipe((Tie(loops=3, sharing="middle_cycle"), Route()), "mor"),
        Recipe((Tie(loops=3, sharing="middle_cycle"), TokenChoice()), "mor_token"),
        Recipe((Mod(),), "mod"),
        Recipe((Widen(),), "altup"),
        Recipe((Stride(),), "altup_sequence"),
        Recipe((Stagger(),), "stagformer"),
        Recipe((Stagger(shared=True),), "stagformer_shared"),
    )
}


def recipe_of(recipe: Any, options: Mapping[str, Any]) -> Recipe:
    """A recipe given by name, as text, as a pass or as itself, with options.

    Raises:
        RecipeError: no such recipe, pass or option; names the nearest.
    """
    from depthc.passes.base import Pass

    if isinstance(recipe, Pass):
        recipe = Recipe((recipe,))
    found = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
    return found.with_options(options)
