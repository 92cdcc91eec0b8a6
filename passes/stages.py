"""Stages: the programs that a recipe goes through, from the captured model to the last pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from depthc.ir.cost.cost import Cost, cost_of
from depthc.ir.program import Program
from depthc.passes.pipeline import Step


@dataclass(frozen=True)
class Stage:
    """A program on the way.

    Attributes:
        number: 0 is the captured model, then the passes by their place in the recipe.
        title: "capture", or the pass with its options.
        program: without weights.
        step: what the pass did; None for the captured model.
    """

    number: int
    title: str
    program: Program
    step: Step | None = None

    @property
    def name(self) -> str:
        """The number and the word that names the stage, as files are called: "02_route"."""
        return f"{self.number:02}_{self.title.partition('(')[0]}"

    @cached_property
    def cost(self) -> Cost:
        """What the program holds, runs and keeps."""
        return cost_of(self.program)


def stages_of(program: Program, history: Sequence[Step]) -> tuple[Stage, ...]:
    """The stages of a history, the captured model first.

    Args:
        program: the only stage where nothing was recorded: a model under no recipe, or one that was loaded ("saved").

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> compiled = depthc.compile(model, "tie", args=(torch.ones(2, 5, 4),), loops=2)
        >>> [stage.name for stage in stages_of(compiled.program, compiled.history)]
        ['00_capture', '01_tie']
    """
    steps = [step for step in history if step.result is not None]
    first = steps[0].source if steps else None
    title = "saved" if history and first is None else "capture"
    stages = [Stage(0, title, first or program.with_weights({}))]
    return (*stages, *(Stage(step.number, step.text, step.result, step) for step in steps if step.result))
