"""Guards: which conditions of an exported graph hold at all sizes in range, and need not be checked."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import reduce
from itertools import pairwise
from typing import Any

import sympy

from depthc.ir import sizes

_ARITHMETIC: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.FloorDiv: lambda a, b: sympy.floor(sympy.cancel(a / b)),
    ast.Mod: sympy.Mod,
}
_HOLDS: dict[type, Callable[[Any], bool | None]] = {
    ast.Eq: lambda gap: gap.is_zero,
    ast.NotEq: lambda gap: gap.is_nonzero,
    ast.GtE: lambda gap: gap.is_nonnegative,
    ast.Gt: lambda gap: gap.is_positive,
    ast.LtE: lambda gap: gap.is_nonpositive,
    ast.Lt: lambda gap: gap.is_negative,
}


def holds_always(guard: str, lowest: Mapping[str, int]) -> bool:
    """Whether a condition is true at all sizes from the lowest on (a size without one: from 1); False if unclear.

    Example:
        >>> holds_always("64 * b * s >= 2", {}), holds_always("s % 4 == 0", {})
        (True, False)
    """
    tree = sizes.read(guard)
    if not isinstance(tree, ast.Compare):
        return False
    shifted = {n: sympy.Symbol(n, integer=True, nonnegative=True) + lowest.get(n, 1) for n in sizes.names(tree)}
    sides = [_expression(side, shifted) for side in (tree.left, *tree.comparators)]
    gaps = [sympy.expand(a - b) for a, b in pairwise(sides)]
    return all(_HOLDS[type(op)](gap) for op, gap in zip(tree.ops, gaps, strict=True))


def _expression(tree: ast.expr, symbols: Mapping[str, sympy.Expr]) -> sympy.Expr:
    """A size expression in sympy."""
    match tree:
        case ast.Constant(value=value):
            return sympy.Integer(value)  # type: ignore[arg-type]
        case ast.Name(id=name):
            return symbols[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_expression(operand, symbols)
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_expression(left, symbols), _expression(right, symbols))
        case ast.Call(func=ast.Name(id=name), args=args):
            return reduce(sympy.Max if name == "max" else sympy.Min, [_expression(a, symbols) for a in args])
    return sympy.Dummy("unclear")
