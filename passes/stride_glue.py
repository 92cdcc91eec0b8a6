"""What layers on every q-th token compute beside themselves: which tokens these are, and what the others become."""

from __future__ import annotations

import operator

import torch
from torch import fx

from depthc.ir.body import Body
from depthc.ir.types import Type
from depthc.passes.glue import Glue, aten, wide


def is_anchor(stream: Type, every: int, documents: bool) -> Body:
    """bool[batch, tokens]: whether a token is the first, or a q-th one from there, of the real ones of its document."""
    g, tokens = Glue(), stream.shape[:2]
    count = g.op(aten.cumsum.default, g.value("real", Type(torch.bool, tokens)), 1)
    before = g.op(aten.constant_pad_nd.default, count, [1, -1])  # real tokens in front of this one
    if documents:
        number = g.value("document", Type(torch.int64, tokens))
        begins = g.op(aten.constant_pad_nd.default, g.op(aten.diff.default, number), [1, 0])
        start = g.op(aten.mul.Tensor, before, g.op(aten.ne.Scalar, begins, 0))
        earlier = g.op(operator.getitem, g.op(aten.cummax.default, start, 1), 0)
        before = g.op(aten.sub.Tensor, before, earlier)
    return g.body(g.op(aten.eq.Scalar, g.op(aten.remainder.Scalar, before, every), 0))


def predict(stream: Type) -> Body:
    """yhat_a = a1 x_a + a2 x_a, of anchors, which are their own."""
    g, dtype = Glue(), wide(stream.dtype)
    x = g.cast(g.value("h", stream), stream.dtype, dtype)
    return g.body(g.cast(_predicted(g, _scalars(g, stream, "a1", "a2"), x, x), dtype, stream.dtype))


def correct(stream: Type) -> Body:
    """y_i = yhat_i + b (ytilde_a - yhat_a) of x_i (`old`), ytilde_a (`new`) and x_a (`anchor`)."""
    g, dtype = Glue(), wide(stream.dtype)
    rows = Type(stream.dtype, (stream.shape[0], "k", stream.shape[2]))
    old, new, anchor = (g.cast(g.value(name, rows), stream.dtype, dtype) for name in ("old", "new", "anchor"))
    *both, b = _scalars(g, stream, "a1", "a2", "b")
    news = g.op(aten.sub.Tensor, new, _predicted(g, both, anchor, anchor))
    made = g.op(aten.add.Tensor, _predicted(g, both, old, anchor), g.op(aten.mul.Tensor, news, b))
    return g.body(g.cast(made, dtype, stream.dtype))


def _scalars(g: Glue, stream: Type, *names: str) -> list[fx.Node]:
    return [g.param(name, Type(wide(stream.dtype), ())) for name in names]


def _predicted(g: Glue, both: list[fx.Node], x: fx.Node, anchor: fx.Node) -> fx.Node:
    a1, a2 = both
    return g.op(aten.add.Tensor, g.op(aten.mul.Tensor, x, a1), g.op(aten.mul.Tensor, anchor, a2))
