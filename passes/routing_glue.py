"""What a mixture of recursions computes beside its blocks: router, gate and loss (recipes: section 4)."""

from __future__ import annotations

import torch
from torch import fx

from depthc.ir.body import Body
from depthc.ir.sizes import Size
from depthc.ir.types import Type
from depthc.passes.glue import Glue, aten, wide

ROUTERS = ("linear", "mlp")
GATES = ("sigmoid", "tanh", "none")
COMBINES = ("weighted", "additive", "delta", "off")


def router_shapes(kind: str, stream: Type) -> dict[str, tuple[Size, ...]]:
    """The parameters of a router and their shapes: D -> 1, or D -> 2D -> 1; without biases."""
    width = stream.shape[2]
    if kind == "linear":
        return {"weight": (width,)}
    twice = 2 * width if isinstance(width, int) else f"2*({width})"
    return {"up.weight": (twice, width), "down.weight": (twice,)}


def router(stream: Type, kind: str, temperature: float, apart: bool = False) -> Body:
    """logit = f(x / temperature): [batch, tokens], on the raw residual stream.

    f is linear, or an MLP with an exact GELU. `apart` keeps gradients out of the stream. A sum of products rather than
    a matrix product where it is linear, so that autocast leaves it in fp32; an MLP runs outside of autocast.
    """
    g, dtype = Glue(), wide(stream.dtype)
    x = g.value("h", stream)
    weights = [g.param(name, Type(dtype, shape)) for name, shape in router_shapes(kind, stream).items()]
    x = g.op(aten.detach.default, x) if apart else x
    x = g.op(aten.to.dtype, x, dtype) if kind == "mlp" else g.cast(x, stream.dtype, dtype)
    if temperature != 1.0:
        x = g.op(aten.div.Tensor, x, temperature)
    if kind == "mlp":
        x = g.op(aten.gelu.default, g.op(aten.linear.default, x, weights[0]))
    return g.body(g.op(aten.sum.dim_IntList, g.op(aten.mul.Tensor, x, weights[-1]), [-1]))


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


def document_ids(type: Type, counting: bool) -> Body:
    """int[batch, tokens]: the number of a token's document in its row, of positions that count up, or of ids."""
    g = Glue()
    steps = g.op(aten.diff.default, g.value("document", type))
    begins = g.op(aten.ne.Scalar, steps, 1 if counting else 0)
    return g.body(g.op(aten.cumsum.default, g.op(aten.constant_pad_nd.default, begins, [1, 0]), 1))


def z_loss(stream: Type, weight: float) -> Body:
    """weight * logit^2, mean over the candidates of all batch rows: logsumexp^2 of the one logit that there is."""
    g, dtype = Glue(), wide(stream.dtype)
    logit = g.value("logit", Type(dtype, stream.shape[:2]))
    candidates = g.value("candidates", Type(torch.bool, stream.shape[:2]))
    return g.body(_mean(g, g.op(aten.mul.Tensor, logit, logit), candidates, weight))


def membership_loss(stream: Type, weight: float) -> Body:
    """weight * BCE(logit, own membership), mean over the candidates of all batch rows."""
    g, dtype = Glue(), wide(stream.dtype)
    tokens = stream.shape[:2]
    logit = g.value("logit", Type(dtype, tokens))
    chosen, candidates = (g.value(name, Type(torch.bool, tokens)) for name in ("chosen", "candidates"))
    target = g.op(aten.to.dtype, chosen, dtype)
    each = g.op(aten.binary_cross_entropy_with_logits.default, logit, target, None, None, 0)
    return g.body(_mean(g, each, candidates, weight))


def _mean(g: Glue, each: fx.Node, candidates: fx.Node, weight: float) -> fx.Node:
    """weight * the mean of a value over the candidates, 0 if there are none."""
    own = g.op(aten.masked_fill.Scalar, each, g.op(aten.bitwise_not.default, candidates), 0.0)
    count = g.op(aten.clamp.default, g.op(aten.sum.default, candidates), 1)
    return g.op(aten.mul.Tensor, g.op(aten.div.Tensor, g.op(aten.sum.default, own), count), weight)
