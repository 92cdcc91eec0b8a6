"""What a port keeps of a token so that later tokens can attend to it.

It is the cheapest set of values, in elements per token, through which everything passes on its way from the carry to
the keys and values: a minimum vertex cut. For grouped queries that is before the heads are repeated, for latent
attention it is the latent. The ops behind the cut are run again for all keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import networkx as nx
from torch import fx

from depthc.ir.axes.analysis import Axes, analyse
from depthc.ir.axes.labels import Atom, Label
from depthc.ir.axes.ops import op_name
from depthc.ir.axes.ports import PRODUCTS, Port, ports_of
from depthc.ir.body import reached
from depthc.ir.memo import once
from depthc.ir.program import Block


@dataclass(frozen=True, eq=False)
class Cached:
    """One tensor that a port caches: the value of `node`, with a row a key on dimension `dim`.

    `batch` is its batch dimension; None where it has none. Where tokens share their dimension with others (heads
    merged into the batch), `dim` is that dimension.
    """

    node: fx.Node
    label: Label
    dim: int
    batch: int | None
    elements: int

    @property
    def alone(self) -> bool:
        """Whether the rows have a dimension of their own, from which some can be cut."""
        return len(self.label[self.dim]) == 1


def cached_of(block: Block) -> tuple[tuple[Cached, ...], ...]:
    """What each port of a block caches; computed once a block body."""
    axes, ports = analyse(block), ports_of(block)
    return once(block, "cached", lambda: tuple(_cached(axes, port, ports) for port in ports))


def bounds(block: Block, reaches: Sequence[int | None]) -> list[int | None]:
    """How many rows every port keeps at most: its reach, if rows can be cut from all that it caches; None: all."""
    ports = zip(ports_of(block), cached_of(block), reaches, strict=True)
    return [None if port.cross or not all(c.alone for c in own) else reach for port, own, reach in ports]


def _cached(axes: Axes, port: Port, ports: Iterable[Port]) -> tuple[Cached, ...]:
    nodes = _Cutter(axes, port, ports).cut()
    return tuple(_describe(axes, port, node) for node in nodes)


def _describe(axes: Axes, port: Port, node: fx.Node) -> Cached:
    label: Label = axes.labels[node]
    dim = next(d for d, atoms in enumerate(label) if _row_axis(axes, port) in atoms)
    batch = next((d for d, atoms in enumerate(label) if axes.batch in atoms), None)
    return Cached(node, label, dim, batch, _elements(axes, port, label))


def _row_axis(axes: Axes, port: Port) -> Atom:
    """The axis that a cached value has a row for: tokens, or the foreign axis of cross-attention."""
    return port.axis if port.cross else axes.token


def _elements(axes: Axes, port: Port, label: Label) -> int:
    """Elements of a value per key."""
    return prod(a.size for dim in label for a in dim if a not in (axes.batch, _row_axis(axes, port)))


class _Cutter:
    """The cut for one port. Among equal cuts networkx finds the one nearest to the target: the keys."""

    def __init__(self, axes: Axes, port: Port, ports: Iterable[Port]) -> None:
        self.axes, self.port = axes, port
        self.stops = {n for other in ports for n in other.region}
        self.own = [n for n in port.keyed if n in axes.moving] or list(port.keyed)
        self.among = axes.moving if self.own[0] in axes.moving else frozenset(_from_values(axes))
        self.members = reached(self.own, self._sources)
        self.projected = self._projected()

    def cut(self) -> tuple[fx.Node, ...]:
        """Nodes in execution order; the keys and values themselves if there is no finite cut."""
        graph = nx.DiGraph()
        for node in self.members:
            weight = self._weight(node)
            graph.add_edge((node, 0), (node, 1), **({} if weight is None else {"capacity": weight}))
            sources = self._sources(node)
            graph.add_edges_from(((source, 1), (node, 0)) for source in sources)
            if not sources:
                graph.add_edge("carry", (node, 0))
        graph.add_edges_from(((node, 1), "keys") for node in self.own)
        try:
            _, (far, _) = nx.minimum_cut(graph, "carry", "keys")
        except nx.NetworkXUnbounded:
            return tuple(self.own)
        found = {node for node in self.members if (node, 0) in far and (node, 1) not in far}
        return tuple(n for n in self.axes.block.body.graph.nodes if n in found)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        return [] if node in self.stops else [n for n in node.all_input_nodes if n in self.among]

    def _projected(self) -> set[fx.Node]:
        """Nodes all of which is behind a product with a parameter: else there is the carry under another name.

        A residual sum is such a name: what attention adds to the carry does not make it a projection.
        """
        found: set[fx.Node] = set()
        for node in self.axes.block.body.nodes:
            if node in self.members:
                inputs = node.all_input_nodes
                product = op_name(node) in PRODUCTS and any(n not in self.among for n in inputs)
                sources = self._sources(node)
                if product or node in self.stops or (sources and all(n in found for n in sources)):
                    found.add(node)
        return found or set(self.members)

    def _weight(self, node: fx.Node) -> int | None:
        """Elements per token; None where the value cannot be cached."""
        label = self.axes.labels.get(node)
        if node not in self.projected or node.op == "placeholder" or not isinstance(label, tuple):
            return None
        atoms = [a for dim in label for a in dim]
        row = _row_axis(self.axes, self.port)
        strange = any(a.kind in ("key", "sorted") or (a.kind == "token" and a is not row) for a in atoms)
        batched = atoms.count(self.axes.batch) == 1 or self.axes.batch.size == 1
        if strange or atoms.count(row) != 1 or not batched:
            return None
        return _elements(self.axes, self.port, label)


def _from_values(axes: Axes) -> Iterable[fx.Node]:
    """Nodes that depend on side inputs only."""
    reached: set[fx.Node] = set(axes.block.body.placeholders_of("value")[axes.block.carries :])
    yield from reached
    for node in axes.block.body.nodes:
        data = node not in axes.moving and isinstance(axes.labels.get(node), tuple | list)
        if data and any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            yield node
