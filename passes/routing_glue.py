"""What a mixture of recursions computes beside its blocks: router, gate and loss (recipes: section 4)."""

from __future__ import annotations

import torch

from depthc.ir.body import Body
from depthc.ir.types import Type
from depthc.passes.glue import Glue, aten, wide

GATES = ("sigmoid", "tanh", "none")
COMBINES = ("weighted", "additive", "delta", "off")


def router(stream: Type, temperature: float) -> Body:
    """logit = w . (x / temperature): [batch, tokens], on the raw residual stream.

    A product and a sum rather than a matrix product, so that autocast leaves it in fp32.
    """
    g, dtype = Glue(), wide(stream.dtype)
    h, weight = g.value("h", stream), g.param("weight", Type(dtype, stream.shape[2:]))
    x = g.cast(h, stream.dtype, dtype)
    if temperature != 1.0:
        x = g.op(aten.div.Tensor, x, temperature)
    return g.body(g.op(aten.sum.dim_IntList, g.op(aten.mul.Tensor, x, weight), [-1]))


def combine(kind: str, stream: Type, gate: str, alpha: float) -> Body | None:
    """What becomes of a selected token x under y = Block(x), which contains x; None if it becomes y.

    weighted: x + s y; additive: x + y; delta: x + s (y - x); s = alpha G(logit), or the logit itself without a gate.
    """
    if kind == "off":
        return None
    g, dtype = Glue(), wide(stream.dtype)
    rows = Type(stream.dtype, (stream.shape[0], "k", stream.shape[2]))
    old, new = (g.cast(g.value(name, rows), stream.dtype, dtype) for name in ("old", "new"))
    if kind == "additive":
        return g.body(g.cast(g.op(aten.add.Tensor, old, new), dtype, stream.dtype))
    logit = g.value("logit", Type(dtype, (stream.shape[0], "k")))
    score = logit
    if gate != "none":
        target = aten.sigmoid.default if gate == "sigmoid" else aten.tanh.default
        score = g.op(aten.mul.Tensor, g.op(target, logit), alpha)
    step = new if kind == "weighted" else g.op(aten.sub.Tensor, new, old)
    change = g.op(aten.mul.Tensor, g.op(aten.unsqueeze.default, score, -1), step)
    return g.body(g.cast(g.op(aten.add.Tensor, old, change), dtype, stream.dtype))


def membership_loss(stream: Type, weight: float) -> Body:
    """weight * BCE(logit, own membership), mean over the candidates of all batch rows."""
    g, dtype = Glue(), wide(stream.dtype)
    tokens = stream.shape[:2]
    logit = g.value("logit", Type(dtype, tokens))
    chosen, candidates = (g.value(name, Type(torch.bool, tokens)) for name in ("chosen", "candidates"))
    target = g.op(aten.to.dtype, chosen, dtype)
    each = g.op(aten.binary_cross_entropy_with_logits.default, logit, target, None, None, 0)
    own = g.op(aten.masked_fill.Scalar, each, g.op(aten.bitwise_not.default, candidates), 0.0)
    count = g.op(aten.clamp.default, g.op(aten.sum.default, candidates), 1)
    return g.body(g.op(aten.mul.Tensor, g.op(aten.div.Tensor, g.op(aten.sum.default, own), count), weight))
