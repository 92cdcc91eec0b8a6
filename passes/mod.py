"""mod: some layers run on a few tokens alone, which a router of each chooses (Mixture-of-Depths, arXiv 2404.02258)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from depthc.ir.names import Names
from depthc.ir.program import Call, Program
from depthc.passes.base import Pass, text_of
from depthc.passes.layers import layers_of, names_in, stack_of, with_stack
from depthc.passes.routed_layer import RoutedLayer
from depthc.passes.subsets import candidates_of, group_of, is_share, numbers_of, require_subsets, stream_of


@dataclass(frozen=True)
class Mod(Pass):
    """Run every other layer on the tokens that its router chose: x + r f(x), r = w . x, with keys of those tokens only.

    In training the best `capacity` of a row's real tokens are chosen, in every layer anew. Outside of training those
    are whose logit is above zero, so that no later token changes an earlier one (capacity 1 takes everyone). A loss
    makes the logits foretell the choice: those of the router, or those of a predictor, through which no gradient
    reaches the stream. Tokens that are not chosen stay as they are.

    Loops that tie made are written out first: every application of a layer has a router of its own.

    Options:
        capacity: the share of the real tokens, in (0, 1].
        period, first: which layers: `first`, `first + period`, and so on.
        layers: which layers, one by one, instead.
        f: "difference", Block(x) - x, which is what a layer of residual sums adds; or "block", Block(x) itself.
        predictor: whether D -> D // 4, GELU, -> 1 decides outside of training, without biases.
        per: "row", or "document": what the capacity is a share of, and tokens are compared within, in training.
        loss: the weight of the loss; by default 0.001, and 1 with a predictor.
        z_loss: the weight of the mean squared logit of the routers.
        warmup: optimizer steps over which the capacity falls from 1 along a cosine; see `DepthModule.set_step`.
        std, seed: of the normal initial values.
        stack: name or number; the last one by default.

    Raises:
        RecipeError: there are no such layers, or one of them mixes tokens other than by attention.

    Example:
        >>> print(Mod(capacity=0.5, layers=(1, 2)))
        mod(capacity=0.5, layers=(1, 2))
    """

    chooses: ClassVar[bool] = True

    capacity: float = 0.125
    period: int = 2
    first: int = 1
    layers: tuple[int, ...] | None = None
    f: str = "difference"
    predictor: bool = False
    per: str = "row"
    loss: float | None = None
    z_loss: float = 0.0
    warmup: int = 0
    std: float = 0.02
    seed: int = 0
    stack: int | str | None = None

    def __post_init__(self) -> None:
        self.require_whole("period", 1)
        self.require_whole("first", 0)
        self.require_one_of("f", ("difference", "block"))
        self.require_one_of("predictor", (False, True))
        self.require_one_of("per", ("row", "document"))
        self.require_whole("warmup", 0)
        for name in ("std", "z_loss", *(["loss"] if self.loss is not None else [])):
            self.require_weight(name)
        if not is_share(self.capacity):
            expected, remedy = "a share of the tokens, in (0, 1]", "give for example capacity=0.125"
            raise self.refuse("option 'capacity'", expected=expected, found=text_of(self.capacity), remedy=remedy)

    def apply(self, program: Program) -> Program:
        """The routed program."""
        stack = stack_of(self, program, self.stack)
        ops, places = layers_of(self, stack)
        layers: list[Call] = [ops[i] for i in places]  # type: ignore[misc]
        numbers = self._numbers(len(layers))
        require_subsets(self, program, layers, numbers)
        names, group = Names(names_in(program)), group_of(program, "mod")
        plain = with_stack(program, stack, ops)
        candidates = candidates_of(self, plain, [layers[n] for n in numbers], names, self.per)
        build, params = RoutedLayer(self, group, candidates, names), dict(program.params)
        for number in numbers:
            params.update(build.params(number, stream_of(program, layers[number])))
        for number in reversed(numbers):
            at, call = places[number], layers[number]
            before = candidates.ops if number == numbers[0] else []
            ops[at : at + 1] = [*before, *build.ops(number, call, stream_of(program, call))]
        return replace(with_stack(program, stack, ops), params=params)

    def _numbers(self, count: int) -> list[int]:
        """The layers that are routed."""
        given = range(self.first, count, self.period) if self.layers is None else self.layers
        found = f"first={self.first}" if self.layers is None else f"layers={self.layers}"
        return numbers_of(self, count, given, f"numbers below {count}, at least one", found)
