"""Spans: the part of a captured graph between two points of its trunk, and when two of them are the same layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import SymInt, fx

from depthc.ir import certificate
from depthc.ir.dominators import PostDominators
from depthc.ir.graph.canonical import is_random
from depthc.ir.graph.trace import Trace

aten = torch.ops.aten

FILLS = {
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.empty.memory_format,
    aten.scalar_tensor.default,
}


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a size."""
    return isinstance(node.meta.get("val"), int | SymInt) and "input" not in node.meta


def is_data(node: fx.Node) -> bool:
    """Whether a node's value flows through the model: not a parameter, a size, the environment or the output."""
    if node.op == "placeholder":
        return "value" in node.meta
    return node.op == "call_function" and not is_size(node) and not is_inline(node)


def _is_rate(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), float | bool)


def is_inline(node: fx.Node) -> bool:
    """Whether a node belongs to whoever reads it: dropout rates, and tensors that are filled with one number."""
    return _is_rate(node) or node.target in FILLS


def numbers_of(node: fx.Node) -> list[float]:
    """The floats among the arguments of a node, those of the inline nodes that it reads included, in order."""
    found: list[float] = []
    for operand in certificate.operands(node):
        if isinstance(operand, fx.Node):
            found += numbers_of(operand) if is_inline(operand) else []
        elif type(operand) is float:
            found.append(operand)
    return found


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose data a node reads."""
    return [n for n in node.all_input_nodes if is_data(n)]


@dataclass(frozen=True, eq=False)
class Span:
    """Everything between the trunk points `start` and `end`: all that reaches the result through `end` alone.

    Attributes:
        text: its certificate; spans with equal text are the same layer with other bindings.
        nodes: its ops in execution order, `end` included.
        params: parameter names in slot order.
        sides: values that it reads from elsewhere, in slot order.
        consts: its floating-point constants, in order.
        extras: nodes other than `end` that are read from outside.
        walk: `nodes` in the order of the certificate.
    """

    trace: Trace
    start: fx.Node
    end: fx.Node
    text: str
    nodes: tuple[fx.Node, ...]
    params: tuple[str, ...]
    sides: tuple[fx.Node, ...]
    consts: tuple[float, ...]
    extras: tuple[fx.Node, ...]
    walk: tuple[fx.Node, ...]

    @cached_property
    def weight(self) -> int:
        """Number of ops."""
        return len(self.nodes)


class SpanFinder:
    """Makes spans of one post-dominator tree, each once."""

    def __init__(self, trace: Trace, tree: PostDominators, order: dict[fx.Node, int]) -> None:
        self.trace, self.tree, self.order = trace, tree, order
        self._spans: dict[tuple[fx.Node, fx.Node], Span] = {}

    def span(self, start: fx.Node, end: fx.Node) -> Span:
        """The span between two points of a chain of the tree."""
        key = (start, end)
        if key not in self._spans:
            self._spans[key] = self._make(start, end, self._inside(start, end))
        return self._spans[key]

    def like(self, template: Span, end: fx.Node) -> Span | None:
        """The span to `end` that is `template` with other bindings, if there is one.

        It need not lie on a chain: its start may be read behind `end` too, and may be one of its own sides.
        """
        bound = _Match(self.trace, template).bind(end)
        if bound is None:
            return None
        start, sides = bound[template.start], tuple(bound[s] for s in template.sides)
        walk = tuple(bound[n] for n in template.walk)
        members = set(walk)
        extras = tuple(n for n in walk if n is not end and any(not self._within(u, members) for u in n.users))
        if members & {start, *sides} or extras != tuple(bound[n] for n in template.extras):
            return None
        return Span(
            self.trace,
            start,
            end,
            template.text,
            tuple(sorted(members, key=self.order.__getitem__)),
            tuple(bound[n].meta["param"] for n in _param_nodes(template)),
            sides,
            tuple(x for n in walk for x in numbers_of(n)),
            extras,
            walk,
        )

    def _make(self, start: fx.Node, end: fx.Node, inside: Sequence[fx.Node]) -> Span:
        hoisted = self._hoisted(start, inside)
        members = {n for n in inside if n not in hoisted and not is_inline(n)}
        params: dict[str, int] = {}
        sides: dict[fx.Node, int] = {}
        consts: list[float] = []
        numbers: dict[fx.Node, int] = {}

        def name(node: fx.Node) -> str:
            if node is start:
                return "IN"
            if node in numbers:
                return f"%{numbers[node]}"
            if "param" in node.meta:
                slot = params.setdefault(node.meta["param"], len(params))
                return f"P{slot}:{self.trace.type_of(node)}"
            if "input" in node.meta:
                return node.meta["input"].name
            if is_size(node):
                return str(self.trace.sizes.of(node.meta["val"]))
            if is_inline(node):
                return certificate.node_text(node, name, number)
            slot = sides.setdefault(node, len(sides))
            return f"S{slot}:{self.trace.type_of(node) or 'float'}"

        def number(value: float) -> str:
            consts.append(value)
            return f"C{len(consts) - 1}"

        lines = []
        order = certificate.linearize([end], lambda n: n is start or n not in members)
        for node in order:
            if node in members:
                lines.append(certificate.node_text(node, name, number))
                numbers[node] = len(numbers)
        extras = [
            n for n in order if n in members and n is not end and any(not self._within(u, members) for u in n.users)
        ]
        lines.append(f"{self.trace.type_of(start)} -> {[numbers[n] for n in extras]}")
        nodes = sorted(numbers, key=self.order.__getitem__)
        return Span(
            self.trace,
            start,
            end,
            "\n".join(lines),
            tuple(nodes),
            tuple(params),
            tuple(sides),
            tuple(consts),
            tuple(extras),
            tuple(numbers),
        )

    def _within(self, user: fx.Node, members: set[fx.Node]) -> bool:
        return user in members or is_size(user)

    def _inside(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """Data nodes that reach the result through `end` alone, without those behind `start`."""
        inside: dict[fx.Node, None] = {}
        stack = [end]
        while stack:
            node = stack.pop()
            if node is start or node in inside or node.op == "placeholder" or not self._below(node, end):
                continue
            inside[node] = None
            stack.extend(data_inputs(node))
        return sorted(inside, key=self.order.__getitem__)

    def _below(self, node: fx.Node, end: fx.Node) -> bool:
        while self.tree.depth[node] > self.tree.depth[end]:
            node = self.tree.parent[node]
        return node is end

    def _hoisted(self, start: fx.Node, inside: Sequence[fx.Node]) -> set[fx.Node]:
        """Nodes that the layer reads instead of computing them.

        They do not depend on the carry, and either on no parameter and no chance, or they serve other layers too.
        """
        members = set(inside)
        carried, own, hoisted = {start}, set(), set()
        for node in inside:
            reads = node.all_input_nodes
            if any(n in carried for n in reads):
                carried.add(node)
            elif (is_random(node) or any(n in own or "param" in n.meta for n in reads)) and all(
                self._within(u, members) for u in node.users
            ):
                own.add(node)
            else:
                hoisted.add(node)
        return hoisted


def _param_nodes(span: Span) -> list[fx.Node]:
    """The parameters of a span in slot order."""
    read = {n.meta["param"]: n for node in span.nodes for n in node.all_input_nodes if "param" in n.meta}
    return [read[name] for name in span.params]


class _Match:
    """The nodes of a graph that stand for those of a span."""

    def __init__(self, trace: Trace, template: Span) -> None:
        self.trace, self.members = trace, set(template.walk)
        self.ports = {template.start, *template.sides}
        self.end = template.end
        self.bound: dict[fx.Node, fx.Node] = {}

    def bind(self, end: fx.Node) -> dict[fx.Node, fx.Node] | None:
        """Every node of the span, with its start, sides and parameters, to its counterpart; None if `end` differs."""
        stack: list[tuple[Any, Any]] = [(self.end, end)]
        while stack:
            ours, theirs = stack.pop()
            if ours in self.bound:
                if self.bound[ours] is not theirs:
                    return None
                continue
            pairs = self._pairs(ours, theirs)
            if pairs is None:
                return None
            self.bound[ours] = theirs
            stack.extend(pairs)
        return self.bound

    def _pairs(self, ours: fx.Node, theirs: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
        """The operands that must match if two nodes do."""
        if ours in self.ports:
            same = is_data(theirs) and self.trace.type_of(ours) == self.trace.type_of(theirs)
            return [] if same else None
        if ours.op == "placeholder":
            same = ours is theirs if "input" in ours.meta else "param" in theirs.meta and self._same_type(ours, theirs)
            return [] if same else None
        if is_size(ours):
            same = is_size(theirs) and self.trace.sizes.of(ours.meta["val"]) == self.trace.sizes.of(theirs.meta["val"])
            return [] if same else None
        if theirs.op != "call_function":
            return None
        texts = [certificate.node_text(n, lambda _: "%", lambda _: "C") for n in (ours, theirs)]
        if texts[0] != texts[1]:
            return None
        operands = [[a for a in certificate.operands(n) if isinstance(a, fx.Node)] for n in (ours, theirs)]
        return list(zip(*operands, strict=True))

    def _same_type(self, ours: fx.Node, theirs: fx.Node) -> bool:
        return self.trace.type_of(ours) == self.trace.type_of(theirs)
