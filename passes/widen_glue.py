"""What a widened stack computes beside its layers: blocks in and out, predictions and corrections (recipes: section 6).

A token's state is M blocks of the model's width D, each a value of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from torch import fx

from depthc.ir.body import Body
from depthc.ir.types import Type
from depthc.passes.glue import Glue, aten, wide


def split(stream: Type, blocks: int) -> Body:
    """The first state of every block: the model's own."""
    g = Glue()
    return g.body(*[g.value("h", stream)] * blocks)


def collapse(stream: Type, blocks: int, kind: str) -> Body:
    """One state of the blocks: their mean, or their sum."""
    g = Glue()
    total = _sum(g, _states(g, stream, blocks))
    return _body(g, stream, [total if kind == "sum" else g.op(aten.div.Tensor, total, blocks)])


def predict(stream: Type, blocks: int) -> Body:
    """xhat_i = sum_j P_ij x_j."""
    g = Glue()
    states = _states(g, stream, blocks)
    rows = _entries(g, g.param("predict", Type(wide(stream.dtype), (blocks, blocks))), 0, blocks)
    return _body(g, stream, [_weighted(g, states, _entries(g, row, 0, blocks)) for row in rows])


def correct(stream: Type, blocks: int, active: int) -> Body:
    """x_i = xhat_i + g_i (y - xhat_a), a being the active block."""
    g = Glue()
    states, y = _states(g, stream, blocks), _state(g, stream, "y")
    gains = _entries(g, g.param("correct", Type(wide(stream.dtype), (blocks,))), 0, blocks)
    return _body(g, stream, _corrected(g, states, y, active, gains))


def routed_predict(stream: Type, blocks: int, reads: int, eps: float) -> Body:
    """xhat_i = x_i + sum_j C_ij x_j, C = reshape(W_p m(x), [M, M]) of one block x."""
    g = Glue()
    states = _states(g, stream, blocks)
    weights = _of_router(g, stream, "predict", states[reads], blocks, blocks**2, eps)
    rows = [weights[i * blocks : (i + 1) * blocks] for i in range(blocks)]
    made = [g.op(aten.add.Tensor, x, _weighted(g, states, row)) for x, row in zip(states, rows, strict=True)]
    return _body(g, stream, made)


def routed_correct(stream: Type, blocks: int, active: int, eps: float) -> Body:
    """x_i = xhat_i + g_i (y - xhat_a), g = 1 + W_c m(y)."""
    g = Glue()
    states, y = _states(g, stream, blocks), _state(g, stream, "y")
    gains = [g.op(aten.add.Tensor, w, 1.0) for w in _of_router(g, stream, "correct", y, blocks, blocks, eps)]
    return _body(g, stream, _corrected(g, states, y, active, gains))


def _of_router(g: Glue, stream: Type, name: str, x: fx.Node, blocks: int, count: int, eps: float) -> list[fx.Node]:
    """W m(x), m(x) = tanh(W_r (RMS(x) / D)): `count` numbers, each [batch, tokens, 1]."""
    width, dtype = stream.shape[2], wide(stream.dtype)
    size = g.op(aten.mean.dim, g.op(aten.mul.Tensor, x, x), [-1], True)
    unit = g.op(aten.mul.Tensor, x, g.op(aten.rsqrt.default, g.op(aten.add.Tensor, size, eps)))
    normed = g.op(aten.mul.Tensor, unit, g.param("norm", Type(dtype, (width,))))
    mix = g.param("mix", Type(dtype, (blocks, width)))
    mixed = g.op(aten.tanh.default, g.op(aten.linear.default, g.op(aten.div.Tensor, normed, width), mix))
    made = g.op(aten.linear.default, mixed, g.param(name, Type(dtype, (count, blocks))))
    return [g.op(aten.unsqueeze.default, entry, -1) for entry in _entries(g, made, -1, count)]


def _corrected(g: Glue, states: Sequence[fx.Node], y: fx.Node, active: int, gains: Sequence[fx.Node]) -> list[fx.Node]:
    step = g.op(aten.sub.Tensor, y, states[active])
    return [g.op(aten.add.Tensor, x, g.op(aten.mul.Tensor, step, w)) for x, w in zip(states, gains, strict=True)]


def _states(g: Glue, stream: Type, blocks: int) -> list[fx.Node]:
    return [_state(g, stream, f"x{i}") for i in range(blocks)]


def _state(g: Glue, stream: Type, name: str) -> fx.Node:
    """A state in the dtype that sums are made in."""
    return g.cast(g.value(name, stream), stream.dtype, wide(stream.dtype))


def _body(g: Glue, stream: Type, states: Sequence[fx.Node]) -> Body:
    """The body that returns these states, rounded to the stream's dtype."""
    return g.body(*(g.cast(x, wide(stream.dtype), stream.dtype) for x in states))


def _entries(g: Glue, x: fx.Node, dim: int, count: int) -> list[fx.Node]:
    return [g.op(aten.select.int, x, dim, i) for i in range(count)]


def _weighted(g: Glue, states: Sequence[fx.Node], weights: Sequence[fx.Node]) -> fx.Node:
    return _sum(g, [g.op(aten.mul.Tensor, x, w) for x, w in zip(states, weights, strict=True)])


def _sum(g: Glue, terms: Sequence[fx.Node]) -> fx.Node:
    return reduce(lambda total, term: g.op(aten.add.Tensor, total, term), terms)
