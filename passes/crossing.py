"""A layer that attends to a memory too: its own self-attention once more, with weights of its own (recipes: section 5).

The second attention is read off the layer's ops: what makes queries is fed with the stream, what makes keys and values
with the memory, and it ends with the projection behind the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from depthc.ir.axes.ops import Slot, argument, map_operands, op_name
from depthc.ir.axes.ports import Port
from depthc.ir.body import Body, Input, add_input, behind
from depthc.ir.names import Names
from depthc.ir.program import Block
from depthc.ir.types import Type
from depthc.passes.crossing_source import NoCrossing, Source

aten = torch.ops.aten


@dataclass(frozen=True)
class Crossing:
    """A layer with a cross-attention in it.

    Attributes:
        block: its carries are the stream and the memory, which it returns as it is. After the layer's side inputs it
            reads `lagged`, which is added to the scores, and `unseen`, the tokens for which there is no memory.
        copied: the layer's parameter slots of which copies follow its own, by number.
        zeros: those among them whose copies start at zero.
    """

    block: Block
    copied: tuple[int, ...]
    zeros: frozenset[int]


def crossing_of(block: Block, port: Port, biased: bool, lagged: Type, unseen: Type) -> Crossing:
    """The layer with a cross-attention made of one of its ports.

    It stands behind all attention that the layer has; where attention and MLP are side by side, in front of the layer.

    Args:
        biased: whether the port's mask adds more than what it closes; that stays, the rest is given by `lagged`.
        lagged: the type of [batch or 1, 1, tokens, tokens], 0 where a query sees a key.
        unseen: the type of bool[batch or 1, tokens, 1].

    Raises:
        NoCrossing: its ops are not those of an attention between projections.
    """
    return _Writer(Source(block, port), biased).crossing(lagged, unseen)


class _Writer:
    """Writes the layer, and the cross-attention where it belongs."""

    def __init__(self, source: Source, biased: bool) -> None:
        self.source, self.biased = source, biased
        self.body, self.moving = source.block.body, source.axes.moving
        self.graph = fx.Graph()
        self.own: dict[fx.Node, fx.Node] = {}
        self.fresh: dict[fx.Node, fx.Node] = {}  # copies of parameters
        self.memory: dict[fx.Node, fx.Node] = {}
        self.queries: dict[fx.Node, fx.Node] = {}

    def crossing(self, lagged: Type, unseen: Type) -> Crossing:
        """The block, and what its new slots are."""
        source, slots = self.source, self.body.placeholders_of("param")
        cone = source.memory | source.queries
        copied = tuple(i for i, node in enumerate(slots) if node in cone)
        given = self._inputs([slots[i] for i in copied], {"lagged": lagged, "unseen": unseen})
        before = behind([source.start, *(n for node in cone for n in node.all_input_nodes if n not in self.moving)])
        for node in self.body.nodes:
            if node in before:
                self.own[node] = self.graph.node_copy(node, self.own.__getitem__)
        start = self.own[source.start]
        crossed = self.graph.call_function(aten.add.Tensor, (start, self._crossed(start, given)))
        self.own[source.start] = crossed
        for node in self.body.nodes:
            if node not in self.own:
                self.own[node] = self.graph.node_copy(node, self.own.__getitem__)
        self.graph.output((self.own[self.body.results[0]], given["memory"]))
        weights = {n for n in source.product.all_input_nodes if n not in self.moving}
        zero = behind(weights)
        return Crossing(
            Block(f"{source.block.name}_crossing", Body(self.graph), 2),
            copied,
            frozenset(i for i in copied if slots[i] in zero),
        )

    def _inputs(self, params: list[fx.Node], new: Mapping[str, Type]) -> dict[str, fx.Node]:
        """Placeholders: the stream, the memory, all others of the layer, the new values, the new parameters."""
        carry, given = self.source.carry, dict[str, fx.Node]()
        names = Names(i.name for i in self.body.inputs)
        prefix = Names(i.name.partition(".")[0] for i in self.body.inputs).new("cross")

        add = partial(add_input, self.graph)
        self.own[carry] = self.graph.node_copy(carry)
        given["memory"] = add(Input(names.new("memory"), "value", carry.meta["input"].type))
        for node in self.body.placeholders:
            if node is not carry:
                self.own[node] = self.graph.node_copy(node)
        given |= {name: add(Input(names.new(name), "value", type)) for name, type in new.items()}
        for node in params:
            info = node.meta["input"]
            self.fresh[node] = add(Input(f"{prefix}.{info.name}", "param", info.type))
        return given

    def _crossed(self, start: fx.Node, given: Mapping[str, fx.Node]) -> fx.Node:
        """What the cross-attention adds to the stream."""
        source = self.source
        self.memory |= dict.fromkeys(source.points, given["memory"])
        self.queries[source.carry] = start
        for node in self.body.nodes:
            if node in source.memory and node not in source.points and self._differs(node):
                self.memory[node] = self.graph.node_copy(node, self._reader(self.memory))
            if node in source.queries and self._differs(node):
                self.queries[node] = self._query_side(node, given["lagged"])
        return self.graph.call_function(aten.masked_fill.Scalar, (self.queries[source.output], given["unseen"], 0.0))

    def _differs(self, node: fx.Node) -> bool:
        """Whether an op has another value for the cross-attention: it reads the stream, or parameters."""
        return node in self.moving or any(n in self.fresh for n in behind([node]))

    def _reader(self, made: Mapping[fx.Node, fx.Node]) -> Callable[[fx.Node], fx.Node]:
        def read(node: fx.Node) -> fx.Node:
            found = made.get(node, self.fresh.get(node))
            return self.own[node] if found is None else found

        return read

    # The attention itself.

    def _query_side(self, node: fx.Node, lagged: fx.Node) -> fx.Node:
        """An op that reads queries, or what is made of them."""
        port, read = self.source.port, self._reader(self.queries)

        def operand(slot: Slot, source: fx.Node) -> fx.Node:
            if (node, slot) in port.key_edges:
                return self._reader(self.memory)(source)
            return self.own[source] if node in port.region and source in port.masks else read(source)

        if node in port.region and not self.biased and port.kind == "pattern" and self._masks(node):
            return self.queries[self._scores(node)]
        args, kwargs = map_operands(node, operand)
        if op_name(node) == "scaled_dot_product_attention":
            args, kwargs = self._masked(node, args, kwargs, lagged)
        elif node in port.region and op_name(node) == "softmax":
            args[0] = self._closed(args[0], self.source.axes.labels[node], lagged)
        copy = self.graph.call_function(node.target, tuple(args), kwargs)  # type: ignore[arg-type]
        copy.meta.update(node.meta)
        return copy

    def _masks(self, node: fx.Node) -> bool:
        return any(n in self.source.port.masks for n in node.all_input_nodes)

    def _scores(self, node: fx.Node) -> fx.Node:
        """The scores that an op masks."""
        scores = [n for n in node.all_input_nodes if n in self.source.port.region]
        if len(scores) != 1:
            raise NoCrossing("its mask is made together with scores", node)
        return scores[0]

    def _masked(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any], lagged: fx.Node) -> Any:
        """The arguments of the fused op with another mask."""
        query: Any = node.args[0]
        mask, own = self._laid(lagged, self.source.axes.labels[query], query), argument(node, 3, "attn_mask")
        if self.biased and isinstance(own, fx.Node):
            mask = self._sum(self.own[own], mask, query)
        rest = {n: v for n, v in kwargs.items() if n not in ("attn_mask", "is_causal")}
        return [*args[:3], mask, *args[4:5], *([False] if len(args) > 5 else []), *args[6:]], rest

    def _closed(self, scores: fx.Node, label: Any, lagged: fx.Node) -> fx.Node:
        """Scores that are the lowest number where nothing is seen."""
        if label[-1] != (self.source.axes.key,):
            raise NoCrossing("there are other scores beside those of keys", self.source.port.exits[0])
        return self._sum(scores, self._laid(lagged, label, self.source.carry), self.source.carry)

    def _sum(self, scores: fx.Node, mask: fx.Node, like: fx.Node) -> fx.Node:
        """Scores and a mask without minus infinity, of which a softmax would make no numbers."""
        low = torch.finfo(self.source.axes.probe.values[like].dtype).min
        total = self.graph.call_function(aten.add.Tensor, (scores, mask))
        return self.graph.call_function(aten.clamp.default, (total, low))

    def _laid(self, lagged: fx.Node, label: Any, like: fx.Node) -> fx.Node:
        """`lagged` for scores [batch, ..., queries, keys], in the dtype of a value."""
        axes, dtypes = self.source.axes, [self.source.axes.probe.values[n].dtype for n in (self.source.carry, like)]
        if len(label) < 3 or label[0] != (axes.batch,) or label[-2] != (axes.token,):
            raise NoCrossing("its scores have not the axes [batch, ..., queries, keys]", self.source.port.exits[0])
        if len(label) == 3:
            lagged = self.graph.call_function(aten.squeeze.dim, (lagged, 1))
        for _ in range(len(label) - 4):
            lagged = self.graph.call_function(aten.unsqueeze.default, (lagged, 1))
        return lagged if len({*dtypes}) == 1 else self.graph.call_function(aten.to.dtype, (lagged, dtypes[1]))
