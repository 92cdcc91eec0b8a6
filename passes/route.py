"""route: every token goes as deep as its router says (Mixture-of-Recursions, arXiv 2507.10524, expert choice)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.ports import ports_of
from depthc.ir.errors import SubsetError
from depthc.ir.masks.padding import Padding, padding_of
from depthc.ir.names import Names
from depthc.ir.params import Init, Param
from depthc.ir.program import Call, Kv, Loop, Merge, On, Op, Program, Segment, Select, Stack, Tap
from depthc.ir.types import Type
from depthc.passes.base import Pass
from depthc.passes.glue import Glue, aten, wide
from depthc.passes.layers import names_in, stack_of, with_stack
from depthc.passes.routing_glue import COMBINES, GATES, combine, membership_loss, router


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
        kv: "recursion": keys and values of the chosen tokens; "share_first": those of recursion 0, for all tokens.
        loss: the weight of the loss that makes logits foretell the choice.
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
    loss: float = 0.001
    temperature: float = 1.0
    std: float = 0.02
    seed: int = 0
    loop: str | None = None
    stack: int | str | None = None

    def __post_init__(self) -> None:
        self.require_one_of("combine", COMBINES)
        self.require_one_of("gate", GATES)
        self.require_one_of("kv", ("recursion", "share_first"))
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
        loop = self._loop(stack)
        calls = self._calls(program, loop)
        stream = self._stream(program, calls)
        capacities = self._capacities(loop)
        ports = {c.block: len(ports_of(program.blocks[c.block])) for c in calls}
        build = _Region(self, loop, calls, ports, stream, capacities, Names(names_in(program)))
        routed = [*build.before(padding_of(program, calls)), build.loop()]
        at = stack.ops.index(loop)
        params = {**program.params, **build.params(self.seed)}
        return replace(with_stack(program, stack, (*stack.ops[:at], *routed, *stack.ops[at + 1 :])), params=params)

    def _loop(self, stack: Stack) -> Loop:
        loops = [op for op in stack.ops if isinstance(op, Loop) and self.loop in (None, op.index)]
        if len(loops) != 1:
            known = ", ".join(op.index for op in stack.ops if isinstance(op, Loop))
            self._require_stream(stack)
            raise self.refuse(
                f"the stack {stack.name!r} has {'no' if not loops else 'more than one'} loop to route",
                expected="one loop over shared layers" if not loops else f"one of {known}",
                found=known or "layers of their own",
                remedy='tie the layers first: tie(sharing="middle_cycle") | route()' if not loops else "name the loop",
            )
        return loops[0]

    def _require_stream(self, stack: Stack) -> None:
        """Refuse layers of which one writes another name: what it computes is read elsewhere too, so none is a loop."""
        layers = [op for op in stack.ops if isinstance(op, Call)]
        other = next((layer for layer in layers if layer.writes != layers[-1].writes), None)
        if other is not None:
            raise self.refuse(
                f"the layers of the stack {stack.name!r} form no loop",
                where=other.layer,
                expected="layers whose results the next layer alone reads",
                found=f"{', '.join(other.writes)} is read behind the next layer as well",
                remedy="route a model that does not return or skip to what its inner layers compute",
            )

    def _capacities(self, loop: Loop) -> tuple[float, ...]:
        count = loop.count
        if not isinstance(count, int):
            remedy = "give the loop a number of iterations"
            raise self.refuse("the loop has no fixed count", expected="an integer", found=str(count), remedy=remedy)
        capacities = self.capacities or tuple((count - r) / count for r in range(count))
        if len(capacities) != count:
            expected, remedy = f"{count} capacities", "give one capacity a recursion"
            raise self.refuse("capacities do not fit the loop", expected=expected, found=str(capacities), remedy=remedy)
        if self.kv == "share_first" and capacities[0] != 1:
            raise self.refuse(
                'kv="share_first" needs the keys of all tokens at recursion 0',
                expected="a first capacity of 1",
                found=f"capacities={capacities}",
                remedy='begin with 1.0, or use kv="recursion"',
            )
        return capacities

    def _calls(self, program: Program, loop: Loop) -> list[Call]:
        """The layers of the loop, each of which runs on a subset of its tokens."""
        calls = [op for op in loop.body if isinstance(op, Call)]
        if len(calls) < len(loop.body) or any(c.kv or len(c.writes) != 1 or c.writes != c.reads[:1] for c in calls):
            raise self.refuse(
                "the loop holds more than layers that pass one stream on",
                expected="applications of blocks with one result",
                found=", ".join(type(op).__name__.lower() for op in loop.body),
                remedy="route a loop that tie or loop made, once",
            )
        for call in calls:
            axes = analyse(program.blocks[call.block])
            try:
                axes.require_legal()
            except SubsetError as error:
                raise self.refuse(
                    error.what,
                    where=", ".join(filter(None, (call.layer or call.block, error.where))),
                    expected=error.expected,
                    found="; ".join(dict.fromkeys(f"{r.op}: {r.reason}" for r in axes.refusals)),
                    remedy="tie without route, or route layers that mix tokens by attention alone",
                ) from error
            if self.kv == "share_first" and any("{" in p for p in call.params):
                remedy = 'tie everything (norms="tied"), or use kv="recursion"'
                raise self.refuse('kv="share_first" needs layers that are tied in all parameters', remedy=remedy)
        return calls

    def _stream(self, program: Program, calls: Sequence[Call]) -> Type:
        """The type of the hidden states: [batch, tokens, features]."""
        node = program.blocks[calls[0].block].body.placeholders_of("value")[0]
        axes, type = analyse(program.blocks[calls[0].block]), node.meta["input"].type
        if axes.labels[node][:2] != ((axes.batch,), (axes.token,)) or len(type.shape) != 3:
            raise self.refuse(
                "the hidden states have another layout",
                where=calls[0].layer,
                expected="[batch, tokens, features]",
                found=str(type),
                remedy="route a stack whose layers pass on such a value",
            )
        return type


class _Region:
    """Writes the ops of a routed loop."""

    def __init__(
        self,
        one: Route,
        loop: Loop,
        calls: list[Call],
        ports: dict[str, int],
        stream: Type,
        capacities: tuple[float, ...],
        names: Names,
    ) -> None:
        self.one, self.old, self.calls, self.ports = one, loop, calls, ports
        self.stream, self.capacities = stream, capacities
        self.h, self.r = calls[0].writes[0], loop.index
        self.real, self.active, self.chosen, self.y, self.logit = (
            names.new(n) for n in ("real", "active", "chosen", "y", "logit")
        )
        self.names = names

    def before(self, padding: Sequence[Padding]) -> list[Op]:
        """The set of all real tokens, which all others are subsets of."""
        ops: list[Op] = []
        for number, found in enumerate(padding):
            score = found.argument
            if not found.on:
                score = self.names.new("is_token")
                g = Glue()
                ops.append(
                    Segment(
                        "is_token",
                        g.body(g.op(aten.eq.Scalar, g.value("mask", found.type), 0)),
                        (found.argument,),
                        (score,),
                    )
                )
            ops.append(Select(self.real, "threshold(0)", score, self.real if number else None))
        ops = ops or [Select(self.real, "all", self.h)]
        return [*ops, Select(self.active, "all", among=self.real)]

    def loop(self) -> Loop:
        """One recursion: select, run on the chosen tokens, merge, and say how well the router foretold it."""
        top, floor = list(self.capacities), ["-inf" if c == 1 else "0.0" for c in self.capacities]
        weight = (f"depth.{self.r}.{{{self.r}}}.router.weight",)
        body = combine(self.one.combine, self.stream, self.one.gate, self.one.alpha)
        scored = body is not None and len(body.inputs_of("value")) == 3
        ops: list[Op] = [
            Segment("router", router(self.stream, self.one.temperature), (self.h,), (self.logit,), weight),
            Select(
                self.chosen,
                f"topk({top}[{self.r}])",
                self.logit,
                self.active,
                self.real,
                f"threshold([{', '.join(floor)}][{self.r}])",
            ),
            On(self.chosen, self._reads(), (self.y,), tuple(self._layers())),
            Merge(self.h, self.h, self.y, self.chosen, body, (self.logit,) if scored else ()),
            *self._taps(),
            Select(self.active, "all", among=self.chosen),
        ]
        return replace(self.old, body=tuple(ops))

    def _reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for call in self.calls for name in call.reads))

    def _layers(self) -> list[Op]:
        """The layers on the rows of the chosen tokens."""
        ops: list[Op] = []
        for number, call in enumerate(self.calls):
            reads = (self.h if not number else self.y, *call.reads[1:])
            ops.append(replace(call, reads=reads, writes=(self.y,), kv=self._kv(number, call)))
        return ops

    def _kv(self, number: int, call: Call) -> tuple[Kv, ...]:
        if self.one.kv == "recursion":
            return ()
        return tuple(Kv("share", f"{self.r}.{number}.{port}") for port in range(self.ports[call.block]))

    def _taps(self) -> list[Op]:
        at = f"{self.r}.{{{self.r}}}"
        tapped = {"logit": self.logit, "candidates": self.active, "chosen": self.chosen}
        taps: list[Op] = [Tap(f"route.{at}.{what}", value) for what, value in tapped.items()]
        if self.one.loss:
            loss = self.names.new("loss")
            reads = (self.logit, self.chosen, self.active)
            taps.append(Segment("membership_loss", membership_loss(self.stream, self.one.loss), reads, (loss,)))
            taps.append(Tap(f"loss.{at}.router", loss))
        return taps

    def params(self, seed: int) -> dict[str, Param]:
        """One router a recursion."""
        type = Type(wide(self.stream.dtype), self.stream.shape[2:])
        law = f"normal({self.one.std})" if self.one.std else "zeros"
        return {
            f"depth.{self.r}.{r}.router.weight": Param(type, expr=Init(type, law, seed + r))
            for r in range(len(self.capacities))
        }
