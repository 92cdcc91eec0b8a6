"""One recursion of a compiled module as a function of its stream, ready to be timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from routing_plan import Row
from routing_time import Place, Ready
from torch import Tensor

from depthc.codegen.module import DepthModule, lower
from depthc.codegen.routing import KERNELS
from depthc.ir.program import Program
from depthc.ir.settle import settle
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of

HALF = torch.bfloat16
Run = Callable[[Tensor], Tensor]


class Region:
    """One recursion of the loop of a module; the same tokens are chosen at every call.

    Attributes:
        stream: what the recursion before left.
        past: the keys and values that earlier recursions stored; they take gradients.
    """

    def __init__(self, module: DepthModule, h: Tensor, recursion: int = 0) -> None:
        self.module, self.core, self.recursion = module, module.loop("r"), recursion
        past: dict[str, Any] = {}
        with torch.no_grad():
            self.state, self.reads = self.core.enter(h)
            for r in range(recursion):
                self.state, past = self.core.step(self.state, self.reads, r, past)
        self.past = {name: replace(slot, cache=tuple(map(_leaf, slot.cache))) for name, slot in past.items()}
        (self.name,) = (name for name, value in self.state.items() if isinstance(value, Tensor))
        self.stream: Tensor = self.state[self.name]

    def __call__(self, h: Tensor) -> Tensor:
        state, _ = self.core.step({**self.state, self.name: h}, self.reads, self.recursion, self.past)
        return state[self.name]  # type: ignore[no-any-return]

    def in_place(self, h: Tensor) -> Tensor:
        """The same written over the stream, as inside of a forward, where nobody else holds it."""
        evaluator = self.core._evaluator(h.device)
        evaluator.slots, evaluator.made = dict(self.past), {self.name: h}
        values = {**self.reads, **self.state, self.name: h}
        evaluator.ops(self.core.op.body, values, {self.core.op.index: self.recursion})
        return values[self.name]  # type: ignore[no-any-return]

    def cached(self) -> list[Tensor]:
        """The keys and values of earlier recursions, layer by layer."""
        return [tensor for slot in self.past.values() for tensor in slot.cache]

    def given(self) -> list[Tensor]:
        """What the recursion reads beside the stream and takes gradients."""
        every = [*self.module.parameters(), *self.cached()]
        found = torch.autograd.grad(self(self.stream).float().sum(), every, allow_unused=True)
        return [tensor for tensor, grad in zip(every, found, strict=True) if grad is not None]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def ready(run: Run, x: Tensor, given: Sequence[Tensor], training: bool) -> Ready:
    """A forward; in training a forward and the gradients of the input, if it has any, and of whatever else is given."""
    if not training:
        return Ready(torch.no_grad()(lambda: run(x)))
    x = _leaf(x) if x.is_floating_point() else x
    wanted, like = [*([x] if x.requires_grad else []), *given], run(x)
    generator = torch.Generator(x.device).manual_seed(1)
    upstream = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return Ready(lambda: torch.autograd.grad(run(x), wanted, upstream)[0])


def by_depthc(
    place: Place, module: DepthModule, make: Callable[[DepthModule], Region], door: str, training: bool
) -> Ready:
    """A region of a copy of the module, compiled through a door: "bodies", "whole" or "in place".

    Args:
        door: with ", without kernels" behind it, the steps around the block are plain torch.
    """
    module, (way, *plain) = copy.deepcopy(module), door.split(", ")
    if plain:
        module.kernels = ()
    if way != "whole":
        place.compile(module)
    region = make(module)
    given = region.given() if training else []
    if way == "in place":
        x = region.stream.clone()
        return Ready(torch.no_grad()(lambda: region.in_place(x)), lambda: x.copy_(region.stream))
    eager = ready(region, region.stream, given, training)
    if way == "bodies":
        return eager
    eager.run()  # rows are traced before the whole is
    return ready(place.compiled(lambda h: region(h)), region.stream, given, training)


def routed_by(recipe: str, captured: Program, training: bool) -> DepthModule:
    """What `depthc.compile` makes of a captured model; outside of training it selects as in training."""
    program, history = run_recipe(captured, recipe_of(recipe, {}))
    module = lower(settle(program), history=tuple(history)).train(training)
    module.kernels = KERNELS
    module.selection = "training"
    return module


def stream_of(row: Row, device: str) -> Tensor:
    """A random stream [batch, tokens, features]."""
    s, generator = row.sizes, torch.Generator(device).manual_seed(0)
    return torch.randn(s.batch, s.tokens, s.width, generator=generator, device=device, dtype=HALF)
