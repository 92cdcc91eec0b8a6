"""route: every token goes as deep as its router says (Mixture-of-Recursions, arXiv 2507.10524, expert choice)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.ports import ports_of
from depthc.ir.errors import SubsetError
from depthc.ir.masks.documents import Documents, documents_of
from depthc.ir.masks.padding import padding_of
from depthc.ir.names import Names
from depthc.ir.program import Call, Loop, Program, Stack
from depthc.ir.types import Type
from depthc.passes.base import Pass
from depthc.passes.expert_choice import ExpertChoice
from depthc.passes.layers import names_in, stack_of, with_stack
from depthc.passes.routing_glue import COMBINES, GATES, ROUTERS


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
        self.require_one_of("kv", ("recursion", "share_first", "update"))
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
        loop = self._loop(stack)
        calls = self._calls(program, loop)
        stream = self._stream(program, calls)
        capacities = self._capacities(loop)
        ports = {c.block: len(ports_of(program.blocks[c.block])) for c in calls}
        documents = self._documents(program, calls)
        build = ExpertChoice(self, loop, calls, ports, stream, capacities, Names(names_in(program)), documents)
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
        if self.kv != "recursion" and capacities[0] != 1:
            raise self.refuse(
                f'kv="{self.kv}" needs the keys of all tokens at recursion 0',
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
            if self.kv != "recursion" and any("{" in p for p in call.params):
                remedy = 'tie everything (norms="tied"), or use kv="recursion"'
                raise self.refuse(f'kv="{self.kv}" needs layers that are tied in all parameters', remedy=remedy)
        return calls

    def _documents(self, program: Program, calls: Sequence[Call]) -> Documents | None:
        """What divides rows into documents, if tokens are chosen within each."""
        if self.per == "row":
            return None
        found = documents_of(program, calls)
        if len(found) != 1:
            raise self.refuse(
                'per="document" needs a model whose masks keep documents apart',
                where=calls[0].layer,
                expected="one argument with an entry a token: the ids of documents, or positions that begin anew",
                found=", ".join(d.argument for d in found) or "no such argument",
                remedy='capture the model with packed rows and that argument, or use per="row"',
            )
        return found[0]

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
