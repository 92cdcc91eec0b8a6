"""The front door: `depthc.compile(model, recipe=...)`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from depthc.codegen.module import DepthModule, lower
from depthc.ir.capture import capture
from depthc.ir.errors import RecipeError

RECIPES = ("identity",)


def compile(
    model: nn.Module, recipe: str = "identity", args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> DepthModule:
    """Capture a model, rewrite its depth by a recipe and lower it to a module.

    Args:
        model: any module whose forward exports and whose layers repeat.
        recipe: "identity" gives the model back: the same function, parameters and names, one shared body a block.
        args: example arguments of the model's forward (see `depthc.capture`).
        kwargs: example keyword arguments.

    Returns:
        A module with the model's signature, output type and parameters (the same tensors); `.program` is its program.

    Raises:
        RecipeError: no recipe of that name.
        CaptureError, OutlineError: see `depthc.capture`.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> compiled = depthc.compile(model, recipe="identity", args=(torch.ones(2, 5, 4),))
        >>> list(compiled.state_dict()) == list(model.state_dict())
        True
    """
    if recipe not in RECIPES:
        near = difflib.get_close_matches(recipe, RECIPES, 1, cutoff=0)
        raise RecipeError(f"there is no recipe {recipe!r}", expected=", ".join(RECIPES), remedy=f"use {near[0]!r}")
    compiled = lower(capture(model, args, kwargs), inspect.signature(model.forward))
    return compiled.train(model.training)
