"""Cuts: the sublayers of a block, and the parts of it that run on a subset of the tokens.

Between the carry and the result there are points through which everything passes: after the attention is added to
the residual, after the MLP is. A parallel block has only its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from torch import fx

from depthc.ir.axes.analysis import Axes, analyse
from depthc.ir.axes.ops import is_tensor, op_name
from depthc.ir.axes.ports import PRODUCTS, ports_of
from depthc.ir.body import Body, behind
from depthc.ir.dominators import PostDominators
from depthc.ir.memo import once
from depthc.ir.program import Block

_PROJECTIONS = PRODUCTS | {"grouped_mm", "convolution", "conv1d", "conv2d"}


@dataclass(frozen=True, eq=False)
class Cut:
    """One sublayer: everything between two points of the residual stream.

    Attributes:
        start: the value that it begins with; all that it reads of the carry comes through it.
        end: its result.
        nodes: its ops that depend on the carry, in execution order.
        mixes: whether tokens read each other in it.
        legal: whether it runs on a subset of the tokens.
    """

    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    mixes: bool
    legal: bool


@dataclass(frozen=True, eq=False)
class LegalSpan:
    """Neighbouring sublayers that run on a subset of the tokens, as a block of their own.

    Attributes:
        block: its one carry is the value at `start`.
        first, last: numbers of its first and last sublayer in `cuts_of` the whole block.
        start, end: the values of the whole block between which it lies.
        values, params, consts: which of the whole block's inputs it takes, by their number within their kind; the
            first value, the carry, is not in `values`.
    """

    block: Block
    first: int
    last: int
    start: fx.Node
    end: fx.Node
    values: tuple[int, ...]
    params: tuple[int, ...]
    consts: tuple[int, ...]


def cuts_of(block: Block) -> tuple[Cut, ...]:
    """The sublayers of a block, first to last."""
    return once(block, "cuts", lambda: tuple(_Sublayers(block).cuts()))


def legal_spans(block: Block) -> tuple[LegalSpan, ...]:
    """The longest runs of sublayers that run on a subset of the tokens; a legal block is one of them.

    A block that scans or convolves along the tokens in one sublayer still offers its others.
    """
    cuts = cuts_of(block)
    found: list[LegalSpan] = []
    for legal, group in groupby(enumerate(cuts), lambda item: item[1].legal):
        numbers = [i for i, _ in group]
        if legal:
            found.extend(_offer(block, cuts, numbers))
    return tuple(found)


def _offer(block: Block, cuts: tuple[Cut, ...], numbers: list[int]) -> Iterator[LegalSpan]:
    """A run as one span, or sublayer by sublayer if only some are legal on their own."""
    span = _span(block, cuts, numbers)
    if analyse(span.block).legal:
        yield span
    elif len(numbers) > 1:
        for number in numbers:
            yield from _offer(block, cuts, [number])


class _Sublayers:
    def __init__(self, block: Block) -> None:
        self.block, self.axes = block, analyse(block)
        self.result, self.carry = block.body.results[0], block.body.placeholders_of("value")[0]
        self.attending = {n for port in ports_of(block) for n in port.region}
        self.refused = {r.node for r in self.axes.refusals}

    def cuts(self) -> Iterator[Cut]:
        """Merge what lies between two points until it holds a projection."""
        points = self._points()
        groups: list[tuple[fx.Node, list[fx.Node]]] = []
        pending: list[fx.Node] = []
        for end, nodes in points:
            pending += nodes
            if any(map(self._projects, pending)):
                groups.append((end, pending))
                pending = []
            elif groups:
                groups[-1] = (end, groups[-1][1] + pending)
                pending = []
        if pending:
            groups.append((self.result, pending))
        start = self.carry
        for end, nodes in groups:
            mixes = any(n in self.attending or n in self.refused for n in nodes)
            legal = None not in self.refused and not any(n in self.refused for n in nodes)
            yield Cut(start, end, tuple(nodes), mixes, legal)
            start = end

    def _points(self) -> list[tuple[fx.Node, list[fx.Node]]]:
        """Points of the residual stream, each with the ops since the one before."""
        axes, moving = self.axes, self.axes.moving
        nodes = [n for n in self.block.body.graph.nodes if n in moving]
        tree = PostDominators(nodes, self.result, lambda n: [s for s in n.all_input_nodes if s in moving])
        if self.block.carries > 1 or self.carry not in tree or self.result not in moving:
            return [(self.result, [n for n in nodes if n.op == "call_function"])]
        wide = axes.probe.values[self.carry]
        chain = [n for n in tree.chain(self.carry) if self._like(n, wide)]
        at = {node: i for i, node in enumerate(chain)}
        owner: dict[fx.Node, int] = {}
        for node in reversed(nodes):
            inner = (
                owner.get(tree.parent[node], len(chain) - 1)
                if node in tree and node is not self.result
                else len(chain) - 1
            )
            owner[node] = at.get(node, inner)
        for node in nodes:  # what only another result reads belongs to the sublayer that computes it
            if node not in tree:
                owner[node] = max(owner[s] for s in node.all_input_nodes if s in moving)
        return [(end, [n for n in nodes if owner[n] == i and n is not self.carry]) for i, end in enumerate(chain) if i]

    def _like(self, node: fx.Node, carry: object) -> bool:
        value = self.axes.probe.values[node]
        same = is_tensor(value) and not isinstance(value, list | tuple)
        return node is self.result or (same and value.shape == carry.shape and value.dtype == carry.dtype)  # type: ignore

    def _projects(self, node: fx.Node) -> bool:
        if node in self.refused:
            return True
        return op_name(node) in _PROJECTIONS and any(n not in self.axes.moving for n in node.all_input_nodes)


def _span(block: Block, cuts: tuple[Cut, ...], numbers: list[int]) -> LegalSpan:
    body, start, end = block.body, cuts[numbers[0]].start, cuts[numbers[-1]].end
    whole = analyse(block)
    needed = _cone(whole, body, start, end)
    graph = fx.Graph()
    carry = body.placeholders_of("value")[0]
    copies: dict[fx.Node, fx.Node] = {}
    for node in body.placeholders:
        if node in needed or node is carry:
            copies[node] = graph.node_copy(node)
    copies[start] = copies[carry]
    for node in body.nodes:
        if node in needed and node is not start:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output((copies[end],))
    chosen = {
        kind: tuple(i for i, n in enumerate(body.placeholders_of(kind)) if n in needed and n is not carry)
        for kind in ("value", "param", "const")
    }
    part = Block(f"{block.name}_{numbers[0]}_{numbers[-1]}", Body(graph))
    full = len(numbers) == len(cuts) and len(body.results) == 1
    return LegalSpan(
        block if full else part, numbers[0], numbers[-1], start, end, chosen["value"], chosen["param"], chosen["const"]
    )


def _cone(axes: Axes, body: Body, start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Everything that `end` needs once `start` is known; sizes of the carry are those of `start`."""
    return behind([end], {start}) - {start}
