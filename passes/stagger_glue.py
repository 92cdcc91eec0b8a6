"""What staggered stacks compute beside their layers: who sees which row of memory, and the sum of what stacks made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from depthc.ir.body import Body
from depthc.ir.masks.padding import Padding
from depthc.ir.types import Type
from depthc.passes.glue import Glue, aten, wide


def lagged(stream: Type, paddings: Sequence[Padding], documents: Sequence[Type], lag: int, window: int | None) -> Body:
    """What is added to the scores of token i and row j of memory, and the tokens that see no row.

    Row j is seen if i - lag - window < j <= i - lag, it is no padding, and of the same document: 0, else the lowest
    number, [batch or 1, 1, tokens, tokens]. Tokens that see none: bool[batch or 1, tokens, 1].
    """
    g = Glue()
    h, device = g.value("h", stream), g.env("device")
    at = g.graph.call_function(aten.arange.default, (g.op(aten.sym_size.int, h, 1),), {"device": device})
    back = g.op(aten.sub.Tensor, g.op(aten.unsqueeze.default, at, 1), at)
    seen = g.op(aten.ge.Scalar, back, lag)
    if window is not None:
        seen = g.op(aten.bitwise_and.Tensor, seen, g.op(aten.lt.Scalar, back, lag + window))
    seen = g.op(aten.unsqueeze.default, g.op(aten.unsqueeze.default, seen, 0), 0)
    for padding in paddings:
        target = aten.gt.Scalar if padding.on else aten.eq.Scalar
        real = g.op(target, g.value(padding.argument, padding.type), 0)
        real = g.op(aten.unsqueeze.default, g.op(aten.unsqueeze.default, real, 1), 1)
        seen = g.op(aten.bitwise_and.Tensor, seen, real)
    for number, type in enumerate(documents):
        ids = g.value(f"document{number}", type)
        same = g.op(aten.eq.Tensor, g.op(aten.unsqueeze.default, ids, 2), g.op(aten.unsqueeze.default, ids, 1))
        seen = g.op(aten.bitwise_and.Tensor, seen, g.op(aten.unsqueeze.default, same, 1))
    closed = g.op(aten.to.dtype, g.op(aten.bitwise_not.default, seen), stream.dtype)
    none = g.op(aten.bitwise_not.default, g.op(aten.any.dim, seen, -1, True))
    low = torch.finfo(stream.dtype).min
    return g.body(g.op(aten.mul.Tensor, closed, low), g.op(aten.squeeze.dim, none, 1))


def combine(stream: Type, stacks: int) -> Body:
    """sum_q a_q x_q."""
    g, dtype = Glue(), wide(stream.dtype)
    states = [g.cast(g.value(f"x{q}", stream), stream.dtype, dtype) for q in range(stacks)]
    weights = g.param("combine", Type(dtype, (stacks,)))
    terms = [g.op(aten.mul.Tensor, x, g.op(aten.select.int, weights, 0, q)) for q, x in enumerate(states)]
    total = reduce(lambda a, b: g.op(aten.add.Tensor, a, b), terms)
    return g.body(g.cast(total, dtype, stream.dtype))
