"""The checks of a zoo row that are about recipes: what is routed, the identity of each recipe, one training step.

How often layers are applied, and which layers are routed, is chosen by what they are, not by what they are called. A
typed refusal may be raised: the row records it with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scores import with_scores
from torch import Tensor, nn
from zoo_checks import SUBSET, Unmet
from zoo_routes import (
    CAPACITY,
    check_depths,
    check_layers,
    check_routers,
    check_shares,
    runs_whole,
    unread_layers,
    with_streams,
)
from zoo_step import Step, Subject, train_once
from zoo_table import shown

from depthc.codegen.aux import Aux
from depthc.codegen.module import DepthModule
from depthc.ir.axes.ports import ports_of
from depthc.ir.program import Call, Program
from depthc.passes.layers import unrolled
from depthc.passes.mod import Mod
from depthc.passes.recipe import Recipe
from depthc.passes.recipes import recipe_of
from depthc.passes.sharing import Sharing, cycles
from depthc.passes.subsets import legal_layers
from depthc.passes.tie import Tie, agree

ROUNDING = SUBSET  # in fp64: rows may run in other kernels than whole sequences, and x + 1 (y - x) is not quite y


def mor(program: Program, model: nn.Module, args: tuple, kwargs: dict) -> str:
    """Expert choice: with all capacities 1 and no gate it is the tied model, bit for bit."""
    subject, (recipe, tie) = Subject(program, model, args, kwargs), looped("mor", program)
    routed = subject.lowered(recipe)
    everyone = recipe.with_options({"combine": "off", "capacities": (1.0,) * tie.loops})
    gap = _identity(subject.gap(subject.lowered(everyone), subject.lowered(Recipe((tie,)))), 0.0)

    def check(loss: Tensor, aux: Aux) -> None:
        check_shares(aux)
        check_routers(routed, loss)

    step = train_once(subject, routed, subject.lowered(Recipe((tie,))), check)
    return f"{_loops(tie)}, {gap}, {_cheaper(step)}"


def mor_token(program: Program, model: nn.Module, args: tuple, kwargs: dict) -> str:
    """Token choice: with everyone at full depth and no combination it is the tied model, to rounding."""
    subject, (recipe, tie) = Subject(program, model, args, kwargs), looped("mor_token", program)
    routed, wide = subject.lowered(recipe), subject.wide()
    everyone = wide.lowered(recipe.with_options({"combine": "off", "bias": True}))
    _bias_to_full_depth(everyone)
    gap = _identity(wide.gap(everyone, wide.lowered(Recipe((tie,)))), ROUNDING)

    def check(loss: Tensor, aux: Aux) -> None:
        check_depths(aux, routed, subject)
        check_routers(routed, loss)

    step = train_once(subject, routed, subject.lowered(Recipe((tie,))), check)
    return f"{_loops(tie)}, {gap}, {step if runs_whole(step.aux) else _cheaper(step)}"


def mod(program: Program, model: nn.Module, args: tuple, kwargs: dict) -> str:
    """Mixture-of-Depths: with capacity 1 and scores of 1 it is the model, to rounding."""
    subject, layers = Subject(program, model, args, kwargs), routed_layers(program)
    recipe = recipe_of("mod", {"capacity": CAPACITY, "layers": layers})
    routed, wide = subject.module(with_streams(subject.rewritten(recipe), layers)), subject.wide()
    everyone = with_scores(wide.rewritten(recipe.with_options({"capacity": 1.0})), 1.0)
    gap = _identity(wide.gap(wide.module(everyone), wide.lowered(Recipe())), ROUNDING)
    unread: list[int] = []

    def check(loss: Tensor, aux: Aux) -> None:
        check_layers(aux, layers)
        unread.extend(unread_layers(loss, aux))
        check_routers(routed, loss, [f"depth.mod.{n}.router.weight" for n in unread])

    step = train_once(subject, routed, subject.lowered(Recipe()), check)
    return f"{_numbers(layers, unread)}, {gap}, {_cheaper(step)}"


def looped(name: str, program: Program) -> tuple[Recipe, Tie]:
    """A recipe with the first loops under which layers that share agree (outer layers kept, few loops), and its tie.

    Where there are none, the first of layers that are one block at least, so that the refusal says what differs.
    """
    layers = _layers(program)
    ways = list(cycles(len(layers)))
    best = min(ways, key=lambda way: (not agree(program, layers, way), not _one_block(layers, way)))
    recipe = recipe_of(name, {"sharing": best.kind, "loops": best.loops, "keep": best.keep})
    return recipe, recipe.passes[0]  # type: ignore[return-value]


def routed_layers(program: Program) -> tuple[int, ...]:
    """Every other layer or, where one of these cannot run on some of the tokens, all that attend and can.

    Where there are none, every other: the refusal says why.
    """
    layers = _layers(program)
    legal, usual = legal_layers(program, layers), range(Mod().first, len(layers), Mod().period)
    attending = [n for n in legal if ports_of(program.blocks[layers[n].block])]
    return tuple(usual if set(usual) <= set(legal) or not attending else attending)


def _layers(program: Program) -> list[Call]:
    return [op for op in unrolled(program.stacks[-1].ops) if isinstance(op, Call)]


def _one_block(layers: Sequence[Call], way: Sharing) -> bool:
    return all(
        layers[way.slots.index(slot)].block == layer.block for slot, layer in zip(way.slots, layers, strict=True)
    )


def _bias_to_full_depth(module: DepthModule) -> None:
    """A bias beside which shares do not count, for the last depth."""
    (name,) = (
        name for name, param in module.program.params.items() if name.startswith("depth.") and param.kind == "buffer"
    )
    with torch.no_grad():
        module.parameter_of(name)[-1] = 2.0


def _identity(gap: float, limit: float) -> str:
    if not gap <= limit:
        raise Unmet(f"the identity differs by {gap:.1e}")
    return f"identity {shown(gap)}"


def _cheaper(step: Step) -> Step:
    """A step of which the forward computes fewer products than the layers without routes."""
    if not step.share < 1:
        raise Unmet(f"{step.share:.0%} of the products of the layers without routes")
    return step


def _loops(tie: Tie) -> str:
    kept = f" keep {tie.keep[0]}, {tie.keep[1]}" if tie.keep not in ((1, 1), (0, 0)) else ""
    return f"{tie.sharing} x{tie.loops}{kept}"


def _numbers(layers: Sequence[int], unread: Sequence[int]) -> str:
    """The layers, the first two where there are many, and those of which the loss reads no token."""
    some = ", ".join(map(str, layers)) if len(layers) < 5 else f"{layers[0]}, {layers[1]}, ..."
    but = f" (unread: {', '.join(map(str, unread))})" if unread else ""
    return f"{'layers' if len(layers) > 1 else 'layer'} {some}{but}"
