"""Symbolic shapes: the shape of every value inside a body, as expressions over its size names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from depthc.ir import sizes
from depthc.ir.axes.probe import PRIMES
from depthc.ir.body import Body
from depthc.ir.types import Type

Shape = tuple[sympy.Expr, ...]


def symbol(name: str) -> sympy.Symbol:
    """The symbol of a size name: a positive integer."""
    return sympy.Symbol(name, integer=True, positive=True)


def shapes_of(body: Body) -> dict[fx.Node, Any]:
    """The shape of every tensor-valued node; a list of them where the value is a sequence.

    A size that only the data decide (the tokens of one expert) is a symbol of its own, "u0", "u1", ...
    """
    names = sorted({n for i in body.inputs if isinstance(i.type, Type) for n in i.type.size_names()})
    failure: Exception | None = None
    for hints in PRIMES:
        try:
            return _shapes_at(body, names, hints)
        except RuntimeError as error:  # the end of a position table
            failure = failure or error
    assert failure is not None
    raise failure


def _shapes_at(body: Body, names: Sequence[str], hints: Sequence[int]) -> dict[fx.Node, Any]:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    known = size_symbols(dict(zip(names, hints, strict=False)), mode)
    with (
        mode,
        enable_python_dispatcher(),  # composite ops decompose by their Python forms, which take symbols
        torch.no_grad(),
    ):
        values = _propagate(body, known)
    renamed = {size.node.expr: symbol(name) for name, size in known.items()}
    return {node: _shape(value, renamed) for node, value in values.items()}


def size_symbols(hints: Mapping[str, int], mode: FakeTensorMode) -> dict[str, Any]:
    """A symbolic integer for every name. Not under the mode itself, where the ruler would be a fake already."""
    ruler = torch.empty(tuple(hints.values()), device="meta")
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(hints))  # type: ignore[var-annotated]
    return dict(zip(hints, mode.from_tensor(ruler, symbolic_context=dynamic).shape, strict=True))


def _propagate(body: Body, known: dict[str, Any]) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {}
    for node in body.placeholders:
        given = node.meta["input"]
        if isinstance(given.type, Type):
            shape = [sizes.evaluate(size, known) for size in given.type.shape]
            values[node] = torch.empty(shape, dtype=given.type.dtype)
        elif given.kind == "env":
            values[node] = torch.device("cpu") if given.name == "device" else False
        else:
            values[node] = 1.0
    for node in body.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values


def _shape(value: Any, renamed: dict[Any, sympy.Symbol]) -> Any:
    if isinstance(value, Tensor):
        return tuple(_size(size).subs(renamed) for size in value.shape)
    return [_shape(v, renamed) for v in value] if isinstance(value, list | tuple) else None


def _size(size: Any) -> sympy.Expr:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr
