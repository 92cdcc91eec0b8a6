"""A body as the text of a function: one statement an op, and short chains of single-use values nested.

A nested value is computed where it is used instead of where it was made, which changes nothing for pure ops; ops that
draw random numbers keep their own statements, so their order stays.
"""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from depthc.ir.body import Body
from depthc.ir.certificate import linearize, operands
from depthc.ir.graph.size_nodes import assigned_name, source_of
from depthc.ir.names import Names
from depthc.ir.text.operations import BINARY, INFIX, UNARY, infix_target, is_number, is_random, operation_syntax
from depthc.ir.text.syntax import (
    RESERVED,
    WIDTH,
    call,
    is_identifier,
    literal_syntax,
    name,
    size_sources,
    slot_syntax,
    type_text,
    unique,
)
from depthc.ir.types import DTYPES

aten = torch.ops.aten
_NESTED_WIDTH = WIDTH - 30  # leaves room for a name; does not depend on it, so that parsing and printing change nothing


class BodyText:
    """The parameters and statements of a body's function.

    Args:
        slots: how its parameter slots are called.
        results: what its results may be called.
        taken: further names that no value may have.

    Attributes:
        parameters: one a value input, as `h: f32[b, s, 64]`.
        statements: the ops, then `return`.
        sources: of every statement, the line of the user's model where it begins; "" within one, or if none is known.
    """

    def __init__(
        self, body: Body, slots: Sequence[str], results: Sequence[str] = (), taken: Sequence[str] = ()
    ) -> None:
        self.body = body
        self.sizes = size_sources(body.placeholders_of("value"))
        self.names = Names({*RESERVED, *DTYPES, *self.sizes, *taken})
        self.statements: list[str] = []
        self.sources: list[str] = []
        self._source = ""
        self.parameters: list[str] = []
        self._syntax: dict[fx.Node, ast.expr] = {}
        self._pending: dict[fx.Node, ast.expr] = {}
        self._declare(slots)
        made = {n: wish for n, wish in zip(body.results, results, strict=False) if n.op == "call_function"}
        self._results = {n: self.names.new(wish) for n, wish in made.items()}
        self.names.taken |= {ast.unparse(operation_syntax(n.target)).split(".")[0] for n in body.nodes}
        nodes = _ordered(body)
        self._uses = Counter(n for user in nodes for n in _operands(user)) + Counter(body.results)
        for node in nodes:
            self._write(node)
        self._return()

    def _declare(self, slots: Sequence[str]) -> None:
        body = self.body
        for node in body.placeholders_of("value"):
            info = node.meta["input"]
            local = self.names.new(info.name)
            self.parameters.append(f"{local}: {type_text(info.type)}")
            self._syntax[node] = name(local)
        for node, slot in zip(body.placeholders_of("param"), slots, strict=True):
            self._syntax[node] = slot_syntax("w", slot)
        consts = unique(i.name for i in body.inputs_of("const"))
        for node, slot in zip(body.placeholders_of("const"), consts, strict=True):
            self._syntax[node] = slot_syntax("c", slot)
        for node in body.placeholders_of("env"):
            self._syntax[node] = name(node.meta["input"].name)
        implied: dict[Any, str] = {source: size for size, source in self.sizes.items()}
        for node in body.nodes:
            if node.target is aten.sym_size.int and not node.kwargs:
                size = implied.pop(node.args, None)
                if size is not None:
                    self._syntax[node] = name(size)

    def _write(self, node: fx.Node) -> None:
        if node in self._syntax:
            return
        syntax = self._expression(node)
        once = self._uses[node] == 1 and not (len(self.body.results) > 1 and node in self.body.results)
        if once and not is_random(node.target):
            self._pending[node] = syntax
        else:
            self._assign(node, syntax)

    def _expression(self, node: fx.Node) -> ast.expr:
        """The syntax of an op; what it nests gets a statement of its own where the line would be too long."""
        children = [n for n in node.all_input_nodes if n in self._pending]
        while True:
            syntax = _op_syntax(node, lambda n: self._pending.get(n) or self._syntax[n])
            if not children or len(ast.unparse(syntax)) <= _NESTED_WIDTH:
                break
            longest = max(children, key=lambda n: len(ast.unparse(self._pending[n])))
            children.remove(longest)
            self._assign(longest, self._pending[longest])
        for child in children:
            self._syntax[child] = self._pending.pop(child)
        return syntax

    def _assign(self, node: fx.Node, syntax: ast.expr) -> None:
        local = self._results.get(node) or self.names.new(self._wish(node))
        self._add(f"{local} = {ast.unparse(syntax)}", node)
        self._pending.pop(node, None)
        self._syntax[node] = name(local)

    def _wish(self, node: fx.Node) -> str:
        """A name for people: what the text that was parsed, the user's line, the module or the op calls it."""
        for n in _inner(node):
            given = n.meta.get("label") or assigned_name(n)
            if given:
                return given
            owner = _owner(n)
            if owner:
                return owner
        word = str(getattr(node.target, "_opname", "") or node.target.__name__).strip("_")  # type: ignore[union-attr]
        return word if len(word) <= 16 else "".join(part[0] for part in word.split("_"))

    def _return(self) -> None:
        for node in list(self._pending):
            if node not in self.body.results:
                self._assign(node, self._pending[node])
        results = [self._pending.get(n) or self._syntax[n] for n in self.body.results]
        single = self.body.results if len(results) == 1 else ()
        self._add(f"return {', '.join(map(ast.unparse, results)) or '()'}", *single)

    def _add(self, statement: str, *nodes: fx.Node) -> None:
        source = next((source_of(n) for n in nodes if n.op == "call_function"), "")
        self.statements.append(statement)
        self.sources.append(source if source != self._source else "")
        self._source = source or self._source

    def name_of(self, value: fx.Node) -> str:
        """What a value input is called."""
        return ast.unparse(self._syntax[value])


def _ordered(body: Body) -> list[fx.Node]:
    """The ops from the results back, each where it is first needed, so that the text follows from the graph alone;
    random ops in the order in which they run."""
    random = [n for n in body.nodes if is_random(n.target)]
    order = linearize([*random, *body.results], lambda n: n.op == "placeholder")
    return [n for n in order if n.op == "call_function"]


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes in the arguments of a node, each as often as it stands there."""
    return [operand for operand in operands(node) if isinstance(operand, fx.Node)]


def _inner(node: fx.Node) -> list[fx.Node]:
    """The node, and what it only views or casts."""
    chain = [node]
    while getattr(chain[-1].target, "is_view", False) or chain[-1].target is aten._to_copy.default:
        source = chain[-1].args[0]
        if not isinstance(source, fx.Node) or source.op != "call_function" or len(source.users) > 1:
            break
        chain.append(source)
    return chain


def _owner(node: fx.Node) -> str:
    """The module whose parameter an op reads: "q_proj" of "self_attn.q_proj.weight"."""
    for source in node.all_input_nodes:
        if source.op == "placeholder" and source.meta["input"].kind == "param":
            parts = [p for p in source.meta["input"].name.split(".")[:-1] if is_identifier(p)]
            return parts[-1] if parts else ""
    return ""


# ops as syntax


def _op_syntax(node: fx.Node, operand: Any) -> ast.expr:
    """One op application: infix where the reader finds the same op again, otherwise a call."""

    def argument(value: Any) -> ast.expr:
        if isinstance(value, fx.Node):
            return operand(value)
        if isinstance(value, list | tuple):
            return ast.List([argument(v) for v in value])
        if isinstance(value, slice):
            return call("slice", [argument(v) for v in (value.start, value.stop, value.step)])
        return literal_syntax(value)

    args = [argument(a) for a in node.args]
    if not node.kwargs:
        special = _special_syntax(node, args)
        if special is not None:
            return special
    return call(operation_syntax(node.target), args, {k: argument(v) for k, v in node.kwargs.items()})


def _special_syntax(node: fx.Node, args: list[ast.expr]) -> ast.expr | None:
    values, target = node.args, node.target
    if not values or not isinstance(values[0], fx.Node | int | float):
        return None
    if target is aten.sym_size.int and type(values[1]) is int:
        return ast.Subscript(ast.Attribute(args[0], "shape"), args[1])
    if target is operator.getitem and type(values[1]) is int:
        return ast.Subscript(args[0], args[1])
    symbol = INFIX.get(target)
    if symbol is None or not any(isinstance(v, fx.Node) for v in values):
        return None
    if symbol in UNARY and len(values) == 1:
        meant = UNARY[symbol][0 if is_number(values[0]) else 1]
        return ast.UnaryOp(symbol(), args[0]) if meant is target else None
    if symbol in BINARY and len(values) == 2 and isinstance(values[1], fx.Node | int | float):
        if infix_target(symbol, is_number(values[0]), is_number(values[1])) is not target:
            return None
        compare = issubclass(symbol, ast.cmpop)
        return ast.Compare(args[0], [symbol()], [args[1]]) if compare else ast.BinOp(args[0], symbol(), args[1])
    return None
