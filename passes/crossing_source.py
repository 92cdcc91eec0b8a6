"""The parts of a layer's own attention: what a cross-attention is made of (recipes: section 5)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.cuts import Cut, cuts_of
from depthc.ir.axes.ops import argument, is_tensor, op_name, operands
from depthc.ir.axes.ports import PRODUCTS, Port, ports_of
from depthc.ir.body import behind
from depthc.ir.program import Block

_LAYOUT = {"view", "transpose", "permute", "t", "unsqueeze", "squeeze", "clone", "contiguous", "dropout", "to"}


class NoCrossing(Exception):
    """A layer that no cross-attention can be made of; says why."""

    def __init__(self, what: str, node: fx.Node | None = None) -> None:
        self.node = node
        super().__init__(what)


def self_attention(block: Block) -> Port | None:
    """The one attention of a layer's tokens to each other; None where it has none.

    Raises:
        NoCrossing: there are several.
    """
    found = [port for port in ports_of(block) if not port.cross]
    if len(found) > 1:
        raise NoCrossing(f"it has {len(found)} self-attentions", found[1].exits[0])
    return found[0] if found else None


class Source:
    """The parts of a layer that a cross-attention is made of.

    Attributes:
        product, output: the projection behind the attention, and its result in the shape of the stream.
        start: the value of the stream that takes the cross-attention in.
        points: what goes into the projections of keys and values, in the shape of the stream.
        queries, memory: the values that the output, and keys and values, are made of.

    Raises:
        NoCrossing: the ops are not those of an attention between projections.
    """

    def __init__(self, block: Block, port: Port) -> None:
        self.block, self.port, self.axes = block, port, analyse(block)
        self.carry = block.body.placeholders_of("value")[0]
        self._require_softmax()
        self.product = self._product()
        self.start = self._start()
        self.output = self._shaped(self.product)
        self.points = frozenset(self._point(n) for n in self._first_products())
        self.memory = self._behind(port.keyed, self.points)
        if self.carry in self.memory - self.points:
            raise NoCrossing("keys or values are made of the stream without a projection", port.exits[0])
        self.queries = self._behind_queries()

    def _require_softmax(self) -> None:
        """Refuse weights that do not come of one softmax over the keys, which a mask closes."""
        made = [n for n in self.port.region if op_name(n) in ("softmax", "scaled_dot_product_attention")]
        if len(made) != 1 or (op_name(made[0]) == "softmax" and not self._over_last(made[0])):
            raise NoCrossing("its weights are not one softmax over the keys", self.port.exits[0])

    def _over_last(self, node: fx.Node) -> bool:
        return argument(node, 1, "dim", -1) in (-1, len(self.axes.probe.shape(node)) - 1)

    def _behind(self, ends: Iterable[fx.Node], stops: Iterable[fx.Node] = ()) -> set[fx.Node]:
        """Everything that `ends` are made of, up to `stops`; sizes are no part of it."""
        values = self.axes.probe.values
        return behind(ends, {*stops, *(n for n in self.block.body.nodes if not is_tensor(values[n]))})

    def _behind_queries(self) -> set[fx.Node]:
        """What the output is made of, but for keys, values and masks."""
        port, found, stack = self.port, set[fx.Node](), [self.output]
        while stack:
            node = stack.pop()
            if node not in found and is_tensor(self.axes.probe.values[node]):
                found.add(node)
                masks = port.masks if node in port.region else ()
                stack += [n for slot, n in operands(node) if (node, slot) not in port.key_edges and n not in masks]
        return found

    def _start(self) -> fx.Node:
        """What the last sublayer with attention ends with; the carry, where there is something beside attention."""
        ports, cuts = ports_of(self.block), cuts_of(self.block)
        last = self._cut(n for port in ports for n in port.region)
        before = self._behind([self.product, *(n for port in ports for n in port.entries)])
        beside = [n for n in last.nodes if self._weighs(n) and n not in before and not self._follows(n)]
        return self.carry if beside and last is cuts[-1] else last.end

    def _cut(self, nodes: Iterable[fx.Node]) -> Cut:
        """The last sublayer with one of these."""
        wanted = set(nodes)
        return next(cut for cut in reversed(cuts_of(self.block)) if wanted & {*cut.nodes})

    def _follows(self, node: fx.Node) -> bool:
        """Whether an op works on what attentions made."""
        made = self._behind([node])
        return any(made & {*port.exits} for port in ports_of(self.block))

    def _weighs(self, node: fx.Node) -> bool:
        """Whether an op is a product of what flows with a parameter."""
        return op_name(node) in PRODUCTS and any(n not in self.axes.moving for n in node.all_input_nodes)

    def _product(self) -> fx.Node:
        """The projection of what the attention makes, and of nothing else: at most it is multiplied by a gate."""
        reached = set(self.port.exits)
        for node in self._cut(self.port.exits).nodes:
            read = {n for n in node.all_input_nodes if n in self.axes.moving}
            if read & reached and node not in self.port.region:
                if read - reached and op_name(node) != "mul":
                    break
                if self._weighs(node):
                    return node
                reached.add(node)
        raise NoCrossing("no projection of it alone follows the attention", self.port.exits[0])

    def _shaped(self, node: fx.Node) -> fx.Node:
        """The value that follows by layout alone and has the shape of the stream."""
        shape = self.axes.probe.shape(self.carry)
        while self.axes.probe.shape(node) != shape:
            users = [user for user in node.users if op_name(user) in _LAYOUT]
            if len(users) != 1:
                raise NoCrossing("what is projected behind the attention has not the shape of the stream", node)
            (node,) = users
        return node

    def _first_products(self) -> list[fx.Node]:
        """The projections between the stream and keys or values."""
        found: list[fx.Node] = []
        after: set[fx.Node] = set()
        behind = self._behind(self.port.keyed)
        for node in self.block.body.nodes:
            if node in behind and node in self.axes.moving:
                if after & {*node.all_input_nodes}:
                    after.add(node)
                elif self._weighs(node):
                    after.add(node)
                    found.append(node)
        return found

    def _point(self, product: fx.Node) -> fx.Node:
        """What goes into a projection, in the shape of the stream."""
        shape = self.axes.probe.shape(self.carry)
        (node, *others) = [n for n in product.all_input_nodes if n in self.axes.moving]
        while not others and self.axes.probe.shape(node) != shape and op_name(node) in _LAYOUT:
            (node, *others) = [n for n in node.all_input_nodes if n in self.axes.moving]
        if others or self.axes.probe.shape(node) != shape:
            raise NoCrossing("what keys and values are projected from has not the shape of the stream", product)
        return node
