"""What token choice computes beside its blocks: shares, the depth, the way out, losses (recipes: section 4)."""

from __future__ import annotations

import torch

from depthc.ir.body import Body
from depthc.ir.types import Type
from depthc.passes.glue import Glue, aten, wide
from depthc.passes.routing_glue import mean

GATES = {"softmax": 1.0, "sigmoid": 0.1}  # and their usual alpha


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
    terms = []
    for i in range(count):
        here = g.op(aten.to.dtype, g.op(aten.eq.Scalar, depths, i), dtype)
        share = mean(g, g.op(aten.select.int, pi, 2, i), real)
        terms.append(g.op(aten.mul.Tensor, mean(g, here, real), share))
    total = g.op(aten.sum.default, g.op(aten.stack.default, terms))
    return g.body(g.op(aten.mul.Tensor, g.op(aten.mul.Tensor, total, count), weight))
