"""The loop that a pass routes: tied layers which every iteration runs on some of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from depthc.ir.axes.ports import ports_of
from depthc.ir.program import Call, Kv, Loop, On, Op, Program, Stack
from depthc.ir.types import Type
from depthc.passes.base import Pass
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
    if len(loops) != 1:
        known = ", ".join(op.index for op in stack.ops if isinstance(op, Loop))
        _require_stream(one, stack)
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
            remedy="route a model that does not return or skip to what its inner layers compute",
        )


def _calls(one: Pass, program: Program, loop: Loop, kv: str) -> list[Call]:
    """The layers of the loop, each of which runs on a subset of its tokens."""
    calls = [op for op in loop.body if isinstance(op, Call)]
    if len(calls) < len(loop.body) or any(c.writes != c.reads[:1] for c in calls):
        raise one.refuse(
            "the loop holds more than layers that pass one stream on",
            expected="applications of blocks with one result",
            found=", ".join(type(op).__name__.lower() for op in loop.body),
            remedy="route a loop that tie or loop made, once",
        )
    for call in calls:
        require_subset(one, program, call)
        if kv != "recursion" and any("{" in p for p in call.params):
            remedy = 'tie everything (norms="tied"), or use kv="recursion"'
            raise one.refuse(f'kv="{kv}" needs layers that are tied in all parameters', remedy=remedy)
    return calls
