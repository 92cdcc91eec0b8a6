"""What a recipe's routes must be (recipes: section 4), judged by the sets, the logits and the routers' weights.

And that routers learn: a token's score scales what it gets from the layers, so the model's own loss moves them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from zoo_checks import Unmet
from zoo_step import Subject, same_random_state

from depthc.codegen.aux import Aux, Route
from depthc.codegen.module import DepthModule
from depthc.ir.program import Merge, Op, Program, Tap
from depthc.passes.layers import with_stack

CAPACITY = 0.125  # of Mixture-of-Depths


def check_shares(aux: Aux) -> None:
    """Expert choice: every recursion chose the best (N - r) / N of the tokens, among those of the one before."""
    count = len(aux.routes)
    for r, route in enumerate(aux.routes):
        _check_best(route, (count - r) / count, aux.routes[0])
    _check_nested(aux)


def check_layers(aux: Aux, numbers: tuple[int, ...]) -> None:
    """Mixture-of-Depths: these layers chose the best eighth, each of all tokens."""
    found = tuple(route.recursion for route in aux.routes)
    if found != numbers:
        raise Unmet(f"layers {found} chose tokens, not {numbers}")
    for route in aux.routes:
        if not route.candidates.all():
            raise Unmet(f"layer {route.recursion} chose among {int(route.candidates.sum())} tokens, not all")
        _check_best(route, CAPACITY, route)


def check_depths(aux: Aux, module: DepthModule, subject: Subject) -> None:
    """Token choice: a token is active up to the depth with the largest share, which its state before the loop says."""
    _check_nested(aux)
    loop = aux.routes[0].loop
    with torch.no_grad(), same_random_state():
        state, _ = module.loop(loop).enter(*subject.args, **subject.kwargs)
    (x,) = (value for value in state.values() if isinstance(value, Tensor))
    (weight,) = module.new_parameters().values()
    depths = F.linear(x.to(weight.dtype), weight).softmax(-1).argmax(-1)
    for route in aux.routes:
        active = (depths >= route.recursion) & aux.routes[0].candidates
        if not torch.equal(route.chosen, active):
            found, expected = int(route.chosen.sum()), int(active.sum())
            raise Unmet(f"recursion {route.recursion} has {found} tokens; {expected} chose to go as deep")


def check_routers(module: DepthModule, loss: Tensor, unread: Collection[str] = ()) -> None:
    """Every router gets a gradient of the loss, but for those whose tokens the loss does not read."""
    routers = {name: weight for name, weight in module.new_parameters().items() if name not in unread}
    found = torch.autograd.grad(loss, list(routers.values()), retain_graph=True, allow_unused=True)
    for name, grad in zip(routers, found, strict=True):
        if grad is None or not grad.abs().max() > 0:
            raise Unmet(f"no gradient of the loss at {name}")


def with_streams(program: Program, layers: Sequence[int]) -> Program:
    """A program of Mixture-of-Depths that taps the stream behind each of its routed layers."""
    (stack,) = (stack for stack in program.stacks if any(isinstance(op, Merge) for op in stack.ops))
    numbers, ops = iter(layers), list[Op]()
    for op in stack.ops:
        ops += [op, Tap(f"stream.{next(numbers)}", op.write)] if isinstance(op, Merge) else [op]
    return with_stack(program, stack, ops)


def unread_layers(loss: Tensor, aux: Aux) -> list[int]:
    """Routed layers none of whose chosen tokens the loss reads: a pooled token may be left out by the last of them."""
    streams = [aux.taps[f"stream.{route.recursion}"] for route in aux.routes]
    found = torch.autograd.grad(loss, streams, retain_graph=True, allow_unused=True)
    pairs = zip(aux.routes, found, strict=True)
    return [route.recursion for route, grad in pairs if grad is None or not grad[route.chosen].any()]


def runs_whole(aux: Aux) -> bool:
    """Whether every recursion has all tokens, so that it computes what the layers without routes do."""
    return all(bool(route.chosen.all()) for route in aux.routes)


def _check_best(route: Route, capacity: float, of: Route) -> None:
    """The max(1, int(capacity n)) candidates with the best logits, ties to the lower position, n counting `of`'s."""
    expected = [max(1, int(capacity * n)) for n in of.candidates.sum(-1).tolist()]
    order = route.logit.masked_fill(~route.candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    for row, count in enumerate(expected):
        found = route.chosen[row].nonzero().flatten().tolist()
        if found != sorted(order[row, :count].tolist()):
            raise Unmet(f"place {route.recursion} chose {len(found)} tokens, or not the best, of which it has {count}")


def _check_nested(aux: Aux) -> None:
    """Every recursion chose among those that the one before chose."""
    for before, after in pairwise(aux.routes):
        if not torch.equal(after.candidates, before.chosen) or (after.chosen & ~before.chosen).any():
            raise Unmet(f"recursion {after.recursion} chose tokens that recursion {before.recursion} did not")
