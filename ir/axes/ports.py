"""Attention ports: where a block's tokens read each other, as data.

A port is the closed region of ops that have a key axis: from the products that make scores, or the fused op, to the
products that sum over keys. Everything that knows about attention (caches, shared keys, windows, ragged kernels)
attaches to ports and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx

from depthc.ir.axes.analysis import Axes, analyse
from depthc.ir.axes.labels import Atom, Dim, Label, kinds_in
from depthc.ir.axes.ops import Slot, op_name, operands
from depthc.ir.axes.scores import Scores, describe
from depthc.ir.memo import once
from depthc.ir.program import Block

PRODUCTS = {"matmul", "mm", "bmm", "baddbmm", "linear", "addmm", "einsum"}


@dataclass(frozen=True, eq=False)
class Port:
    """One attention of a block.

    Attributes:
        kind: "fused" for one attention op, "pattern" for products around a softmax.
        cross: whether the keys lie on another axis than the tokens: an encoder's states.
        queries: what is read with a row a query; several in differential attention.
        keys: what makes scores with the queries, or is added to them with a row a key.
        values: what the weights sum.
        masks: side inputs that are added to the scores or mask them.
        key_edges: every place where an op of the region reads a value with a row a key.
        region: the ops with a key axis, the exits included.
        entries: the ops that make scores.
        exits: the ops that sum over keys.
        axis: the key axis.
        descriptor: how weights come from scores.
    """

    kind: Literal["fused", "pattern"]
    cross: bool
    queries: tuple[fx.Node, ...]
    keys: tuple[fx.Node, ...]
    values: tuple[fx.Node, ...]
    masks: tuple[fx.Node, ...]
    key_edges: frozenset[tuple[fx.Node, Slot]]
    region: frozenset[fx.Node]
    entries: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]
    axis: Atom
    descriptor: Scores

    @property
    def keyed(self) -> tuple[fx.Node, ...]:
        """All values that are read with a row a key."""
        return tuple(dict.fromkeys((*self.keys, *self.values)))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.kind, "cross" if self.cross else "self", str(self.descriptor))))


def ports_of(block: Block) -> tuple[Port, ...]:
    """The ports of a block in execution order; computed once a block body."""
    axes = analyse(block)
    return once(block, "ports", lambda: tuple(_Port(axes, *found).port() for found in _Regions(axes).find()))


def holds(label: Iterable[Dim], axis: Atom) -> bool:
    """Whether a dimension is a key axis, or the keys with something concatenated."""
    return any(a is axis or a.kind == "key" == axis.kind for dim in label for a in dim)


class _Regions:
    """Finds regions: self-attention by the key axis, cross-attention by axes of side inputs that come and go."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.order = {n: i for i, n in enumerate(axes.block.body.graph.nodes)}

    def find(self) -> list[tuple[list[fx.Node], Atom]]:
        """Regions that end, with their axis, in the order of their ends."""
        scored = [n for n, kind in self.axes.kinds.items() if kind in ("entry", "score", "exit", "fused")]
        found = [(group, self._axis(group)) for group in self._connected(scored)]
        taken = set(scored)
        for node in self.axes.kinds:
            if node not in taken and op_name(node) in PRODUCTS:
                for axis in self._foreign(node):
                    region = self._between(node, axis)
                    if region:
                        found.append((region, axis))
                        taken.update(region)
                        break
        ended = [f for f in found if any(not holds(self._label(n), f[1]) for n in f[0])]
        return sorted(ended, key=lambda f: self.order[f[0][-1]])

    def _label(self, node: fx.Node) -> Label:
        label = self.axes.labels.get(node)
        return label if isinstance(label, tuple) else ()

    def _connected(self, nodes: list[fx.Node]) -> list[list[fx.Node]]:
        """Groups of ops that share scores, each in execution order."""
        group = {n: [n] for n in nodes}
        for node in nodes:
            for source in node.all_input_nodes:
                shares = source in group and "key" in kinds_in(self._label(source))
                if shares and group[source] is not group[node]:
                    group[source] += group[node]
                    group.update(dict.fromkeys(group[node], group[source]))
        distinct = {id(g): g for g in group.values()}.values()
        return [sorted(g, key=self.order.__getitem__) for g in distinct]

    def _axis(self, group: list[fx.Node]) -> Atom:
        """The key axis; a fused op may attend to a foreign one."""
        fused = next((n for n in group if self.axes.kinds[n] == "fused"), None)
        if fused is None:
            return self.axes.key
        dim = self.axes.read(fused, (1, -1), fused.args[1])[-2]  # type: ignore[arg-type]
        return dim[0] if dim and dim[0].kind == "free" else self.axes.key

    def _foreign(self, node: fx.Node) -> Iterator[Atom]:
        """Free axes that a product takes from a side input."""
        operand = [n for n in node.all_input_nodes if self._label(n)]
        sides = [n for n in operand if n not in self.axes.moving and self._from_values(n)]
        had = {a for n in operand if n in self.axes.moving for dim in self._label(n) for a in dim}
        given = {dim[0] for n in sides for dim in self._label(n) if len(dim) == 1}
        made = [dim[0] for dim in self._label(node) if len(dim) == 1 and dim[0].kind == "free"]
        yield from (a for a in made if a in given - had)

    def _from_values(self, node: fx.Node) -> bool:
        """Whether a node depends on a value of the program, not on parameters alone."""
        if node.op == "placeholder":
            return node.meta["input"].kind == "value"
        return any(self._from_values(n) for n in node.all_input_nodes if self._label(n))

    def _between(self, entry: fx.Node, axis: Atom) -> list[fx.Node]:
        """The ops from a product to products with other side inputs that sum over `axis`; empty if none does."""
        region, stack, ended = {entry}, [entry], False
        while stack:
            for user in stack.pop().users:
                if user in region or user not in self.axes.moving:
                    continue
                if holds(self._label(user), axis):
                    stack.append(user)
                elif not self._sums(user, axis):
                    continue
                else:
                    ended = True
                region.add(user)
        return sorted(region, key=self.order.__getitem__) if ended else []

    def _sums(self, node: fx.Node, axis: Atom) -> bool:
        sides = [n for n in node.all_input_nodes if n not in self.axes.moving and holds(self._label(n), axis)]
        return op_name(node) in PRODUCTS and any(map(self._from_values, sides))


class _Port:
    """Reads a port off a region."""

    def __init__(self, axes: Axes, region: list[fx.Node], axis: Atom) -> None:
        self.axes, self.region, self.axis = axes, region, axis
        self.members = set(region)
        self.exits = [n for n in region if self._fused(n) or (op_name(n) in PRODUCTS and not self._scored(n))]
        self.entries = [n for n in region if self._fused(n) or (self._scored(n) and not self._continues(n))]

    def _fused(self, node: fx.Node) -> bool:
        return self.axes.kinds.get(node) == "fused"

    def _scored(self, node: fx.Node) -> bool:
        """Whether a value has the key axis."""
        label = self.axes.labels[node]
        return isinstance(label, tuple) and holds(label, self.axis)

    def _continues(self, node: fx.Node) -> bool:
        """Whether an op works on scores that are there already."""
        return any(n in self.members for n in node.all_input_nodes)

    def port(self) -> Port:
        """The port."""
        keyed: dict[tuple[fx.Node, Slot], fx.Node] = {}
        masks: dict[fx.Node, None] = {}
        queries: dict[fx.Node, None] = {}
        for node in self.region:
            for slot, source in operands(node):
                label = self.axes.read(node, slot, source)
                if source in self.members and self._scored(source):
                    continue
                if holds(label, self.axis):
                    if self._as_key(node, slot, source):
                        keyed[node, slot] = source
                    else:
                        masks[source] = None
                elif node in self.entries and source in self.axes.moving and "token" in kinds_in(label):
                    queries[source] = None
        values = {edge: n for edge, n in keyed.items() if self._sums(*edge)}
        keys = {edge: n for edge, n in keyed.items() if edge not in values}
        added = [n for (node, _), n in keys.items() if node not in self.entries]
        products = [n for (node, _), n in keys.items() if node in self.entries]
        return Port(
            "fused" if any(map(self._fused, self.region)) else "pattern",
            self.axis.kind != "key",
            tuple(queries),
            tuple(dict.fromkeys(keys.values())),
            tuple(dict.fromkeys(values.values())),
            tuple(masks),
            frozenset(keyed),
            frozenset(self.members),
            tuple(self.entries),
            tuple(self.exits),
            self.axis,
            describe(self.axes, self.region, products, [*masks, *dict.fromkeys(added)]),
        )

    def _sums(self, node: fx.Node, slot: Slot) -> bool:
        """Whether an operand is summed over keys."""
        return slot == (2, -1) if self._fused(node) else node in self.exits

    def _as_key(self, node: fx.Node, slot: Slot, source: fx.Node) -> bool:
        """Whether an operand with the key axis has a row a key of its own; else it is a mask or bias."""
        if source in self.axes.moving:
            return True
        if self._fused(node):
            return slot in ((1, -1), (2, -1))
        ends = node in self.entries or node in self.exits
        return ends and op_name(node) in PRODUCTS and not (op_name(node) == "baddbmm" and slot == (0, -1))
