"""Build: nodes of a captured graph become a closed body."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from depthc.ir import sizes
from depthc.ir.body import Body, Input
from depthc.ir.graph.size_nodes import SizeEmitter
from depthc.ir.graph.trace import Trace
from depthc.ir.outline.spans import Span, is_inline, is_size, numbers_of
from depthc.ir.program import Block
from depthc.ir.types import FLOAT


def layer_block(
    layer: Span,
    name: str,
    sides: Mapping[fx.Node, str],
    slots: Sequence[str],
    consts: Mapping[tuple[fx.Node, int], str] | None = None,
) -> Block:
    """The block of a layer: its carry is `h`, its other values and slots are named as given."""
    values = [(layer.start, "h"), *sides.items()]
    params = dict(zip(layer.params, slots, strict=True))
    builder = BodyBuilder(layer.trace, values, params, dict.fromkeys((consts or {}).values()))
    for node in layer.nodes:
        builder.copy(node, consts or {})
    return Block(name, builder.finish([layer.end, *layer.extras]))


class BodyBuilder:
    """A body under construction.

    Args:
        trace: whose nodes are copied.
        values: the nodes that become value inputs, with their names, in order.
        params: slot names by parameter name, in order.
        consts: names of the constants that become inputs.
    """

    def __init__(
        self,
        trace: Trace,
        values: Sequence[tuple[fx.Node, str]],
        params: Mapping[str, str],
        consts: Iterable[str] = (),
    ) -> None:
        self.trace, self.graph = trace, fx.Graph()
        self.copies: dict[fx.Node, Any] = {}
        known: dict[str, tuple[fx.Node, int]] = {}
        for node, name in values:
            made = self.copies[node] = self._input(Input(name, "value", trace.type_of(node) or FLOAT))
            type = trace.type_of(node)
            for dim, size in enumerate(type.shape if type else ()):
                if isinstance(size, str) and size.isidentifier():
                    known.setdefault(size, (made, dim))
        self.params = {p: self._input(Input(slot, "param", trace.params[p].type)) for p, slot in params.items()}
        self.consts = {name: self._input(Input(name, "const", FLOAT)) for name in consts}
        self.env: dict[str, fx.Node] = {}
        self.emitter = SizeEmitter(self.graph, known)

    def _input(self, input: Input) -> fx.Node:
        node = self.graph.placeholder(re.sub(r"\W", "_", input.name))
        node.target = node.name  # unique, and legal as the name of a function's argument
        node.meta["input"] = input
        return node

    def copy(self, node: fx.Node, consts: Mapping[tuple[fx.Node, int], str] | None = None) -> None:
        """Copy an op, with the numbers that differ between layers replaced by the inputs named in `consts`."""
        consts = consts or {}
        count = -1

        def argument(value: Any) -> Any:
            nonlocal count
            if isinstance(value, fx.Node):
                numbers = range(count + 1, count + 1 + len(numbers_of(value))) if is_inline(value) else range(0)
                if any((node, i) in consts for i in numbers):
                    return made(value)
                count += len(numbers)
                return self._operand(value)
            if type(value) is float:
                count += 1
                name = consts.get((node, count))
                return self.consts[name] if name else value
            return value

        def made(original: fx.Node) -> fx.Node:
            args = map_aggregate(original.args, argument)
            kwargs = {k: map_aggregate(original.kwargs[k], argument) for k in sorted(original.kwargs)}
            copied = self.graph.create_node("call_function", original.target, args, kwargs)
            copied.meta["source"] = original.meta.get("source", "")
            return copied

        self.copies[node] = made(node)

    def _operand(self, node: fx.Node) -> Any:
        if node in self.copies:
            return self.copies[node]
        if "param" in node.meta:
            return self.params[node.meta["param"]]
        if "input" in node.meta:
            name = node.meta["input"].name
            if name not in self.env:
                with self.graph.inserting_before():  # at the beginning
                    self.env[name] = self._input(node.meta["input"])
            return self.env[name]
        size = self.trace.sizes.of(node.meta["val"]) if is_size(node) else None
        if size is not None and self.emitter.can(size):
            return self.emitter.emit(size)
        self.copy(node)
        return self.copies[node]

    def finish(self, results: Sequence[fx.Node]) -> Body:
        """The body that returns these nodes."""
        self.graph.output(tuple(self.copies[n] for n in results))
        self.graph.lint()
        return Body(self.graph)


def size_names_of(node: fx.Node, trace: Trace) -> set[str]:
    """The size names that an op's arguments need, those of the inline nodes that it reads included."""
    found: set[str] = set()
    for n in node.all_input_nodes:
        if is_size(n):
            size = trace.sizes.of(n.meta["val"])
            found |= sizes.names(sizes.read(size)) if isinstance(size, str) else set()
        elif is_inline(n):
            found |= size_names_of(n, trace)
    return found


def size_names(layer: Span, trace: Trace) -> set[str]:
    """The size names that a layer needs."""
    return {s for node in layer.nodes for s in size_names_of(node, trace)}
