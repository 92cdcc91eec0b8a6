"""Pieces of a block as blocks of their own, that run apart from each other.

What a layer keeps of a state is one. Of a layer that has a cross-attention more than another one there are three: what
stands in front of it, it, and what follows. So layers that are alike but for it can run the others together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.caches import cached_of
from depthc.ir.axes.ops import op_name
from depthc.ir.body import Body, Input, InputKind, add_input, behind, reached
from depthc.ir.memo import once
from depthc.ir.program import Block


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a block as a block of its own.

    Attributes:
        block: its carries are `takes`, its results `makes`.
        takes, makes: states, as nodes of the whole block.
        ports: the ports of the whole block whose keys are made in it, by number.
        values, params, consts: the whole block's inputs that it reads, by number; no carries.
    """

    block: Block
    takes: tuple[fx.Node, ...]
    makes: tuple[fx.Node, ...]
    ports: tuple[int, ...]
    values: tuple[int, ...]
    params: tuple[int, ...]
    consts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Pieces:
    """A layer with a cross-attention, in three pieces.

    Attributes:
        front: what is in front of the cross-attention; None where that stands first.
        crossing: makes `after` of `before`.
        rest: what follows, up to the layer's result.
        before, after: the state without what the cross-attention adds, and with it.
    """

    front: Piece | None
    crossing: Piece
    rest: Piece
    before: fx.Node
    after: fx.Node

    @property
    def shared(self) -> tuple[Piece, ...]:
        """The pieces that the layer without a cross-attention has too."""
        return (self.rest,) if self.front is None else (self.front, self.rest)


def pieces_of(layer: Block, crossed: Block) -> Pieces | None:
    """The pieces of a layer with a cross-attention; None if it is not `layer` but for that.

    Args:
        layer: it reads one state, its only carry.
        crossed: its carries are the state and what the cross-attention reads.
    """
    return once(crossed, "pieces", lambda: _pieces(layer, crossed), layer)


def _pieces(layer: Block, crossed: Block) -> Pieces | None:
    body, moving, labels = crossed.body, analyse(crossed).moving, analyse(crossed).labels
    state, *memory = body.placeholders_of("value")[: crossed.carries]
    if not _extends(layer.body, body, crossed.carries):
        return None
    for before, after in _joins(layer, crossed, frozenset(memory)):
        front, rest = up_to(crossed, [before], {state}), up_to(crossed, [body.results[0]], {after})
        late = rest | up_to(crossed, [after], {before, *memory})
        live = [n for n in (state, *body.nodes) if n in front & moving and (n is before or {*n.users} & (late - front))]
        if any(labels[n] != labels[state] for n in (*live, after)):
            continue
        made = [n for n in live if n is not state]
        return Pieces(
            piece_of(crossed, "front", [state], made) if made else None,
            piece_of(crossed, "crossing", [*memory, *live], [after]),
            piece_of(crossed, "rest", [after, *live], [body.results[0]]),
            before,
            after,
        )
    return None


def _extends(less: Body, more: Body, carries: int) -> bool:
    """Whether a body takes what another one does, in its order, and more behind it; of states also in front."""
    values, others = less.inputs_of("value"), more.inputs_of("value")
    kinds: tuple[InputKind, ...] = ("param", "const")
    same = all(more.inputs_of(kind)[: len(less.inputs_of(kind))] == less.inputs_of(kind) for kind in kinds)
    return same and values[:1] == others[:1] and values[1:] == others[carries : carries + len(values) - 1]


def _joins(layer: Block, crossed: Block, memory: frozenset[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs of a state and what it is with the cross-attention, for which the layer computes the same from either."""
    body, result = crossed.body, crossed.body.results[0]
    on_the_way = [n for n in body.nodes if n in behind([result]) and behind([n]) & memory]
    for after in (n for n in on_the_way if not behind([result], {n}) & memory):
        for before in (n for n in after.all_input_nodes if not behind([n]) & memory):
            if _without(layer, crossed, before, after) == layer.body:
                yield before, after


def _without(layer: Block, crossed: Block, before: fx.Node, after: fx.Node) -> Body:
    """A block in which a state takes the place of what it is with the cross-attention."""
    body = crossed.body
    needed = behind([body.results[0]], {after}) | behind([before])
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in (*body.placeholders, *body.nodes):
        if node is after:
            copies[node] = copies[before]
        elif node in needed or node.meta.get("input") in layer.body.inputs:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output((copies[body.results[0]],))
    return Body(graph)


def up_to(block: Block, ends: Iterable[fx.Node], states: set[fx.Node]) -> set[fx.Node]:
    """What `ends` are computed from, up to states. The sizes of any state are those of all."""
    labels = analyse(block).labels
    label = labels[block.body.placeholders_of("value")[0]]

    def sources(node: fx.Node) -> Iterable[fx.Node]:
        sized = op_name(node) == "sym_size" and labels.get(node.args[0]) == label  # type: ignore[arg-type]
        return () if node in states or sized else node.all_input_nodes

    return reached(ends, sources)


def piece_of(block: Block, name: str, states: Sequence[fx.Node], makes: Sequence[fx.Node]) -> Piece:
    """What computes some values of a block from states, those of them that it needs; at least one."""
    body, needed = block.body, up_to(block, makes, {*states})
    takes = tuple(n for n in states if n in needed)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    type = body.inputs_of("value")[0].type
    for number, node in enumerate(takes):
        copies[node] = add_input(graph, Input(f"state{number}", "value", type))

    def copied(node: fx.Node) -> fx.Node:
        return copies.get(node, copies[takes[0]])  # of a state that is not taken only sizes are read

    for node in (*body.placeholders, *body.nodes):
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copied)
    graph.output(tuple(copies[n] for n in makes))
    carries = body.placeholders_of("value")[: block.carries]

    def chosen(kind: InputKind) -> tuple[int, ...]:
        return tuple(i for i, n in enumerate(body.placeholders_of(kind)) if n in needed and n not in carries)

    ports = tuple(i for i, own in enumerate(cached_of(block)) if {c.node for c in own} <= needed - {*takes})
    piece = Block(f"{block.name}_{name}", Body(graph), len(takes))
    return Piece(piece, takes, tuple(makes), ports, chosen("value"), chosen("param"), chosen("const"))
