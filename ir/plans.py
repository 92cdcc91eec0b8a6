"""Plans: how the values of a program behave when it is evaluated token by token.

Values are of three kinds. *Fixed* ones do not depend on arguments that grow (an encoder's states): they are computed
once. *Full* ones lie before the layers (embeddings, masks, rotary tables): they are computed anew at every step, at
full length. *Row* ones are the layers' and what follows them: only the rows of the new tokens are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import fx

from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.ports import ports_of
from depthc.ir.body import Body
from depthc.ir.errors import IncrementalError, SubsetError
from depthc.ir.liveness import reads_of, without_taps
from depthc.ir.masks.masks import masks_of
from depthc.ir.memo import once_a_program
from depthc.ir.program import Block, Call, Loop, Merge, On, Op, Program, Segment, Select, Stack, calls
from depthc.ir.selection import POINTWISE

Kind = Literal["fixed", "full", "rows"]
_ORDER: tuple[Kind, ...] = ("fixed", "full", "rows")


@dataclass(frozen=True, eq=False)
class Plan:
    """How a program is evaluated token by token.

    Attributes:
        token: the size name that grows.
        growing: for every argument that grows, the growing dimensions of each of its leaves.
        kinds: of every value that the program's body writes, and of the arguments.
        body: the program's segments and stacks, without what only taps read.
        reaches: of every call and port, how many of the tokens so far later ones may read; None: all.
    """

    token: str
    growing: Mapping[str, tuple[tuple[int, ...], ...]]
    kinds: Mapping[str, Kind]
    body: tuple[Segment | Stack, ...]
    reaches: Mapping[Call, tuple[int | None, ...]]


def plan_of(program: Program) -> Plan:
    """How to evaluate a program token by token; made once a program.

    Raises:
        IncrementalError: it cannot be.
    """
    return once_a_program(program, "_plan", lambda: _make_plan(program))


def _make_plan(program: Program) -> Plan:
    program = without_taps(program)
    token = _token_size(program)
    growing: dict[str, tuple[tuple[int, ...], ...]] = {}
    kinds: dict[str, Kind] = {}
    leaves = iter(program.signature.inputs)
    for name, spec in zip(program.signature.in_spec.context, program.signature.in_spec.children(), strict=True):
        own = [next(leaves) for _ in range(spec.num_leaves)]
        dims = tuple(tuple(d for d, s in enumerate(leaf.type.shape) if s == token) if leaf.type else () for leaf in own)
        kinds.update((leaf.name, "full" if where else "fixed") for leaf, where in zip(own, dims, strict=True))
        if any(dims):
            growing[name] = dims
    for item in program.body:
        _add_kinds(program, item.ops if isinstance(item, Stack) else (item,), kinds)
    _require_causal(program, kinds)
    for output in program.signature.outputs:
        if isinstance(output, str) and kinds[output] == "full":
            raise IncrementalError(
                f"output {output!r} is computed before the layers, from all tokens at once",
                expected="outputs that the layers compute token by token",
                remedy="capture the model without this output (hidden states, masks)",
            )
    reaches = {call: tuple(mask.reach for mask in masks) for call, masks in masks_of(program).items()}
    return Plan(token, growing, kinds, program.body, reaches)


def _token_size(program: Program) -> str:
    call = next((call for stack in reversed(program.stacks) for call, _ in calls(stack.ops)), None)
    if call is None:
        raise IncrementalError("the program has no layers", remedy="evaluate the whole sequence with run()")
    block = program.blocks[call.block]
    dim = token_dim(block)
    size = block.body.inputs_of("value")[0].type.shape[dim]  # type: ignore[union-attr]
    if not isinstance(size, str) or not size.isidentifier():
        raise IncrementalError(
            f"the program was captured at a fixed length ({size})",
            expected="a token axis of any length",
            remedy="capture with an example whose length may vary; a loop over the length in the model's code fixes it",
        )
    return size


def token_dim(block: Block) -> int:
    """The dimension of the carry that holds the tokens."""
    axes = analyse(block)
    label = axes.labels[block.body.placeholders_of("value")[0]]
    dims = [d for d, dim in enumerate(label) if dim == (axes.token,)]
    if not dims:
        raise IncrementalError(
            f"what flows through block {block.name!r} has no token axis",
            expected="a batch of sequences",
            found=str(block.body.inputs_of("value")[0].type),
            remedy="capture with arguments of a batch and a length above 1",
        )
    return dims[0]


def _add_kinds(program: Program, ops: Sequence[Op | Segment], kinds: dict[str, Kind]) -> None:
    for op in ops:
        match op:
            case Loop():
                _add_kinds(program, op.body, kinds)
            case On():
                _add_kinds(program, op.body, {name: kinds[name] for name in op.reads})
                kinds.update(kinds_of(op, kinds))
            case Select() | Merge():
                found = kinds_of(op, kinds)
                if not is_fixed(found):
                    _require_causal_rule(op, found[op.write])
                kinds.update(found)
            case Segment() | Call():
                found = kinds_of(op, kinds)
                if "rows" in found.values():
                    _require_rows(as_block(program, op, kinds), op, kinds)
                kinds.update(found)


def kinds_of(op: Op, kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    """The kinds of what an op writes, from those of what it reads."""
    match op:
        case Select():
            read = [kinds[name] for name in (op.score, op.judge, op.among, op.within) if name is not None]
            return {op.write: max(read, key=_ORDER.index)}
        case Merge():
            fixed = all(kinds[name] == "fixed" for name in reads_of(op))
            return {op.write: "fixed" if fixed else "rows"}
        case On():
            inner = {name: kinds[name] for name in op.reads}
            for one in op.body:
                inner.update(kinds_of(one, inner))
            return {name: "fixed" if inner[name] == "fixed" else "rows" for name in op.writes}
        case Segment() | Call():
            return dict(zip(op.writes, _kinds_of(op, kinds), strict=True))
    raise TypeError(f"{type(op).__name__} writes no values of its own")


def is_fixed(found: Mapping[str, Kind]) -> bool:
    """Whether all that an op writes is computed once, from arguments that do not grow."""
    return set(found.values()) <= {"fixed"}


def _require_causal_rule(op: Select | Merge, kind: Kind) -> None:
    rule = (op.inference or op.rule) if isinstance(op, Select) else "all"
    name = rule.partition("(")[0]
    counts = name == "stride" and kind == "full"  # positions are those of the whole sequence
    if name not in POINTWISE and not counts:
        raise IncrementalError(
            f"the rule {rule!r} compares tokens with later ones",
            expected="a rule that judges every token by itself: " + ", ".join(POINTWISE),
            found=rule,
            remedy="give the selection a causal rule for inference, or evaluate the whole sequence with run()",
        )


def _kinds_of(op: Segment | Call, kinds: Mapping[str, Kind]) -> tuple[Kind, ...]:
    read = [kinds[name] for name in op.reads]
    if isinstance(op, Call):
        kind: Kind = "fixed" if set(read) <= {"fixed"} else "rows"
        return (kind,) * len(op.writes)
    reach = _inputs_behind(op.body) if "rows" not in read else [range(len(read))] * len(op.writes)
    return tuple(max((read[i] for i in inputs), key=_ORDER.index, default="fixed") for inputs in reach)


@lru_cache(maxsize=256)
def _inputs_behind(body: Body) -> tuple[frozenset[int], ...]:
    """For every result of a body, the value inputs that it depends on."""
    reach: dict[fx.Node, frozenset[int]] = {n: frozenset([i]) for i, n in enumerate(body.placeholders_of("value"))}
    for node in body.nodes:
        reach[node] = frozenset().union(*(reach.get(n, frozenset()) for n in node.all_input_nodes))
    return tuple(reach.get(n, frozenset()) for n in body.results)


def as_block(program: Program, op: Segment | Call, kinds: Mapping[str, Kind]) -> Block:
    """What runs on rows: a call's block, or a segment behind the layers with its row values as carries."""
    return program.blocks[op.block] if isinstance(op, Call) else segment_block(op, tuple(kinds[r] for r in op.reads))


@lru_cache(maxsize=256)
def segment_block(segment: Segment, kinds: tuple[Kind, ...]) -> Block:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    values = segment.body.placeholders_of("value")
    rows = [n for n, kind in zip(values, kinds, strict=True) if kind == "rows"]
    others = [n for n in segment.body.placeholders if n not in rows]
    for node in [*rows, *others, *segment.body.nodes]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in segment.body.results))
    return Block(segment.name, Body(graph), len(rows))


def _require_rows(block: Block, op: Segment | Call, kinds: Mapping[str, Kind]) -> None:
    try:
        analyse(block).require_legal()
    except SubsetError as error:
        raise IncrementalError(
            f"{block.name!r} keeps a state that is not an attention cache: {error.what}",
            where=error.where,
            expected="token-wise ops and attention",
            found=error.found,
            remedy="evaluate the whole sequence with run()",
        ) from error
    sides = [r for r in op.reads[block.carries :] if kinds[r] == "rows"] if isinstance(op, Call) else []
    if sides:
        raise IncrementalError(
            f"{block.name!r} reads {sides[0]!r}, which another layer computes token by token",
            expected="side inputs from before the layers",
            remedy="evaluate the whole sequence with run()",
        )


def _require_causal(program: Program, kinds: Mapping[str, Kind]) -> None:
    masks = masks_of(program)
    for stack in program.stacks:
        for call, _ in calls(stack.ops):
            if kinds.get(call.writes[0], "rows") != "rows":
                continue
            block = program.blocks[call.block]
            for index, port in enumerate(ports_of(block)):
                mask = masks[call][index]
                if not port.cross and not mask.causal:
                    raise IncrementalError(
                        f"attention {index} of {block.name!r} is not causal: its mask is {mask}",
                        where=str(port.exits[0].meta.get("source", "")),
                        expected="a mask under which no token sees a later one",
                        found=str(mask),
                        remedy="evaluate the whole sequence with run()",
                    )
