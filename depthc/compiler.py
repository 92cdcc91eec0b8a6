"""The front door: `depthc.compile(model, recipe=...)`."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from depthc.codegen.module import DepthModule, lower
from depthc.dumps import record
from depthc.ir.capture import capture
from depthc.ir.errors import DepthError, InputError
from depthc.ir.program import Program
from depthc.ir.settle import settle
from depthc.passes.base import Pass
from depthc.passes.pipeline import Step, run_recipe
from depthc.passes.recipe import Recipe
from depthc.passes.recipes import recipe_of


def compile(
    model: nn.Module | Program,
    recipe: str | Recipe | Pass = "identity",
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    skip: Collection[str] = (),
    add_losses: bool = False,
    **options: Any,
) -> DepthModule:
    """Capture a model, rewrite its depth by a recipe and lower it to a module.

    Args:
        model: any module whose forward exports and whose layers repeat; or what `depthc.capture` made of one, to try
            many recipes on it.
        recipe: a recipe's name ("identity", "albert", "mor"), its text (`"tie(loops=2) | route()"`), or a `Recipe`.
        args: example arguments of the model's forward (see `depthc.capture`); none for a program.
        kwargs: example keyword arguments.
        skip: names of passes to leave out.
        add_losses: whether a training forward adds the recipe's auxiliary losses to the loss that the model returns.
        options: of the recipe's passes: each goes to the passes that have it.

    Returns:
        A module with the model's signature, output type and parameter names; `.program` is its program, `.history`
        says what each pass did. Under "identity" the parameters are the model's own; else they are copies.

    Raises:
        InputError: example arguments for a program, which has been captured.
        RecipeError: no such recipe, pass or option, or a pass that does not apply to the model.
        CaptureError, OutlineError: see `depthc.capture`.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> compiled = depthc.compile(model, recipe="tie", args=(torch.ones(2, 5, 4),), loops=2)
        >>> list(compiled.state_dict())
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    chosen = recipe_of(recipe, options)
    captured = _captured(model, args, kwargs)
    history: list[Step] = []
    try:
        program, _ = run_recipe(captured, chosen, skip, observe=history.append)
    except DepthError as error:
        record(captured, chosen, history, error)
        raise
    record(captured, chosen, history)
    signature = None if isinstance(model, Program) else inspect.signature(model.forward)
    compiled = lower(settle(program) if history else program, signature, chosen, tuple(history))
    compiled.add_losses = add_losses
    return compiled.train(True in model.modes if isinstance(model, Program) else model.training)


def _captured(model: nn.Module | Program, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Program:
    if not isinstance(model, Program):
        return capture(model, args, kwargs)
    if args or kwargs:
        raise InputError(
            "a program takes no example arguments",
            expected="args and kwargs of a model that is captured here",
            found="a program, which has been captured",
            remedy="leave them out",
        )
    return model
