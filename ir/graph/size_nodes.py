"""Small tools over FX graphs: size nodes, sources, copying."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.printers import PythonPrinter

from depthc.ir import sizes
from depthc.ir.sizes import Size

aten = torch.ops.aten

_SIZE_FUNCTIONS = {"max": torch.sym_max, "min": torch.sym_min}
_TORCH = str(Path(torch.__file__).parent)


class SizeEmitter:
    """Writes size expressions into a graph as nodes, each once.

    Args:
        graph: where nodes are made, at its current insertion point.
        known: for every size name, a tensor node and the dimension in which it has that size.
    """

    def __init__(self, graph: fx.Graph, known: Mapping[str, tuple[fx.Node, int]]) -> None:
        self.graph, self.known = graph, known
        self._made: dict[str, Any] = {}

    def can(self, size: Size) -> bool:
        """Whether every name in the expression is known."""
        return isinstance(size, int) or sizes.names(sizes.read(size)) <= self.known.keys()

    def emit(self, size: Size) -> Any:
        """The node (or integer) that has the value of `size`."""
        return size if isinstance(size, int) else self._emit(sizes.read(size))

    def _emit(self, tree: ast.expr) -> Any:
        key = ast.unparse(tree)
        if key not in self._made:
            self._made[key] = self._node(tree)
        return self._made[key]

    def _node(self, tree: ast.expr) -> Any:
        call = self.graph.call_function
        match tree:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return call(aten.sym_size.int, self.known[name])
            case ast.BinOp(left=left, op=op, right=right):
                return call(sizes.OPERATORS[type(op)], (self._emit(left), self._emit(right)))
            case ast.UnaryOp(op=op, operand=operand):
                return call(sizes.OPERATORS[type(op)], (self._emit(operand),))
            case ast.Call(func=ast.Name(id=name), args=[first, *rest]):
                result = self._emit(first)
                for other in rest:
                    result = call(_SIZE_FUNCTIONS[name], (result, self._emit(other)))
                return result
        raise ValueError(f"not a size expression: {ast.unparse(tree)!r}")


class SizeNames:
    """Gives the symbols of an exported graph their size names: "b" for the batch, then s, t, u, ..."""

    def __init__(self) -> None:
        self._names: dict[sympy.Symbol, str] = {}
        self._roles: dict[tuple[Any, ...], str] = {}
        self._free = chain("stuvxyzadefgijklmnopqr", (f"s{i}" for i in count(1)))
        self._printer = PythonPrinter()

    def declare(self, symbol: sympy.Symbol, role: tuple[Any, ...], *, batch: bool) -> None:
        """Name a symbol. Symbols of one role share their name: export gives every input dimension its own symbol.

        `batch` is whether it is met as the first dimension of an input.
        """
        if symbol not in self._names:
            if role not in self._roles:
                free = "b" not in self._roles.values()
                self._roles[role] = "b" if batch and free else next(self._free)
            self._names[symbol] = self._roles[role]

    def fix(self, symbol: sympy.Symbol, name: str) -> None:
        """Give a symbol a name of one's own."""
        self._names[symbol] = name

    def __contains__(self, symbol: sympy.Symbol) -> bool:
        return symbol in self._names

    def of(self, dim: Any) -> Size:
        """A dimension of a fake tensor as a size."""
        if isinstance(dim, int):
            return int(dim)
        return self.of_expr(dim.node.expr)

    def of_expr(self, expr: sympy.Expr) -> Size:
        """A sympy expression as a size; symbols without a name keep their own."""
        if expr.is_Integer:
            return int(expr)
        renamed = expr.xreplace({s: sympy.Symbol(n, integer=True, positive=True) for s, n in self._names.items()})
        return ast.unparse(ast.parse(self._printer.doprint(renamed), mode="eval"))


def source_of(node: fx.Node) -> str:
    """The line of the user's model that made a node, as "file.py:12 (code)", or "".

    A line of torch itself (of `torch.nn.Conv1d`, say) tells nobody which layer it is; the line that called it does.
    """
    if "source" in node.meta:
        return str(node.meta["source"])
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    return "{}:{} ({})".format(*(own or frames)[-1]) if frames else ""


_LAYOUT = {aten.unsqueeze.default, aten.expand.default, aten.transpose.int, aten.reshape.default, aten._to_copy.default}


def assigned_name(node: fx.Node) -> str:
    """The variable that the user's line assigns to, or ""; a name for people, never a reason for anything."""
    match = re.search(r"\(([A-Za-z_]\w*)\s*(?::[^=]+)?=[^=]", source_of(node))
    if match:
        return match.group(1)
    return assigned_name(node.args[0]) if node.target in _LAYOUT else ""  # type: ignore[arg-type]
