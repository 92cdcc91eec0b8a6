"""route: every token goes as deep as its router says (Mixture-of-Recursions, arXiv 2507.10524, expert choice)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from depthc.ir.names import Names
from depthc.ir.program import Loop, Program
from depthc.passes.base import Pass
from depthc.passes.expert_choice import ExpertChoice
from depthc.passes.layers import names_in, stack_of, with_stack
from depthc.passes.recursion import KEYS, recursion_of
from depthc.passes.routing_glue import COMBINES, GATES, ROUTERS
from depthc.passes.subsets import candidates_of


@dataclass(frozen=True)
class Route(Pass):
    """Run every iteration of a loop on the tokens that its router chose among those of the iteration before.

    In training the best `capacities[r]` of a row's real tokens are chosen at recursion r; outside of training the
    tokens whose logit is above zero, so that no later token changes an earlier one (a recursion of capacity 1 takes
    every candidate). Tokens that are not chosen stay as they are.

    Options:
        capacities: one a recursion, in (0, 1], non-increasing; (N - r) / N by default.
        combine: "weighted", "additive", "delta" or "off": how x and Block(x) become the new x.
        gate, alpha: of the score s = alpha G(logit): "sigmoid", "tanh", or "none" for the logit itself.
        kv: "recursion": keys and values of the chosen tokens; "share_first": those of recursion 0, for all tokens;
            "update": those of recursion 0, but of chosen tokens their own.
        per: "row", or "document": what a capacity is a share of, and tokens are compared within, in training.
        loss: the weight of the loss that makes logits foretell the choice.
        router: "linear" (D to 1), or "mlp" (D to 2D, GELU, to 1).
        auxiliary: the weight of the loss of a second router, which sends no gradient into the stream and decides in
            inference in place of the first, which is then a gate alone; 0: there is none. 1 in the paper.
        z_loss: the weight of the mean squared logit.
        warmup: optimizer steps over which capacities fall from 1 along a cosine; 0: none. See `DepthModule.set_step`.
        temperature: what the router divides its input by.
        std, seed: of the routers' normal initial values.
        loop: the index of the loop; the only one of the stack by default.
        stack: name or number; the last one by default.

    Raises:
        RecipeError: there is no loop, a block mixes tokens other than by attention, or the options do not fit.

    Example:
        >>> print(Route(kv="share_first"))
        route(kv="share_first")
    """

    capacities: tuple[float, ...] | None = None
    combine: str = "weighted"
    gate: str = "sigmoid"
    alpha: float = 0.1
    kv: str = "recursion"
    per: str = "row"
    loss: float = 0.001
    router: str = "linear"
    auxiliary: float = 0.0
    z_loss: float = 0.0
    warmup: int = 0
    temperature: float = 1.0
    std: float = 0.02
    seed: int = 0
    loop: str | None = None
    stack: int | str | None = None

    def __post_init__(self) -> None:
        self.require_one_of("combine", COMBINES)
        self.require_one_of("gate", GATES)
        self.require_one_of("kv", KEYS)
        self.require_one_of("per", ("row", "document"))
        self.require_one_of("router", ROUTERS)
        self.require_whole("warmup", 0)
        for name in ("loss", "auxiliary", "z_loss"):
            self.require_weight(name)
        given = self.capacities or ()
        fits = all(isinstance(c, int | float) and 0 < c <= 1 for c in given)
        if not fits or any(b > a for a, b in pairwise(given)):
            raise self.refuse(
                "these are no capacities",
                expected="a share of the tokens for every recursion, in (0, 1], none above the one before",
                found=f"capacities={given}",
                remedy="give for example capacities=(1.0, 0.667, 0.333)",
            )

    def apply(self, program: Program) -> Program:
        """The routed program."""
        stack = stack_of(self, program, self.stack)
        recursion = recursion_of(self, program, stack, self.loop, self.kv)
        capacities, names = self._capacities(recursion.loop), Names(names_in(program))
        candidates = candidates_of(self, program, recursion.calls, names, self.per)
        build = ExpertChoice(self, recursion, capacities, candidates, names)
        params = {**program.params, **build.params()}
        routed = [*candidates.ops, *build.ops()]
        return replace(with_stack(program, stack, recursion.replaced(stack, routed)), params=params)

    def _capacities(self, loop: Loop) -> tuple[float, ...]:
        count = loop.count
        if not isinstance(count, int):
            remedy = "give the loop a number of iterations"
            raise self.refuse("the loop has no fixed count", expected="an integer", found=str(count), remedy=remedy)
        capacities = self.capacities or tuple((count - r) / count for r in range(count))
        if len(capacities) != count:
            expected, remedy = f"{count} capacities", "give one capacity a recursion"
            raise self.refuse("capacities do not fit the loop", expected=expected, found=str(capacities), remedy=remedy)
        if self.kv != "recursion" and capacities[0] != 1:
            raise self.refuse(
                f'kv="{self.kv}" needs the keys of all tokens at recursion 0',
                expected="a first capacity of 1",
                found=f"capacities={capacities}",
                remedy='begin with 1.0, or use kv="recursion"',
            )
        return capacities
