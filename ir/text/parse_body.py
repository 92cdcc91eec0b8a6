"""The text of a function as a body: the inverse of `print_body`."""

from __future__ import annotations

import ast
import operator
import re
from typing import Any

import torch
from torch import fx

from depthc.ir.body import Body, Input
from depthc.ir.errors import ParseError
from depthc.ir.text.operations import BINARY, UNARY, infix_target, is_number, misfit, read_operation
from depthc.ir.text.syntax import RESERVED, fail, literal, read_type, size_sources
from depthc.ir.text.unfold import Scope, slot_name, unfold
from depthc.ir.types import ValueType

aten = torch.ops.aten
_KINDS = ("parameter", "frozen", "buffer", "constant")


def read_declaration(node: ast.expr) -> tuple[ValueType | None, str]:
    """(type, kind) of a parameter's declaration: `f32[64]`, `buffer(f32[64])`."""
    match node:
        case ast.Call(func=ast.Name(id=kind), args=[inner], keywords=[]) if kind in _KINDS:
            return read_type(inner), kind
    return read_type(node), "parameter"


class BodyReader:
    """Reads one function.

    Attributes:
        slots: names of the parameter slots, in order.
        kinds: the usual kind of the parameters bound to each.
        body: the body.
    """

    def __init__(self, function: ast.FunctionDef) -> None:
        self.slots: list[str] = []
        self.kinds: list[str] = []
        self.graph = fx.Graph()
        self._inputs: dict[str, fx.Node] = {}
        self._locals: dict[str, fx.Node] = {}
        self._parameters(function)
        statements = [s for s, scope in unfold(function.body, Scope()) if not self._declaration(s, scope)]
        for env in ("device", "training"):
            if any(isinstance(n, ast.Name) and n.id == env for s in statements for n in ast.walk(s)):
                self._locals[env] = self._input(Input(env, "env"))
        self._sizes = size_sources(n for n in self.graph.nodes if n.meta["input"].kind == "value")
        for statement in statements[:-1]:
            self._assign(statement)
        self.body = self._finish(statements[-1] if statements else function)

    # declarations

    def _input(self, info: Input) -> fx.Node:
        node = self.graph.placeholder(re.sub(r"\W", "_", info.name))
        node.target = node.name  # unique, and legal as the name of a function's argument
        node.meta["input"] = info
        return node

    def _parameters(self, function: ast.FunctionDef) -> None:
        arguments = function.args
        if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs or arguments.defaults:
            fail(function, "a body takes plain parameters only", expected="name: type, ...", found=function.name)
        for argument in arguments.args:
            if argument.annotation is None or argument.arg in RESERVED:
                fail(argument, f"parameter {argument.arg!r} has no type or a reserved name", expected="name: type")
            self._locals[argument.arg] = self._input(Input(argument.arg, "value", read_type(argument.annotation)))

    def _declaration(self, statement: ast.stmt, scope: Scope) -> bool:
        """Declare a slot; False if the statement is no declaration."""
        if not isinstance(statement, ast.AnnAssign) or statement.value is not None:
            return False
        type, kind = read_declaration(statement.annotation)
        slot, letter = slot_name(statement.target, "w", scope), "w"
        if slot is None:
            slot, letter = slot_name(statement.target, "c", scope), "c"
        if slot is None or f"{letter}.{slot}" in self._inputs:
            fail(statement, "this does not declare a new slot", expected="w.name: type or c.name: float")
        if letter == "w":
            self.slots.append(slot)
            self.kinds.append(kind)
        self._inputs[f"{letter}.{slot}"] = self._input(Input(slot, "param" if letter == "w" else "const", type))
        return True

    # statements

    def _assign(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)], value=value):
                if target in RESERVED or target in self._sizes:
                    fail(statement, f"{target!r} cannot be assigned", expected="a name that is not reserved or a size")
                result = self._value(value)
                if not isinstance(result, fx.Node):
                    fail(value, "this is not an op", expected="an op application, such as linear(x, w.weight)")
                self._locals[target] = result
                result.meta.setdefault("label", target)
            case _:
                fail(statement, "this is not a statement of a body", expected="name = op(...), then return")

    def _finish(self, statement: ast.AST) -> Body:
        if not isinstance(statement, ast.Return) or statement.value is None:
            fail(statement, "the body does not end with return", expected="return value, ...")
        value = statement.value
        results = [self._value(item) for item in (value.elts if isinstance(value, ast.Tuple) else [value])]
        for result in results:
            if not isinstance(result, fx.Node):
                fail(statement, "a result is not a value", expected="values of the body")
        self.graph.output(tuple(results))
        return Body(self.graph)

    # expressions

    def _value(self, node: ast.expr) -> Any:
        """A node of the graph, or a constant."""
        match node:
            case ast.Name(id=text) if text in self._locals:
                return self._locals[text]
            case ast.Name(id=text) if text in self._sizes:
                self._locals[text] = self.graph.call_function(aten.sym_size.int, self._sizes[text])
                return self._locals[text]
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._value(item) for item in items]
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"))):
                return literal(node)
            case ast.Call(func=ast.Name(id="slice"), args=[start, stop, step], keywords=[]):
                return slice(self._value(start), self._value(stop), self._value(step))
            case ast.Call():
                return self._call(node)
            case ast.Subscript() | ast.Attribute():
                return self._access(node)
            case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
                return self._infix(node, type(op), left, right)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
                return self._unary(node, type(op), operand)
            case ast.Name(id=text):
                return self._constant_name(node, text)
        return literal(node)

    def _constant_name(self, node: ast.Name, text: str) -> Any:
        try:
            return literal(node)
        except ParseError:
            fail(node, f"{text!r} is not defined", expected="a parameter, an assigned name, a size or a constant")

    def _call(self, node: ast.Call) -> fx.Node:
        target = read_operation(node.func)
        if any(word.arg is None for word in node.keywords):
            fail(node, "** cannot stand here", expected="name=value")
        args = tuple(self._value(a) for a in node.args)
        kwargs = {str(word.arg): self._value(word.value) for word in node.keywords}
        wrong = misfit(target, args, list(kwargs))
        if wrong:
            schema = str(getattr(target, "_schema", "numbers"))
            fail(node, f"the arguments do not fit {target}: {wrong}", expected=schema)
        return self.graph.call_function(target, args, kwargs)

    def _access(self, node: ast.Subscript | ast.Attribute) -> Any:
        """A slot, a size `x.shape[1]`, or one of several results `x[0]`."""
        for letter in ("w", "c"):
            slot = slot_name(node, letter, Scope())
            if slot is not None:
                if f"{letter}.{slot}" not in self._inputs:
                    fail(node, f"slot {slot!r} is not declared", expected=f"{letter}.{slot}: type, above the ops")
                return self._inputs[f"{letter}.{slot}"]
        match node:
            case ast.Subscript(value=ast.Attribute(value=tensor, attr="shape"), slice=index):
                return self.graph.call_function(aten.sym_size.int, (self._node(tensor), self._index(index)))
            case ast.Subscript(value=results, slice=index):
                return self.graph.call_function(operator.getitem, (self._node(results), self._index(index)))
        return literal(node)

    def _node(self, node: ast.expr) -> fx.Node:
        value = self._value(node)
        if not isinstance(value, fx.Node):
            fail(node, "this is not a value of the body", expected="a parameter or the result of an op")
        return value

    def _index(self, node: ast.expr) -> int:
        value = literal(node)
        if type(value) is not int:
            fail(node, "this is not an index", expected="an integer")
        return value

    def _infix(self, node: ast.expr, symbol: type, left: ast.expr, right: ast.expr) -> fx.Node:
        a, b = self._value(left), self._value(right)
        target = infix_target(symbol, is_number(a), is_number(b)) if symbol in BINARY else None
        operands = all(isinstance(v, fx.Node | int | float) for v in (a, b))
        if target is None or not operands or not any(isinstance(v, fx.Node) for v in (a, b)):
            fail(node, "this operator does not apply here", expected="two sizes, two tensors, or a tensor and a number")
        return self.graph.call_function(target, (a, b))

    def _unary(self, node: ast.UnaryOp, symbol: type, operand: ast.expr) -> Any:
        value = self._value(operand)
        if not isinstance(value, fx.Node):
            return literal(node)
        target = UNARY[symbol][0 if is_number(value) else 1]
        if target is None:
            fail(node, "this operator does not apply to a number", expected="a tensor")
        return self.graph.call_function(target, (value,))
