"""What a widened stack computes beside its layers: blocks in and out, predictions and corrections (recipes: section 6).

A token's state is M blocks of the model's width D, each a value of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from depthc.ir.body import Body
from depthc.ir.types import Type
from depthc.passes.glue import Glue, aten, wide


def split(stream: Type, blocks: int) -> Body:
    """The first state of every block: the model's own."""
    g = Glue()
    x = g.value("h", stream)
    return g.body(*(g.op(aten.clone.default, x) if i else x for i in range(blocks)))


def collapse(stream: Type, blocks: int, kind: str) -> Body:
    """One state of the blocks: their mean, or their sum."""
    g, dtype = Glue(), wide(stream.dtype)
    total = _sum(g, [g.cast(x, stream.dtype, dtype) for x in _blocks(g, stream, blocks)])
    return g.body(g.cast(total if kind == "sum" else g.op(aten.div.Tensor, total, blocks), dtype, stream.dtype))


def predict(stream: Type, blocks: int) -> Body:
    """xhat_i = sum_j P_ij x_j."""
    g, dtype = Glue(), wide(stream.dtype)
    states = [g.cast(x, stream.dtype, dtype) for x in _blocks(g, stream, blocks)]
    p = g.param("predict", Type(dtype, (blocks, blocks)))
    rows = [[_entry(g, p, i, j) for j in range(blocks)] for i in range(blocks)]
    made = [_sum(g, [g.op(aten.mul.Tensor, x, w) for x, w in zip(states, row, strict=True)]) for row in rows]
    return g.body(*(g.cast(x, dtype, stream.dtype) for x in made))


def correct(stream: Type, blocks: int, active: int) -> Body:
    """x_i = xhat_i + g_i (y - xhat_j*), j* being the active block."""
    g, dtype = Glue(), wide(stream.dtype)
    states = [g.cast(x, stream.dtype, dtype) for x in _blocks(g, stream, blocks)]
    y = g.cast(g.value("y", stream), stream.dtype, dtype)
    gains = g.param("correct", Type(dtype, (blocks,)))
    step = g.op(aten.sub.Tensor, y, states[active])
    weights = [g.op(aten.select.int, gains, 0, i) for i in range(blocks)]
    return g.body(*_corrected(g, stream, states, step, weights))


def routed_predict(stream: Type, blocks: int, reads: int, eps: float) -> Body:
    """xhat_i = x_i + sum_j C_ij x_j, C = reshape(W_p m(x), [M, M]) of one block x."""
    g, dtype = Glue(), wide(stream.dtype)
    states = [g.cast(x, stream.dtype, dtype) for x in _blocks(g, stream, blocks)]
    mixed = _mixture(g, stream, states[reads], blocks, eps)
    weights = g.op(aten.linear.default, mixed, g.param("predict", Type(dtype, (blocks * blocks, blocks))))
    made: list[fx.Node] = []
    for i, x in enumerate(states):
        terms = [g.op(aten.mul.Tensor, other, _column(g, weights, i * blocks + j)) for j, other in enumerate(states)]
        made.append(g.op(aten.add.Tensor, x, _sum(g, terms)))
    return g.body(*(g.cast(x, dtype, stream.dtype) for x in made))


def routed_correct(stream: Type, blocks: int, active: int, eps: float) -> Body:
    """x_i = xhat_i + g_i (y - xhat_j*), g = 1 + W_c m(y)."""
    g, dtype = Glue(), wide(stream.dtype)
    states = [g.cast(x, stream.dtype, dtype) for x in _blocks(g, stream, blocks)]
    y = g.cast(g.value("y", stream), stream.dtype, dtype)
    mixed = _mixture(g, stream, y, blocks, eps)
    gains = g.op(aten.linear.default, mixed, g.param("correct", Type(dtype, (blocks, blocks))))
    step = g.op(aten.sub.Tensor, y, states[active])
    weights = [g.op(aten.add.Tensor, _column(g, gains, i), 1.0) for i in range(blocks)]
    return g.body(*_corrected(g, stream, states, step, weights))


def _mixture(g: Glue, stream: Type, x: fx.Node, blocks: int, eps: float) -> fx.Node:
    """m(x) = tanh(W_r (RMS(x) / D)): [batch, tokens, M]."""
    width, dtype = stream.shape[2], wide(stream.dtype)
    size = g.op(aten.mean.dim, g.op(aten.mul.Tensor, x, x), [-1], True)
    unit = g.op(aten.mul.Tensor, x, g.op(aten.rsqrt.default, g.op(aten.add.Tensor, size, eps)))
    normed = g.op(aten.mul.Tensor, unit, g.param("norm", Type(dtype, (width,))))
    mix = g.param("mix", Type(dtype, (blocks, width)))
    return g.op(aten.tanh.default, g.op(aten.linear.default, g.op(aten.div.Tensor, normed, width), mix))


def _corrected(
    g: Glue, stream: Type, states: Sequence[fx.Node], step: fx.Node, weights: Sequence[fx.Node]
) -> list[fx.Node]:
    dtype = wide(stream.dtype)
    made = [
        g.op(aten.add.Tensor, x, g.op(aten.mul.Tensor, step, weight)) for x, weight in zip(states, weights, strict=True)
    ]
    return [g.cast(x, dtype, stream.dtype) for x in made]


def _blocks(g: Glue, stream: Type, blocks: int) -> list[fx.Node]:
    return [g.value(f"x{i}", stream) for i in range(blocks)]


def _entry(g: Glue, matrix: fx.Node, i: int, j: int) -> fx.Node:
    return g.op(aten.select.int, g.op(aten.select.int, matrix, 0, i), 0, j)


def _column(g: Glue, weights: fx.Node, i: int) -> fx.Node:
    """[batch, tokens, 1]: one of the weights of every token."""
    return g.op(aten.unsqueeze.default, g.op(aten.select.int, weights, -1, i), -1)


def _sum(g: Glue, terms: Sequence[fx.Node]) -> fx.Node:
    total = terms[0]
    for term in terms[1:]:
        total = g.op(aten.add.Tensor, total, term)
    return total
