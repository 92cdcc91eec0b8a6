"""Products: the ops that sum products over a dimension, and the floating-point operations that each takes.

A multiplication and an addition are two operations. Elementwise ops and reductions are not counted: on any device of
interest they cost bytes, not operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from depthc.ir.axes.ops import argument, op_name
from depthc.ir.body import Body
from depthc.ir.cost.shapes import shapes_of

Shapes = Mapping[fx.Node, Any]


@dataclass(frozen=True, eq=False)
class Product:
    """One product of a body, and its operations over the size names of the body's inputs."""

    node: fx.Node
    flops: sympy.Expr


def products_of(body: Body) -> tuple[tuple[Product, ...], Shapes]:
    """The products of a body in execution order, and all its shapes."""
    shapes = shapes_of(body)
    found = ((node, _flops(node, shapes)) for node in body.nodes)
    return tuple(Product(node, flops) for node, flops in found if flops is not None), shapes


# The argument that is the left operand of a matrix product; it sums over that operand's last dimension.
_LEFT = {"linear": 0, "matmul": 0, "mm": 0, "bmm": 0, "mv": 0, "dot": 0, "grouped_mm": 0, "addmm": 1, "baddbmm": 1}


def _flops(node: fx.Node, shapes: Shapes) -> sympy.Expr | None:
    name = op_name(node)
    if name in _LEFT:
        return 2 * _numel(shapes[node]) * shapes[node.args[_LEFT[name]]][-1]  # type: ignore[index]
    match name:
        case "scaled_dot_product_attention":
            query, key, value = (shapes[argument(node, i, n)] for i, n in enumerate(("query", "key", "value")))
            return 2 * _numel(query[:-1]) * key[-2] * (query[-1] + value[-1])
        case "einsum":
            return _einsum(node, shapes)
        case "conv1d" | "conv2d" | "conv3d":
            kernel = shapes[argument(node, 1, "weight")]  # [out, in / groups, ...]
            return 2 * _numel(shapes[node]) * _numel(kernel[1:])
    return None


def _einsum(node: fx.Node, shapes: Shapes) -> sympy.Expr:
    """All letters of an equation of two operands, dimensions behind an ellipsis included."""
    equation: Any = node.args[0]
    operands: Any = node.args[1]
    sizes: dict[str, sympy.Expr] = {}
    spread: tuple[sympy.Expr, ...] = ()
    for letters, operand in zip(equation.replace(" ", "").split("->")[0].split(","), operands, strict=True):
        front, dots, back = letters.partition("...")
        shape = shapes[operand]
        sizes |= dict(zip(front, shape, strict=False))
        if dots:
            inner = shape[len(front) : len(shape) - len(back)]
            spread = max(spread, inner, key=lambda dims: (len(dims), _numel(dims) != 1))
            sizes |= dict(zip(back, shape[len(shape) - len(back) :], strict=True))
    return 2 * _numel((*spread, *sizes.values())) if len(operands) > 1 else sympy.Integer(0)


def _numel(shape: tuple[sympy.Expr, ...]) -> sympy.Expr:
    return sympy.Mul(*shape)
