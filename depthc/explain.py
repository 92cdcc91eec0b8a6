"""Explain: what a recipe would do to a model and what it would cost, without weights and without running anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from depthc.ir.capture import capture
from depthc.ir.cost.layers import layers_of, stored_layers
from depthc.ir.cost.sizes import sizes_of
from depthc.passes.base import Pass
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipe import Recipe
from depthc.passes.recipes import recipe_of
from depthc.passes.stages import Stage, stages_of


@dataclass(frozen=True)
class Explanation:
    """A recipe on a model: the program before, after every pass, and what each costs.

    Attributes:
        recipe: the passes.
        stages: the captured model, then the result of every pass; each has a `program` and a `cost`.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> found = depthc.explain(model, "tie", args=(torch.ones(2, 5, 4),))
        >>> [stage.cost.parameters for stage in found.stages]
        [80, 40]
    """

    recipe: Recipe
    stages: tuple[Stage, ...]

    def figures(self, **sizes: float) -> dict[str, Any]:
        """The numbers before and after, as plain data; sizes as in `Cost.at`, by default a batch of 1 and 2048 tokens,
        or as many as the model takes.

        Raises:
            InputError: there is no such size.
        """
        before, after = self.stages[0], self.stages[-1]
        at = before.cost.among(sizes_of(before.program, LENGTH)) | sizes
        after.cost.at(**at)  # refuses names that it does not have; the model before has no capacities
        return {
            "model": before.program.name,
            "recipe": str(self.recipe),
            "passes": [str(stage.step) for stage in self.stages if stage.step],
            "sizes": at,
            "before": _figures(before, at),
            "after": _figures(after, at),
        }

    def table(self, **sizes: float) -> str:
        """The same as a table for people."""
        found = self.figures(**sizes)
        old, new = found["before"], found["after"]
        where = ", ".join(f"{name}={value}" for name, value in found["sizes"].items())
        rows = [_row(label.replace("@", where), old[key], new[key]) for key, label in _ROWS.items()]
        notes = ["at most: how many tokens are chosen, only the data decide"] if new["at_most"] else []
        notes += sorted({f"no cache: {side['no_cache']}" for side in (old, new) if side["no_cache"]})
        title = f"{found['model']} | {found['recipe']}"
        return "\n".join([title, *found["passes"], "", *_aligned([("", "before", "after", "ratio"), *rows]), *notes])

    def __str__(self) -> str:
        return self.table()


def explain(
    model: nn.Module,
    recipe: str | Recipe | Pass = "identity",
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    skip: Collection[str] = (),
    **options: Any,
) -> Explanation:
    """What a recipe would do to a model: every pass, and parameters, operations and cache bytes before and after.

    Arguments as in `depthc.compile`; a model on the meta device will do, of any size.

    Raises:
        RecipeError, CaptureError, OutlineError: as `depthc.compile` does.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> print(depthc.explain(model, "tie", args=(torch.ones(2, 5, 4),), loops=2).table(s=10))
        Sequential | tie()
        1. tie(): 4 ops -> 4
        <BLANKLINE>
                           before  after  ratio
        layers applied          4      4   1.00
        layers stored           4      2   0.50
        parameters             80     40   0.50
        parameter bytes       320    160   0.50
        FLOPs (b=1, s=10)   1,280  1,280   1.00
        cache bytes             0      0
    """
    chosen = recipe_of(recipe, options)
    captured = capture(model, args, kwargs)
    _, history = run_recipe(captured, chosen, skip)
    return Explanation(chosen, stages_of(captured, history))


LENGTH = 2048
_ROWS = {
    "layers_applied": "layers applied",
    "layers_stored": "layers stored",
    "parameters": "parameters",
    "parameter_bytes": "parameter bytes",
    "flops": "FLOPs (@)",
    "cache_bytes": "cache bytes",
}


def _figures(stage: Stage, at: Mapping[str, float]) -> dict[str, Any]:
    cost = stage.cost
    return {
        "layers_applied": len(layers_of(stage.program)),
        "layers_stored": stored_layers(stage.program),
        **asdict(cost.at(**cost.among(at))),
        "flops_form": str(cost.flops),
        "cache_form": "" if cost.cache_bytes is None else str(cost.cache_bytes),
        "no_cache": cost.no_cache,
        "capacities": {name: str(value) for name, value in cost.capacities.items()},
    }


def _row(label: str, old: int | None, new: int | None) -> tuple[str, ...]:
    ratio = f"{new / old:.2f}" if old and new is not None else ""
    return (label.replace(" ()", ""), *("none" if n is None else f"{n:,}" for n in (old, new)), ratio)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in rows)
    return [line.rstrip() for line in lines]
