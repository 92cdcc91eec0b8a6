"""The check `mor` of a zoo row: the recipe `mor` on the captured program, then one training step.

How often the layers are applied is chosen by what they are, not by what they are called. A typed refusal may be raised:
the row records it with its reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from compare import tensors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo_checks import Unmet

from depthc.codegen.aux import Aux
from depthc.codegen.module import DepthModule, lower
from depthc.ir.program import Call, Program
from depthc.ir.settle import settle
from depthc.passes.layers import unrolled
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipe import Recipe
from depthc.passes.recipes import recipe_of
from depthc.passes.sharing import Sharing, cycles
from depthc.passes.tie import Tie, agree

PROMISE = 0.01  # the share of the loss that a step takes off to first order: gradients differ by orders of magnitude


def mor(program: Program, model: nn.Module, args: tuple, kwargs: dict) -> str:
    """Route the layers, take one step with all parameters, and compare losses under equal random state."""
    recipe = recipe_for(program)
    tied, routed = (_lowered(program, model, recipe, skip) for skip in (("route",), ()))
    before, aux = _loss(routed, args, kwargs)
    _check_routes(routed, aux)
    _check_routers(routed, before)
    start = (before + aux.loss).item()
    _descend(routed, before + aux.loss)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        after, aux = _loss(routed, args, kwargs)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        tied(*args, **kwargs)
    end, share = (after + aux.loss).item(), counter.get_total_flops() / whole.get_total_flops()
    if not end < start:
        raise Unmet(f"{_title(recipe)}: the loss went from {start:.4g} to {end:.4g}")
    if not share < 1:
        raise Unmet(f"{_title(recipe)}: {share:.0%} of the products of the layers without routes")
    return f"{_title(recipe)}, {start:.4g} -> {end:.4g}, {share:.0%} of the products"


def recipe_for(program: Program) -> Recipe:
    """`mor` with the first loops under which layers that share agree: outer layers kept, few loops.

    Where there are none, the first of layers that are one block at least, so that the refusal says what differs.
    """
    layers = [op for op in unrolled(program.stacks[-1].ops) if isinstance(op, Call)]
    ways = list(cycles(len(layers)))
    best = min(ways, key=lambda way: (not agree(program, layers, way), not _one_block(layers, way)))
    return recipe_of("mor", {"sharing": best.kind, "loops": best.loops, "keep": best.keep})


def _one_block(layers: Sequence[Call], way: Sharing) -> bool:
    return all(
        layers[way.slots.index(slot)].block == layer.block for slot, layer in zip(way.slots, layers, strict=True)
    )


def _title(recipe: Recipe) -> str:
    tie: Tie = recipe.passes[0]  # type: ignore[assignment]
    kept = f" keep {tie.keep[0]}, {tie.keep[1]}" if tie.keep not in ((1, 1), (0, 0)) else ""
    return f"{tie.sharing} x{tie.loops}{kept}"


def _lowered(program: Program, model: nn.Module, recipe: Recipe, skip: tuple[str, ...]) -> DepthModule:
    """What `depthc.compile` returns; a model that cannot be captured in train mode trains in eval mode, by top-k."""
    rewritten, history = run_recipe(program, recipe, skip)
    module = lower(settle(rewritten), inspect.signature(model.forward), recipe, history)
    module.selection = "training"
    return module.train(True in program.modes)


def _loss(module: DepthModule, args: tuple, kwargs: dict) -> tuple[Tensor, Aux]:
    """The cross-entropy of logits against fixed classes, or the error of the first output against fixed values."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out, aux = module.forward_with_aux(*args, **kwargs)
    path, found = next((path, value) for path, value in tensors(out).items() if value.is_floating_point())
    generator = torch.Generator().manual_seed(1)
    if "logits" not in path:
        return F.mse_loss(found, torch.randn(found.shape, generator=generator)), aux
    classes = torch.randint(found.shape[-1], found.shape[:-1], generator=generator)
    return F.cross_entropy(found.flatten(0, -2), classes.flatten()), aux


def _check_routes(module: DepthModule, aux: Aux) -> None:
    """Every recursion chose its share of the tokens, among those of the recursion before."""
    count = len(aux.routes)
    total = aux.routes[0].candidates.sum(-1)
    among = aux.routes[0].candidates
    for r, route in enumerate(aux.routes):
        expected = [max(1, int((count - r) / count * n)) for n in total.tolist()]
        found = route.chosen.sum(-1).tolist()
        if found != expected:
            raise Unmet(f"recursion {r} chose {found} tokens, not {expected}")
        if (route.chosen & ~among).any():
            raise Unmet(f"recursion {r} chose tokens that recursion {r - 1} did not")
        among = route.chosen


def _check_routers(module: DepthModule, loss: Tensor) -> None:
    """The task's own loss moves every router: a token's score scales what it gets from the layers."""
    routers = module.new_parameters()
    found = torch.autograd.grad(loss, list(routers.values()), retain_graph=True, allow_unused=True)
    for name, grad in zip(routers, found, strict=True):
        if grad is None or not grad.abs().max() > 0:
            raise Unmet(f"no gradient of the loss at {name}")


def _descend(module: DepthModule, loss: Tensor) -> None:
    """One step of gradient descent, of a length that takes PROMISE of the loss off if the loss is straight."""
    loss.backward()
    parameters = [p for p in module.parameters() if p.grad is not None]
    square = sum(float(p.grad.square().sum()) for p in parameters)  # type: ignore[union-attr]
    torch.optim.SGD(parameters, lr=PROMISE * loss.item() / square).step()
