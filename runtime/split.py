"""Split: a program divided at the boundaries of its sections, one part a device, and the messages between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from depthc.codegen.state_map import sources
from depthc.ir.cost.layers import owner_of
from depthc.ir.errors import IncrementalError
from depthc.ir.liveness import live_body
from depthc.ir.params import Ref
from depthc.ir.plans import plan_of, token_dim
from depthc.ir.program import Call, Op, Program, Segment, Stack
from depthc.ir.restrict import needed
from depthc.ir.sections import Section
from depthc.ir.side_by_side import independent, made_by
from depthc.ir.types import Type
from depthc.passes.layers import used_params

Body = tuple[Segment | Stack, ...]


@dataclass(frozen=True)
class Message:
    """A value that one part makes and another one reads.

    Attributes:
        name: of the value.
        type: of a step of one token: the token axis has the size 1.
        axis: the token axis.
        source, target: the numbers of the parts.
    """

    name: str
    type: Type
    axis: int
    source: int
    target: int

    def rows(self, tokens: int) -> Type:
        """Its type in a step of several tokens, or for a prompt."""
        shape = self.type.shape
        return replace(self.type, shape=(*shape[: self.axis], tokens, *shape[self.axis + 1 :]))


@dataclass(frozen=True, eq=False)
class Part:
    """What one device runs and holds.

    Attributes:
        number: of its section.
        body: of the program's body what it runs: what its layers need of the ops in front of them, its layers, and
            in the last part what follows.
        params: the parameters that it reads.
        weights: the weights that those are made of; a device loads no others.
        bytes: of those parameters; what is tied counts once.
        receives, sends: its messages of a step, in the order in which they are sent.
    """

    number: int
    body: Body
    params: tuple[str, ...]
    weights: tuple[str, ...]
    bytes: int
    receives: tuple[Message, ...]
    sends: tuple[Message, ...]

    @property
    def stack(self) -> Stack:
        """The stack with the layers of its section."""
        return next(item for item in reversed(self.body) if isinstance(item, Stack))

    @property
    def layers(self) -> tuple[Call, ...]:
        """The applications of its section, in order."""
        return tuple(op for op in self.stack.ops if isinstance(op, Call))


@dataclass(frozen=True)
class Split:
    """A program's parts, one a section; prints as a table."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        rows = [("part", "layers", "parameters", "bytes", "sends in a step")]
        for part in self.parts:
            counts = (part.number, len(part.layers), len(part.params), part.bytes)
            sent = "; ".join(f"{m.name} {m.type} to {m.target}" for m in part.sends)
            rows.append((*(f"{n:,}" for n in counts), sent or "-"))  # type: ignore[arg-type]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        return "\n".join("  ".join([*map(str.rjust, row, widths), row[-1]]) for row in rows)


def split(program: Program) -> Split:
    """Divide a program at section boundaries: in a step every part runs at the same time as the others.

    A part is the layers of one section, what they need of the ops in front of them (embeddings and masks are made on
    every device), and in the last part what follows the layers. A message is a value that a section ends with: the
    memory of another one, or what is combined behind the layers. One that serves both in the same part is sent once.

    Raises:
        IncrementalError: the program has no incremental form; its layers need each other in a step (fewer than two
            sections, a lag of 0), or write over one another's values; or a part reads what cannot be sent.

    Example:
        >>> import torch, depthc
        >>> from torch.nn.functional import scaled_dot_product_attention
        >>> class Layer(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv, self.o = torch.nn.Linear(4, 12), torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        ...         return x + self.o(scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        >>> model = torch.nn.Sequential(*[Layer() for _ in range(4)])
        >>> print(split(depthc.compile(model, "stagformer", args=(torch.ones(2, 5, 4),)).program))
        part  layers  parameters  bytes  sends in a step
           0       2           8    640  x0 f32[b, 1, 4] to 1
           1       2          17  1,288  -
    """
    stack, sections = independent(program)
    made = [{name for call in section.calls for name in made_by(program, call)} for section in sections]
    bodies: list[Body] = []
    messages: list[Message] = []
    for target in range(len(sections)):
        body, read = _body(program, stack, sections, target, made[target])
        bodies.append(body)
        for source in (n for n in range(len(sections)) if n != target):
            messages += [_message(program, sections, name, source, target) for name in sorted(made[source] & read)]
    return Split(tuple(_part(program, number, body, messages) for number, body in enumerate(bodies)))


@dataclass(frozen=True)
class _Around:
    """What stands around the layers: items in front of the stack and behind it, and ops of the stack itself."""

    items: Body
    ops: tuple[Op, ...]
    tail: tuple[Op, ...]
    behind: Body


def _around(program: Program, stack: Stack) -> _Around:
    items = plan_of(program).body
    at = next(n for n, item in enumerate(items) if item is stack)
    places = [n for n, op in enumerate(stack.ops) if isinstance(op, Call)]
    return _Around(items[:at], stack.ops[: places[0]], stack.ops[places[-1] + 1 :], items[at + 1 :])


def _body(
    program: Program, stack: Stack, sections: Sequence[Section], number: int, made: set[str]
) -> tuple[Body, set[str]]:
    """What a part runs, and the names that must be there before."""
    around, last = _around(program, stack), number == len(sections) - 1
    outputs = {name for name in program.signature.outputs if isinstance(name, str) and last}
    ops = (*around.ops, *sections[number].calls, *(around.tail if last else ()))
    items = (*around.items, replace(stack, ops=ops), *(around.behind if last else ()))
    return needed(live_body(items, outputs | made)[0], outputs | made)


def _message(program: Program, sections: Sequence[Section], name: str, source: int, target: int) -> Message:
    """What a section ends with under a name, for another part."""
    call = next(call for call in reversed(sections[source].calls) if name in call.writes)
    block = program.blocks[call.block]
    states = dict(zip(call.writes, block.body.inputs_of("value")[: block.carries], strict=False))
    inner = name not in states
    if inner or source > target:
        raise IncrementalError(
            f"section {target} reads {name!r} of section {source}, which cannot be sent",
            where=call.layer or call.block,
            expected="what the layers of an earlier section pass on",
            found="what is read from inside a layer" if inner else "what a later section makes",
            remedy="use depthc.ir.side_by_side.step in one process, or capture the model with its logits alone",
        )
    type, axis = states[name].type, token_dim(block)
    assert isinstance(type, Type)
    return Message(name, replace(type, shape=(*type.shape[:axis], 1, *type.shape[axis + 1 :])), axis, source, target)


def _part(program: Program, number: int, body: Body, messages: Sequence[Message]) -> Part:
    params = sorted(used_params(replace(program, body=body)))
    owners = {owner_of(program, name): program.params[name].type for name in params}
    return Part(
        number,
        body,
        tuple(params),
        tuple(sorted({source for n in params for source in sources(program.params[n].expr or Ref(n))})),
        sum(prod(type.sizes({})) * type.dtype.itemsize for type in owners.values()),
        tuple(m for m in messages if m.target == number),
        tuple(m for m in messages if m.source == number),
    )
