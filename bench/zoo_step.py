"""One training step of a routed module: its loss, its routers' gradients, and the products that it saves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from compare import difference, tensors
from precision import widen_inputs, widen_program
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo_checks import Unmet

from depthc.codegen.aux import Aux
from depthc.codegen.module import DepthModule, lower
from depthc.ir.program import Program
from depthc.ir.settle import settle
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipe import Recipe

PROMISES = (0.01, 0.001)  # shares of the loss that a step takes off to first order: gradients differ by much in size


@dataclass(frozen=True)
class Subject:
    """A captured program, the model that it is of, and its example inputs."""

    program: Program
    model: nn.Module
    args: tuple
    kwargs: dict

    def wide(self) -> Subject:
        """All of it in fp64."""
        return Subject(widen_program(self.program), self.model, *widen_inputs(self.args, self.kwargs))

    def rewritten(self, recipe: Recipe) -> Program:
        return run_recipe(self.program, recipe)[0]

    def lowered(self, recipe: Recipe) -> DepthModule:
        """What `depthc.compile` returns."""
        return self.module(self.rewritten(recipe))

    def module(self, program: Program) -> DepthModule:
        """A rewritten program, ready to train; what cannot be captured in train mode trains in eval mode, by top-k."""
        module = lower(settle(program), inspect.signature(self.model.forward))
        module.selection = "training"
        return module.train(True in self.program.modes)

    def gap(self, one: DepthModule, other: DepthModule) -> float:
        """The largest difference of what two modules return in inference."""
        with torch.no_grad():
            return difference(*(module.eval()(*self.args, **self.kwargs) for module in (one, other)))

    def loss(self, module: DepthModule) -> tuple[Tensor, Aux]:
        """The cross-entropy of logits against fixed classes, or the error of the first output against fixed values."""
        with same_random_state():
            out, aux = module.forward_with_aux(*self.args, **self.kwargs)
        path, found = next((path, value) for path, value in tensors(out).items() if value.is_floating_point())
        generator = torch.Generator().manual_seed(1)
        if "logits" not in path:
            return F.mse_loss(found, torch.randn(found.shape, generator=generator)), aux
        classes = torch.randint(found.shape[-1], found.shape[:-1], generator=generator)
        return F.cross_entropy(found.flatten(0, -2), classes.flatten()), aux


@contextmanager
def same_random_state() -> Iterator[None]:
    """What is drawn in here is the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@dataclass(frozen=True)
class Step:
    """What one step did.

    Attributes:
        start, end: the loss before it and after it, with what the recipe adds.
        share: the products of the forward after it, relative to the layers without routes.
        aux: what that forward tapped.
    """

    start: float
    end: float
    share: float
    aux: Aux

    def __str__(self) -> str:
        return f"{self.start:.4g} -> {self.end:.4g}, {self.share:.0%}"


def train_once(subject: Subject, routed: DepthModule, whole: DepthModule, check: Callable[[Tensor, Aux], None]) -> Step:
    """Take one step with all parameters, and compare losses under equal random state.

    `check` looks at the model's own loss before the step, and at the routes. Where another choice of tokens begins, the
    loss jumps, and a gradient says nothing of that: a step that changes a choice and does not help gets a shorter one.
    """
    loss, before = subject.loss(routed)
    check(loss, before)
    loss = loss + before.loss
    loss.backward()
    held = {p: p.detach().clone() for p in routed.parameters() if p.grad is not None}
    for promise in PROMISES:
        _descend(held, promise * loss.item())
        step = _look(subject, routed, whole, loss.item())
        if step.end < step.start:
            return step
        if _same_choices(before, step.aux):
            break
    raise Unmet(f"the loss went from {step.start:.4g} to {step.end:.4g}")


def _look(subject: Subject, routed: DepthModule, whole: DepthModule, start: float) -> Step:
    """The loss and the products of a forward."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss, aux = subject.loss(routed)
    with torch.no_grad(), FlopCounterMode(display=False) as all_of_it:
        whole(*subject.args, **subject.kwargs)
    return Step(start, (loss + aux.loss).item(), counter.get_total_flops() / all_of_it.get_total_flops(), aux)


@torch.no_grad()
def _descend(held: Mapping[nn.Parameter, Tensor], less: float) -> None:
    """One step of gradient descent from held values, of a length that takes `less` off the loss if that is straight."""
    square = sum(float(p.grad.square().sum()) for p in held)  # type: ignore[union-attr]
    for p, value in held.items():
        p.copy_(value - less / square * p.grad)  # type: ignore[operator]


def _same_choices(one: Aux, other: Aux) -> bool:
    return all(torch.equal(a.chosen, b.chosen) for a, b in zip(one.routes, other.routes, strict=True))
