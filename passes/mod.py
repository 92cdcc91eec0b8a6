"""mod: some layers run on a few tokens alone, which a router of each chooses (Mixture-of-Depths, arXiv 2404.02258)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from depthc.ir.body import Body
from depthc.ir.names import Names
from depthc.ir.params import Init, Param
from depthc.ir.program import Call, Op, Program, Segment, Select, Tap
from depthc.ir.types import Type
from depthc.passes.base import Pass, text_of
from depthc.passes.glue import Glue, aten, wide
from depthc.passes.layers import layers_of, names_in, stack_of, with_stack
from depthc.passes.routing_glue import combine, membership_loss, router
from depthc.passes.subsets import group_of, is_share, on_chosen, real_tokens, require_subsets, stream_of


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
        loss: the weight of the loss; by default 0.001, and 1 with a predictor.
        std, seed: of the normal initial values.
        stack: name or number; the last one by default.

    Raises:
        RecipeError: there are no such layers, or one of them mixes tokens other than by attention.

    Example:
        >>> print(Mod(capacity=0.5, layers=(1, 2)))
        mod(capacity=0.5, layers=(1, 2))
    """

    capacity: float = 0.125
    period: int = 2
    first: int = 1
    layers: tuple[int, ...] | None = None
    f: str = "difference"
    predictor: bool = False
    loss: float | None = None
    std: float = 0.02
    seed: int = 0
    stack: int | str | None = None

    def __post_init__(self) -> None:
        self.require_whole("period", 1)
        self.require_whole("first", 0)
        self.require_one_of("f", ("difference", "block"))
        self.require_one_of("predictor", (False, True))
        self.require_weight("std")
        if self.loss is not None:
            self.require_weight("loss")
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
        before, real = real_tokens(plain, [layers[n] for n in numbers], names)
        build, params = _Layer(self, group, real, names), dict(program.params)
        for number in reversed(numbers):
            at, call = places[number], layers[number]
            stream = stream_of(program, call)
            ops[at : at + 1] = [*(before if number == numbers[0] else ()), *build.ops(number, call, stream)]
        for number in numbers:
            params.update(build.params(number, stream_of(program, layers[number])))
        return replace(with_stack(program, stack, ops), params=params)

    def _numbers(self, count: int) -> list[int]:
        """The layers that are routed."""
        given = range(self.first, count, self.period) if self.layers is None else self.layers
        known = range(count)
        if not isinstance(given, range | tuple) or not given or not all(type(n) is int and n in known for n in given):
            raise self.refuse(
                f"the stack of {count} layers has no such layers",
                expected=f"numbers below {count}, at least one",
                found=f"first={self.first}" if self.layers is None else f"layers={self.layers}",
                remedy=f"give for example layers=({count - 1},)",
            )
        return sorted(set(given))


class _Layer:
    """Writes the ops of a routed layer."""

    def __init__(self, one: Mod, group: str, real: str, names: Names) -> None:
        self.one, self.group, self.real, self.names = one, group, real, names
        self.chosen, self.y, self.logit, self.loss = map(names.new, ("chosen", "y", "logit", "loss"))
        self.judge = names.new("judge") if one.predictor else self.logit

    def ops(self, number: int, call: Call, stream: Type) -> Iterator[Op]:
        """Score, select, run on the chosen tokens, merge, and say how well the choice was foretold."""
        one, at, x = self.one, f"{self.group}.{number}", call.reads[:1]
        yield Segment("router", router(stream, "linear", 1.0), x, (self.logit,), (f"depth.{at}.router.weight",))
        if one.predictor:
            weights = tuple(f"depth.{at}.predictor.{name}.weight" for name in ("up", "down"))
            yield Segment("predictor", predictor(stream), x, (self.judge,), weights, precise=True)
        later = "all" if one.capacity == 1 else "threshold(0.0)"
        judge = self.judge if one.predictor else None
        yield Select(self.chosen, f"topk({one.capacity})", self.logit, self.real, self.real, later, judge)
        body = combine("delta" if one.f == "difference" else "weighted", stream, "none", 1.0)
        yield from on_chosen(call, stream, self.chosen, self.y, self.names, body, (self.logit,))
        yield from self._taps(at, stream)

    def _taps(self, at: str, stream: Type) -> Iterator[Op]:
        tapped = {"logit": self.judge, "candidates": self.real, "chosen": self.chosen}
        yield from (Tap(f"route.{at}.{what}", value) for what, value in tapped.items())
        default = 1.0 if self.one.predictor else 0.001
        weight = default if self.one.loss is None else self.one.loss
        if weight:
            reads = (self.judge, self.chosen, self.real)
            yield Segment("membership_loss", membership_loss(stream, weight), reads, (self.loss,))
            yield Tap(f"loss.{at}.{'predictor' if self.one.predictor else 'router'}", self.loss)

    def params(self, number: int, stream: Type) -> dict[str, Param]:
        """The router, and the predictor."""
        law = f"normal({self.one.std})" if self.one.std else "zeros"
        width: int = stream.shape[2]  # type: ignore[assignment]
        shapes: dict[str, tuple[int, ...]] = {"router": (width,)}
        if self.one.predictor:
            shapes |= {"predictor.up": (hidden(width), width), "predictor.down": (hidden(width),)}
        made = {}
        for seed, (name, shape) in enumerate(shapes.items(), self.one.seed + number * len(shapes)):
            type = Type(wide(stream.dtype), shape)
            made[f"depth.{self.group}.{number}.{name}.weight"] = Param(type, expr=Init(type, law, seed))
        return made


def hidden(width: int) -> int:
    """The hidden width of a predictor."""
    return max(1, width // 4)


def predictor(stream: Type) -> Body:
    """logit = w . gelu(W sg(x)): [batch, tokens], with an exact GELU; sg stops gradients."""
    g, dtype, width = Glue(), wide(stream.dtype), stream.shape[2]
    h = g.value("h", stream)
    up = g.param("up", Type(dtype, (hidden(width), width)))  # type: ignore[arg-type]
    down = g.param("down", Type(dtype, (hidden(width),)))  # type: ignore[arg-type]
    x = g.op(aten.to.dtype, g.op(aten.detach.default, h), dtype)  # autocast may have made it another than its type's
    x = g.op(aten.gelu.default, g.op(aten.linear.default, x, up))
    return g.body(g.op(aten.sum.dim_IntList, g.op(aten.mul.Tensor, x, down), [-1]))
