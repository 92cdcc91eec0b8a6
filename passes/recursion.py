"""The loop that a pass routes: tied layers which every iteration runs on some of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from depthc.ir.axes.ports import ports_of
from depthc.ir.program import Call, Kv, Loop, On, Op, Program, Segment, Stack
from depthc.ir.types import Type
from depthc.passes.base import Pass
from depthc.passes.layers import segments_between
from depthc.passes.subsets import require_subset, stream_of

KEYS = ("recursion", "share_first", "update")
_MODES = {"share_first": "share", "update": "overlay"}


@dataclass(frozen=True)
class Recursion:
    """A loop that may be routed.

    Attributes:
        loop, calls: the loop, and its layers.
        ports: how many attention ports each block has.
        stream: the type of the hidden states: [batch, tokens, features].
        kv: whose keys a recursion reads: "recursion", "share_first" or "update" (recipes: section 4).
    """

    loop: Loop
    calls: Sequence[Call]
    ports: dict[str, int]
    stream: Type
    kv: str

    @property
    def h(self) -> str:
        """The name of the stream."""
        return self.calls[0].writes[0]

    def on(self, tokens: str, y: str) -> On:
        """The layers on the rows of a token set; their result is `y`."""
        ops: list[Op] = []
        for number, call in enumerate(self.calls):
            reads = (self.h if not number else y, *call.reads[1:])
            ops.append(replace(call, reads=reads, writes=(y,), kv=self._plans(number, call)))
        reads = tuple(dict.fromkeys(name for call in self.calls for name in call.reads))
        return On(tokens, reads, (y,), tuple(ops))

    def _plans(self, number: int, call: Call) -> tuple[Kv, ...]:
        if self.kv == "recursion":
            return ()
        slots = (f"{self.loop.index}.{number}.{port}" for port in range(self.ports[call.block]))
        return tuple(Kv(_MODES[self.kv], slot) for slot in slots)  # type: ignore[arg-type]

    def replaced(self, stack: Stack, ops: Sequence[Op]) -> tuple[Op, ...]:
        """The ops of the stack with others in place of the loop."""
        at = stack.ops.index(self.loop)
        return (*stack.ops[:at], *ops, *stack.ops[at + 1 :])


def recursion_of(one: Pass, program: Program, stack: Stack, name: str | None, kv: str) -> Recursion:
    """The loop of a stack, by its index or the only one, with layers that run on any subset of their tokens.

    Raises:
        RecipeError: there is no such loop, or its layers do not.
    """
    loop = _loop(one, stack, name)
    calls = _calls(one, program, loop, kv)
    ports = {call.block: len(ports_of(program.blocks[call.block])) for call in calls}
    return Recursion(loop, calls, ports, stream_of(program, calls[0]), kv)


def _loop(one: Pass, stack: Stack, name: str | None) -> Loop:
    loops = [op for op in stack.ops if isinstance(op, Loop) and name in (None, op.index)]
    if not loops and name is None:
        _require_plain(one, stack)
        _require_stream(one, stack)
    if len(loops) != 1:
        known = ", ".join(op.index for op in stack.ops if isinstance(op, Loop))
        raise one.refuse(
            f"the stack {stack.name!r} has {'no' if not loops else 'more than one'} loop to route",
            expected="one loop over shared layers" if not loops else f"one of {known}",
            found=known or "layers of their own",
            remedy='tie the layers first: tie(sharing="middle_cycle") | route()' if not loops else "name the loop",
        )
    return loops[0]


def _require_stream(one: Pass, stack: Stack) -> None:
    """Refuse layers of which one writes another name: what it computes is read elsewhere too, so none is a loop."""
    layers = [op for op in stack.ops if isinstance(op, Call)]
    other = next((layer for layer in layers if layer.writes != layers[-1].writes), None)
    if other is not None:
        raise one.refuse(
            f"the layers of the stack {stack.name!r} form no loop",
            where=other.layer,
            expected="layers whose results the next layer alone reads",
            found=f"{', '.join(other.writes)} is read behind the next layer as well",
            remedy=_section(one, layers)
            or "route a model that does not return or skip to what its inner layers compute",
        )


def _section(one: Pass, layers: Sequence[Call]) -> str:
    """How to make a loop of the first layers in a row that pass one state on, as a staggered stack does; "" if none."""
    for start, first in enumerate(layers):
        row = list(takewhile(lambda call, state=first.writes: call.writes == state, layers[start:]))  # type: ignore[misc]
        if len(row) > 1 and len(first.writes) == 1:
            keep = (start, len(layers) - start - len(row))
            tied = f'tie(sharing="middle_cycle", keep={keep})'
            return f"tie the layers between which one state flows: {tied} | {one.title}()"
    return ""


def _require_plain(one: Pass, stack: Stack) -> None:
    """Refuse layers among which a pass has put ops of its own: every application is then one of its own."""
    chosen = next((op for op in stack.ops if isinstance(op, On)), None)
    glue = next((op for op in segments_between(stack.ops) if any(p.startswith("depth.") for p in op.params)), None)
    found = "layers that run on some of their tokens" if chosen else glue and f"{glue.name} between the layers"
    if found:
        raise one.refuse(
            f"the stack {stack.name!r} has no loop to route, as it has been rewritten before",
            expected="a loop over layers alone",
            found=found,
            remedy=f"leave out {one.title}: tokens are chosen already" if chosen else "use mod(), which needs no loop",
        )


def _calls(one: Pass, program: Program, loop: Loop, kv: str) -> list[Call]:
    """The layers of the loop, each of which runs on a subset of its tokens."""
    calls = [op for op in loop.body if isinstance(op, Call)]
    if len(calls) < len(loop.body) or any(c.writes != c.reads[:1] for c in calls):
        raise one.refuse(
            "the loop holds more than layers that pass one stream on",
            expected="applications of blocks with one result",
            found=", ".join(_kind(op) for op in loop.body),
            remedy=_plainer(loop),
        )
    for call in calls:
        require_subset(one, program, call)
        if kv != "recursion" and any("{" in p for p in call.params):
            remedy = 'tie everything (norms="tied"), or use kv="recursion"'
            raise one.refuse(f'kv="{kv}" needs layers that are tied in all parameters', remedy=remedy)
    return calls


def _plainer(loop: Loop) -> str:
    """What to do about a loop that holds more than layers."""
    if any(isinstance(op, On) for op in loop.body):
        return "route a loop that tie or loop made, once"
    if any(isinstance(op, Segment) for op in loop.body):
        return "use mod(), which needs no loop"
    return "route a loop of layers that pass one state on"


def _kind(op: Op) -> str:
    """What an op is; of a layer with more results than one, these too."""
    name = type(op).__name__.lower()
    return f"{name} of {', '.join(op.writes)}" if isinstance(op, Call) and len(op.writes) > 1 else name
