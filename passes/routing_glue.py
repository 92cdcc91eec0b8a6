"""What a mixture of recursions computes beside its blocks: router, gate and loss (recipes: section 4)."""

from __future__ import annotations

import torch
from torch import fx

from depthc.ir.body import Body
from depthc.ir.types import Type
from depthc.passes.glue import Glue, aten, wide

ROUTERS = ("linear", "mlp")
GATES = ("sigmoid", "tanh", "none")
COMBINES = ("weighted", "additive", "delta", "off")


def router_shapes(kind: str, stream: Type, outputs: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    """The parameters of a router and their shapes, without biases.

    "linear": D -> outputs; "mlp": D -> 2D -> outputs; "predictor": D -> D // 4 -> outputs.
    """
    width: int = stream.shape[2]  # type: ignore[assignment]
    hidden = {"linear": 0, "mlp": 2 * width, "predictor": max(1, width // 4)}[kind]
    if not hidden:
        return {"weight": (*outputs, width)}
    return {"up.weight": (hidden, width), "down.weight": (*outputs, hidden)}


def router(
    stream: Type, kind: str, temperature: float = 1.0, outputs: tuple[int, ...] = (), *, apart: bool = False
) -> Body:
    """logits = f(x / temperature): [batch, tokens, *outputs], on the raw residual stream.

    f is linear, or has a hidden layer with an exact GELU. `apart` keeps gradients out of the stream. It runs in a
    precise segment, outside of autocast, which may have given the stream another dtype.
    """
    g, dtype = Glue(), wide(stream.dtype)
    x = g.value("h", stream)
    weights = [g.param(name, Type(dtype, shape)) for name, shape in router_shapes(kind, stream, outputs).items()]
    x = g.op(aten.to.dtype, g.op(aten.detach.default, x) if apart else x, dtype)
    if temperature != 1.0:
        x = g.op(aten.div.Tensor, x, temperature)
    if kind != "linear":
        x = g.op(aten.gelu.default, g.op(aten.linear.default, x, weights[0]))
    if outputs:
        return g.body(g.op(aten.linear.default, x, weights[-1]))
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


def z_loss(stream: Type, weight: float, outputs: tuple[int, ...] = ()) -> Body:
    """weight * logsumexp(logits)^2, mean over the candidates of all batch rows; of one logit its square."""
    g, dtype = Glue(), wide(stream.dtype)
    logits = g.value("logits", Type(dtype, (*stream.shape[:2], *outputs)))
    candidates = g.value("candidates", Type(torch.bool, stream.shape[:2]))
    size = g.op(aten.logsumexp.default, logits, [-1]) if outputs else logits
    return g.body(mean(g, g.op(aten.mul.Tensor, size, size), candidates, weight))


def membership_loss(stream: Type, weight: float) -> Body:
    """weight * BCE(logit, own membership), mean over the candidates of all batch rows."""
    g, dtype = Glue(), wide(stream.dtype)
    tokens = stream.shape[:2]
    logit = g.value("logit", Type(dtype, tokens))
    chosen, candidates = (g.value(name, Type(torch.bool, tokens)) for name in ("chosen", "candidates"))
    target = g.op(aten.to.dtype, chosen, dtype)
    each = g.op(aten.binary_cross_entropy_with_logits.default, logit, target, None, None, 0)
    return g.body(mean(g, each, candidates, weight))


def mean(g: Glue, each: fx.Node, among: fx.Node, weight: float = 1.0) -> fx.Node:
    """weight * the mean of a float [batch, tokens] over the tokens of a set, 0 if there are none."""
    own = g.op(aten.masked_fill.Scalar, each, g.op(aten.bitwise_not.default, among), 0.0)
    count = g.op(aten.clamp.default, g.op(aten.sum.default, among), 1)
    found = g.op(aten.div.Tensor, g.op(aten.sum.default, own), count)
    return found if weight == 1 else g.op(aten.mul.Tensor, found, weight)
