"""Probe: the shapes inside a body at sizes that are found nowhere else.

Every size name is given a prime of its own, so two dimensions that are equal are the same dimension and no feature
count is mistaken for a length. Values are computed on the meta device: shapes and integers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from depthc.ir.axes.ops import is_pointwise
from depthc.ir.body import Body
from depthc.ir.errors import SubsetError
from depthc.ir.types import Type

aten = torch.ops.aten

# Smaller primes are for models with short position tables, where a long probe would run off the end.
PRIMES = (
    (1009, 2003, 3001, 4001, 5003, 6007, 7001, 8009, 9001),
    (211, 307, 401, 503, 601, 701, 809, 907, 1009),
    (37, 53, 61, 71, 83, 97, 101, 113, 131),
    (11, 13, 17, 19, 23, 29, 31, 41, 43),
)
_UNKNOWN = 7919  # the length of what only the data decides

Value = Any  # a meta tensor, an integer, or a sequence of them


@dataclass(frozen=True)
class Probe:
    """What one run on the meta device found.

    Attributes:
        sizes: the value chosen for every size name.
        values: a meta tensor, a number or a sequence of them for every node.
    """

    sizes: Mapping[str, int]
    values: Mapping[fx.Node, Value]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a tensor-valued node."""
        return tuple(self.values[node].shape)

    def number(self, value: Any) -> Any:
        """An integer argument: itself, or what its node computed."""
        return self.values[value] if isinstance(value, fx.Node) else value


def probe(body: Body) -> Probe:
    """Run a body on the meta device at unusual sizes.

    Raises:
        SubsetError: it runs at none of the sizes tried.
    """
    names = sorted({n for i in body.inputs if isinstance(i.type, Type) for n in i.type.size_names()}, key=_batch_first)
    failure: Exception | None = None
    for primes in PRIMES:
        sizes = dict(zip(names, primes, strict=False))
        try:
            return Probe(sizes, shapes_at(body, sizes))
        except Exception as error:  # whatever an op raises at a size that it does not take
            failure = failure or error
    raise SubsetError(
        f"the shapes inside the block are not known: {failure}",
        expected="ops whose result shape follows from the input shapes",
        remedy="run the block on all tokens",
    ) from failure


def _batch_first(name: str) -> tuple[bool, str]:
    return name != "b", name


def shapes_at(body: Body, sizes: Mapping[str, int]) -> dict[fx.Node, Value]:
    """A meta tensor, a number or a sequence of them for every node of a body, at the given sizes."""
    values: dict[fx.Node, Value] = {}
    for node in body.placeholders:
        kind, type = node.meta["input"].kind, node.meta["input"].type
        if isinstance(type, Type):
            values[node] = torch.empty(type.sizes(sizes), dtype=type.dtype, device="meta")
        elif kind == "env":
            values[node] = torch.device("meta") if node.meta["input"].name == "device" else False
        else:
            values[node] = 1.0
    with torch.no_grad():
        for node in body.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = _evaluate(node, args, kwargs)
    return values


def _evaluate(node: fx.Node, args: Any, kwargs: Any) -> Value:
    """One op; the common ones by their shape alone, since meta kernels are slow Python."""
    known = _SHAPES.get(node.target)
    if known is not None:
        return known(*args, **kwargs)
    if is_pointwise(node):
        operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        floating = bool(operands) and all(t.dtype.is_floating_point for t in operands)
        cast = any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values()))
        if floating and not cast and _one_result(node.target):
            return _empty(torch.broadcast_shapes(*(t.shape for t in operands)), operands[0])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _one_result(target: Any) -> bool:
    return len(target._schema.returns) == 1


def _empty(shape: Iterable[int], like: Tensor) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device="meta")


def _nonzero(x: Tensor) -> Tensor:
    return torch.empty((_UNKNOWN, x.dim()), dtype=torch.int64, device="meta")


def _where(mask: Tensor) -> list[Tensor]:
    return [torch.empty(_UNKNOWN, dtype=torch.int64, device="meta") for _ in mask.shape]


def _bincount(x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return torch.empty((max(minlength, 1),), dtype=torch.int64, device="meta")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.shape[-1] != weight.shape[-1] or weight.dim() != 2:
        raise ValueError("linear: the feature counts differ")
    return _empty((*x.shape[:-1], weight.shape[0]), x)


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return _empty(x.shape, x)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    if mask is not None:
        torch.broadcast_shapes(mask.shape, (*q.shape[:-1], k.shape[-2]))
    return _empty((*q.shape[:-1], v.shape[-1]), q)


_SHAPES: dict[Any, Callable[..., Any]] = {
    aten.nonzero.default: _nonzero,
    aten.where.default: _where,
    aten.bincount.default: _bincount,
    aten.linear.default: _linear,
    aten.layer_norm.default: _same,
    aten.rms_norm.default: _same,
    aten.softmax.int: _same,
    aten.scaled_dot_product_attention.default: _attention,
}
