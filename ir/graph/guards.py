"""Guards: the conditions on sizes under which an exported graph is the model."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from itertools import pairwise
from typing import Any

import sympy

from depthc.ir import sizes
from depthc.ir.errors import CaptureError
from depthc.ir.sizes import Size

_SOURCE = re.compile(r"L((?:\[[^\]]+\]|\.\w+)*?)\.size\(\)\[(\d+)\]")
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


def size_guards(
    conditions: Iterable[str], size_of: Callable[[str, int], tuple[Size, int] | None], lowest: Mapping[str, int]
) -> tuple[str, ...]:
    """What torch.export assumed about sizes, as size expressions; without what holds at all sizes from the lowest on.

    A condition that is no size expression (one on `int(s * 0.5)`, say) fixes the sizes in it to those of the example.

    Args:
        conditions: Python expressions over sources such as `L['x'].size()[1]`; those without one say nothing of sizes.
        size_of: the size, and its value in the example, of a dimension of the argument at a path ("['x']").
        lowest: the smallest value of each size name.

    Raises:
        CaptureError: a condition on something that is not an argument.
    """
    found: dict[str, None] = {}
    for condition in conditions:
        sources = {m.group(0): size_of(m.group(1), int(m.group(2))) for m in _SOURCE.finditer(condition)}
        if None in sources.values():
            raise CaptureError(
                f"the captured graph depends on a size that is not one of an argument: {condition}",
                expected="conditions on the sizes of arguments",
                remedy="pass the tensor whose size it is as an argument",
            )
        known = {source: size for source, size in sources.items() if size is not None}
        text = condition
        for source, (size, _) in known.items():
            text = text.replace(source, f"({size})")
        try:
            made = [ast.unparse(sizes.read(text))] if known else []
        except (ValueError, SyntaxError):
            made = [f"{size} == {example}" for size, example in known.values()]
        found |= dict.fromkeys(guard for guard in made if not holds_always(guard, lowest))
    return tuple(found)


def holds_always(guard: str, lowest: Mapping[str, int]) -> bool:
    """Whether a condition is true at all sizes from the lowest on (a size without one: from 1); False if unclear.

    Example:
        >>> holds_always("64 * b * s >= 2", {}), holds_always("s % 4 == 0", {})
        (True, False)
    """
    tree = sizes.read(guard)
    if not sizes.names(tree):
        return bool(sizes.evaluate(guard, {}))
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
