"""What token choice computes beside its blocks: shares, the depth, the way out, losses (recipes: section 4)."""

from __future__ import annotations

import torch
from torch import fx

from depthc.ir.body import Body
from depthc.ir.types import Type
from depthc.passes.glue import Glue, aten, wide

GATES = {"softmax": 1.0, "sigmoid": 0.1}  # and their usual alpha


def token_shapes(kind: str, stream: Type, count: int) -> dict[str, tuple[int, ...]]:
    """The parameters of a router and their shapes: D -> N, or D -> 2D -> N; without biases."""
    width: int = stream.shape[2]  # type: ignore[assignment]
    if kind == "linear":
        return {"weight": (count, width)}
    return {"up.weight": (2 * width, width), "down.weight": (count, 2 * width)}


def token_router(stream: Type, kind: str, count: int, temperature: float) -> Body:
    """logits = f(x / temperature): [batch, tokens, N], on the raw residual stream; runs outside of autocast."""
    g, dtype = Glue(), wide(stream.dtype)
    x = g.op(aten.to.dtype, g.value("h", stream), dtype)  # autocast may have made it another than its type's
    weights = [g.param(name, Type(dtype, shape)) for name, shape in token_shapes(kind, stream, count).items()]
    if temperature != 1.0:
        x = g.op(aten.div.Tensor, x, temperature)
    if kind == "mlp":
        x = g.op(aten.gelu.default, g.op(aten.linear.default, x, weights[0]))
    return g.body(g.op(aten.linear.default, x, weights[-1]))


def shares(stream: Type, count: int, gate: str, alpha: float | None) -> Body:
    """pi = alpha softmax(logits), or alpha sigmoid(logits): [batch, tokens, N]."""
    g, dtype = Glue(), wide(stream.dtype)
    logits = g.value("logits", Type(dtype, (*stream.shape[:2], count)))
    pi = g.op(aten.softmax.int, logits, -1) if gate == "softmax" else g.op(aten.sigmoid.default, logits)
    weight = GATES[gate] if alpha is None else alpha
    return g.body(pi if weight == 1 else g.op(aten.mul.Tensor, pi, weight))


def depth(stream: Type, count: int, biased: bool, warmup: int) -> Body:
    """d = argmax(pi + bias), ties to the lower depth, as a float that is NaN where a share is; and pi_d.

    With a warm-up d is N - 1 in the first optimizer steps of training; a third result says whether that is so.
    """
    g, dtype = Glue(), wide(stream.dtype)
    pi = g.value("pi", Type(dtype, (*stream.shape[:2], count)))
    ranked = g.op(aten.add.Tensor, pi, g.param("bias", Type(dtype, (count,)))) if biased else pi
    best, imposed = g.op(aten.argmax.default, ranked, -1, True), []
    if warmup:
        early = g.op(aten.lt.Scalar, g.param("step", Type(torch.int64, ())), warmup)
        imposed = [g.op(aten.mul.Scalar, early, g.env("training"))]
        best = g.op(aten.where.ScalarSelf, imposed[0], count - 1, best)
    share = g.op(aten.squeeze.dim, g.op(aten.gather.default, pi, -1, best), -1)
    number = g.op(aten.to.dtype, g.op(aten.squeeze.dim, best, -1), dtype)
    bad = g.op(aten.mul.Tensor, g.op(aten.detach.default, g.op(aten.sum.dim_IntList, pi, [-1])), 0.0)
    return g.body(g.op(aten.add.Tensor, number, bad), share, *imposed)


def leave(stream: Type, kind: str | None) -> Body:
    """The state of a token that leaves, of padding the state that it came with; without a kind, x itself."""
    g, dtype = Glue(), wide(stream.dtype)
    start = g.value("start", stream)
    if kind is None:
        return g.body(start)
    h = g.value("h", stream)
    share, real = g.value("share", Type(dtype, stream.shape[:2])), g.value("real", Type(torch.bool, stream.shape[:2]))
    x, y = (g.cast(node, stream.dtype, dtype) for node in (start, h))
    pi, mask = (g.op(aten.unsqueeze.default, node, -1) for node in (share, real))
    made = {
        "weighted": lambda: g.op(aten.add.Tensor, x, g.op(aten.mul.Tensor, pi, y)),
        "additive": lambda: g.op(aten.add.Tensor, x, y),
        "delta": lambda: g.op(aten.add.Tensor, x, g.op(aten.mul.Tensor, pi, g.op(aten.sub.Tensor, y, x))),
        "off": lambda: y,
    }[kind]()
    return g.body(g.op(aten.where.self, mask, g.cast(made, dtype, stream.dtype), start))


def balance_loss(stream: Type, count: int, weight: float) -> Body:
    """weight * N sum_i f_i P_i: the fraction of the real tokens at depth i times their mean pi_i."""
    g, dtype = Glue(), wide(stream.dtype)
    pi = g.value("pi", Type(dtype, (*stream.shape[:2], count)))
    depths, real = g.value("depth", Type(dtype, stream.shape[:2])), g.value("real", Type(torch.bool, stream.shape[:2]))
    tokens = _count(g, real, dtype)
    terms = None
    for i in range(count):
        here = g.op(aten.logical_and.default, g.op(aten.eq.Scalar, depths, i), real)
        fraction = g.op(aten.div.Tensor, g.op(aten.sum.default, g.op(aten.to.dtype, here, dtype)), tokens)
        given = _real_sum(g, g.op(aten.select.int, pi, 2, i), real)
        term = g.op(aten.mul.Tensor, fraction, g.op(aten.div.Tensor, given, tokens))
        terms = term if terms is None else g.op(aten.add.Tensor, terms, term)
    assert terms is not None
    return g.body(g.op(aten.mul.Tensor, g.op(aten.mul.Tensor, terms, count), weight))


def z_loss(stream: Type, count: int, weight: float) -> Body:
    """weight * logsumexp(logits)^2, mean over the real tokens."""
    g, dtype = Glue(), wide(stream.dtype)
    logits = g.value("logits", Type(dtype, (*stream.shape[:2], count)))
    real = g.value("real", Type(torch.bool, stream.shape[:2]))
    size = g.op(aten.logsumexp.default, logits, [-1])
    tokens = _count(g, real, dtype)
    total = _real_sum(g, g.op(aten.mul.Tensor, size, size), real)
    return g.body(g.op(aten.mul.Tensor, g.op(aten.div.Tensor, total, tokens), weight))


def _count(g: Glue, real: fx.Node, dtype: torch.dtype) -> fx.Node:
    """How many tokens are real, 1 at least; not an integer, whose quotients would be fp32."""
    return g.op(aten.clamp.default, g.op(aten.sum.default, g.op(aten.to.dtype, real, dtype)), 1)


def _real_sum(g: Glue, each: fx.Node, real: fx.Node) -> fx.Node:
    return g.op(aten.sum.default, g.op(aten.masked_fill.Scalar, each, g.op(aten.bitwise_not.default, real), 0.0))
