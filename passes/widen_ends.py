"""The ends of a widened stack: a table and a head of M times the width (recipes: section 6, `wide`).

What lies between the table and the layers (a scale, learned positions), and between the layers and the head (the final
norm), is done to every block. What lies behind the head (a cap, a loss) is done once.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from depthc.ir.body import Body, Input, add_input
from depthc.ir.cost.layers import owner_of
from depthc.ir.liveness import read_first, writes_of
from depthc.ir.params import Param, Ref, Tile
from depthc.ir.program import Program, Segment, Stack
from depthc.ir.types import Type
from depthc.passes.ends import End, Ends
from depthc.passes.glue import aten
from depthc.passes.layers import used_params, without_unused_params


def with_wide_ends(
    ends: Ends, widened: Program, stream: tuple[str, str], states: tuple[str, ...], group: str
) -> Program:
    """The program `widened`, whose layers begin and end with `states` in place of `stream`, with wide ends.

    Raises:
        RecipeError: the ends cannot be found, or the stream is read by others, too.
    """
    (first, last), program, blocks = stream, ends.program, len(states)
    head = ends.head(last)
    table = ends.table(first, program.params[head.name].type.sizes({})[0])
    params = {f"depth.{group}.embedding": _tiled(program, table, blocks)}
    tied = owner_of(program, head.name) == owner_of(program, table.name)
    if not tied:
        params[f"depth.{group}.head"] = _tiled(program, head, blocks, blocks)
    names = next(iter(params)), next(reversed(params))
    parts = {
        table.segment.name: _with_wide_table(table, first, states, names[0], params[names[0]].type),
        head.segment.name: _with_wide_head(head, last, states, names[1], params[names[1]].type, tied),
    }
    body = tuple(parts.get(item.name, item) for item in widened.body)
    made = replace(widened, body=body, params={**widened.params, **params})
    _require_read_once(ends, made, stream)
    return without_unused_params(made, program.params.keys() - used_params(program))


def _require_read_once(ends: Ends, made: Program, stream: tuple[str, str]) -> None:
    """Refuse a program that goes on to read a state of the stream, of which there are now several."""
    ops = [op for item in made.body for op in (item.ops if isinstance(item, Stack) else (item,))]
    written = set().union(*map(writes_of, ops))
    outputs = {name for name in made.signature.outputs if isinstance(name, str)} - written
    left = [name for name in stream if name in (*read_first(ops), *outputs)]
    if left:
        raise ends.one.refuse(
            "a state of the model's width is read besides by the first layer and the head",
            where=ends.stack.name,
            expected="the embedding for the first layer alone, and what the layers end in for the head alone",
            found=", ".join(left),
            remedy=ends.remedy,
        )


def _tiled(program: Program, end: End, blocks: int, over: int = 1) -> Param:
    """A weight [rows, D] `blocks` times side by side: [rows, M D]."""
    narrow = program.params[end.name]
    rows, width = narrow.type.sizes({})
    type = Type(narrow.type.dtype, (rows, blocks * width))
    return Param(type, narrow.kind, Tile(narrow.expr or Ref(end.name), blocks, over))


def _with_wide_table(end: End, first: str, states: tuple[str, ...], name: str, type: Type) -> Segment:
    """The part before the layers: of the table, block i has the columns i D to (i + 1) D."""
    copy = _Copy(end, len(states))
    for node in end.segment.body.placeholders:
        copy.input(name, type) if node is end.slot else copy.add(node)
    width: int = type.shape[1] // len(states)  # type: ignore[operator]
    for node in end.segment.body.nodes:
        copy.add(node)
        if node is end.node:
            found, spans = copy.one.pop(node), [(i * width, (i + 1) * width) for i in range(len(states))]
            copy.many[node] = [copy.op(aten.slice.Tensor, found, -1, *span) for span in spans]
    made = copy.segment(name)
    return replace(made, writes=_put(made.writes, first, states))


def _with_wide_head(end: End, last: str, states: tuple[str, ...], name: str, type: Type, tied: bool) -> Segment:
    """The part behind the layers: all blocks, normed each by itself, side by side, times [W/M ... W/M].

    A tied head is the wide table, and the blocks are divided by M.
    """
    copy, segment = _Copy(end, len(states)), end.segment
    state = segment.body.placeholders_of("value")[segment.reads.index(last)]
    for node in segment.body.placeholders:
        if node is state:
            copy.many[node] = [add_input(copy.graph, Input(x, "value", node.meta["input"].type)) for x in states]
        else:
            copy.input(name, type) if node is end.slot else copy.add(node)
    x: fx.Node = end.node.args[0]  # type: ignore[assignment]
    for node in segment.body.nodes:
        if node is end.node:
            wide = copy.op(aten.cat.default, copy.many.pop(x), -1)
            copy.one[x] = copy.op(aten.div.Tensor, wide, len(states)) if tied else wide
        copy.add(node)
    made = copy.segment(name)
    return replace(made, reads=_put(made.reads, last, states))


class _Copy:
    """A copy of an end's segment; what depends on a node in `many` is copied once a block."""

    def __init__(self, end: End, blocks: int) -> None:
        self.end, self.blocks, self.graph = end, blocks, fx.Graph()
        self.one: dict[fx.Node, fx.Node] = {}
        self.many: dict[fx.Node, list[fx.Node]] = {}

    def input(self, name: str, type: Type) -> None:
        """A wide weight in the place of the end's own."""
        self.one[self.end.slot] = add_input(self.graph, Input(name, "param", type))

    def op(self, target: object, *args: object) -> fx.Node:
        return self.graph.call_function(target, args)  # type: ignore[arg-type]

    def add(self, node: fx.Node) -> None:
        """Copy a node."""

        def copied(block: int) -> fx.Node:
            return self.graph.node_copy(node, lambda n: self.many[n][block] if n in self.many else self.one[n])

        if any(n in self.many for n in node.all_input_nodes):
            self.many[node] = [copied(block) for block in range(self.blocks)]
        else:
            self.one[node] = copied(0)

    def segment(self, name: str) -> Segment:
        """The segment of what was copied, with the wide weight of this name."""
        segment, slots = self.end.segment, self.end.segment.body.placeholders_of("param")
        self.graph.output(tuple(x for n in segment.body.results for x in self.many.get(n) or [self.one[n]]))
        params = (name if n is self.end.slot else old for n, old in zip(slots, segment.params, strict=True))
        return replace(segment, body=Body(self.graph), params=tuple(params))


def _put(names: tuple[str, ...], name: str, states: tuple[str, ...]) -> tuple[str, ...]:
    """Names with those of the blocks in the place of one."""
    at = names.index(name)
    return (*names[:at], *states, *names[at + 1 :])
