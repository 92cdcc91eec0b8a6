"""Bisect: the first pass of a recipe whose result differs from the one before."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depthc.ir.capture import capture
from depthc.ir.errors import InputError
from depthc.ir.evaluate import run
from depthc.ir.program import Program
from depthc.passes.base import Pass
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipe import Recipe
from depthc.passes.recipes import recipe_of
from depthc.passes.stages import stages_of


@dataclass(frozen=True)
class Difference:
    """How far the outputs after a pass are from those before it.

    Attributes:
        number, title: of the pass.
        largest: the largest absolute difference over the largest absolute value before; infinity where shapes differ
            or one of two values is not a number.
        claims_none: whether the pass says that it preserves numerics.
    """

    number: int
    title: str
    largest: float
    claims_none: bool


@dataclass(frozen=True)
class Bisection:
    """What every pass changed.

    Attributes:
        differences: one a pass, in order.
        tolerance: what counts as equal.

    Example:
        >>> print(Bisection((Difference(1, "loop()", 0.0, True), Difference(2, "tie()", 0.25, False)), 1e-5))
        1. loop(): 0
        2. tie(): 0.25
        first to differ: 2. tie() (tolerance 1e-05)
    """

    differences: tuple[Difference, ...]
    tolerance: float

    @property
    def first(self) -> Difference | None:
        """The first pass that differs beyond the tolerance."""
        return next((d for d in self.differences if d.largest > self.tolerance), None)

    def __str__(self) -> str:
        lines = [f"{d.number}. {d.title}: {d.largest:.3g}" for d in self.differences]
        found = self.first
        verdict = f"first to differ: {found.number}. {found.title}" if found else "no pass differs"
        remark = " (it claims to change nothing: please report it)" if found and found.claims_none else ""
        return "\n".join([*lines, f"{verdict} (tolerance {self.tolerance:g}){remark}"])


def bisect(
    model: nn.Module,
    recipe: str | Recipe | Pass,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = 1e-5,
    skip: Collection[str] = (),
    **options: Any,
) -> Bisection:
    """Evaluate the model after every pass on the example arguments, and compare each result with the one before.

    A recipe that shares layers changes what a model computes, and is named as the first to differ; what a pass that
    claims to preserve numerics must not do is differ at all.

    Args:
        tolerance: the relative difference up to which results are equal.

    Raises:
        InputError: a model without weights (on the meta device).

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)]).eval()
        >>> found = bisect(model, "loop() | tie()", (torch.ones(2, 5, 4),))
        >>> found.first.title
        'tie()'
    """
    chosen = recipe_of(recipe, options)
    captured = capture(model, args, kwargs)
    if any(weight.is_meta for weight in captured.weights.values()):
        remedy = "move the model to a device with values, to_empty() or from_pretrained()"
        raise InputError("the model has no weights to evaluate", found="tensors on the meta device", remedy=remedy)
    stages = stages_of(captured, run_recipe(captured, chosen, skip)[1])
    training = model.training if model.training in captured.modes else captured.modes[0]
    with torch.no_grad():
        results = [
            _result(stage.program.with_weights(captured.weights), args, kwargs or {}, training) for stage in stages
        ]
    kept = [one for one in chosen.passes if type(one).__name__.lower() not in skip]
    pairs = zip(stages[1:], kept, results, results[1:], strict=False)
    return Bisection(
        tuple(Difference(s.number, s.title, _largest(old, new), p.preserves_numerics) for s, p, old, new in pairs),
        tolerance,
    )


def _result(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> list[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # dropout draws the same at every stage
        leaves = pytree.tree_leaves(run(program, args, kwargs, training=training))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _largest(old: list[Tensor], new: list[Tensor]) -> float:
    if [t.shape for t in old] != [t.shape for t in new]:
        return float("inf")
    return max((_relative(a.double(), b.double()) for a, b in zip(old, new, strict=True)), default=0.0)


def _relative(old: Tensor, new: Tensor) -> float:
    if bool((old.isnan() != new.isnan()).any()):
        return float("inf")
    gap = (old - new).nan_to_num(0.0).abs().max().item() if old.numel() else 0.0
    scale = old.nan_to_num(0.0).abs().max().item() if old.numel() else 0.0
    return gap / scale if scale else float("inf") if gap else 0.0
