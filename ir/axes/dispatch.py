"""Lookups, and how a mixture of experts sends tokens to experts and back.

Dispatch sorts the tokens by expert, works on the sorted rows, and undoes the permutation. It is recognised by what
its integers are: an index knows which axis it points into, and counts of tokens may only become group offsets. So
sorted and unsorted rows cannot be confused, and an expert choice that depends on other tokens (capacities) is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from depthc.ir.axes.facts import Count
from depthc.ir.axes.labels import Atom, Dim, Label, kinds_in, resolve, size_of
from depthc.ir.axes.ops import argument, dim_argument, op_name
from depthc.ir.axes.reductions import along
from depthc.ir.axes.rules import Refuse, fresh_label, keep_out, pointwise, rule

if TYPE_CHECKING:
    from depthc.ir.axes.inference import Inference

# Dispatch by sorting.


def _sorted_axis(flow: Inference, node: fx.Node, base: Dim) -> Dim:
    """The axis that a sort makes of a token axis; the same one in every pass."""
    atom = flow.sorted_axes.setdefault(node, Atom("sorted", size_of(base)))
    atom.base = base
    return (atom,)


@rule("sort", "argsort")
def _sort(flow: Inference, node: fx.Node) -> Any:
    source: Any = node.args[0]
    label = flow.label(source)
    if len(label) != 1 or not kinds_in(label) & {"token", "sorted"}:
        return along(flow, node)
    facts, points = flow.facts, flow.facts.points.get(source)
    if points is not None and (source not in facts.permutations or kinds_in([points]) == {"sorted"}):
        raise Refuse("token", "sorts positions that are not those of a first sort")
    # Sorting a permutation inverts it; anything else makes a new order.
    made = _sorted_axis(flow, node, label[0]) if points is None else points
    if points is None and not argument(node, 2, "descending", False):
        flow.ascending[made[0]] = facts.multiset(source)
    elif points is not None and argument(node, 2, "descending", False):
        raise Refuse("token", "sorts positions in descending order")
    if op_name(node) == "argsort":
        facts.points[node] = label[0]
        facts.permutations.add(node)
        return (made,)
    facts.parts[node, 1] = label[0]
    facts.permutations.add((node, 1))
    if points is not None:
        facts.parts[node, 0] = points
    return [(made,), (made,)]


@rule("floor_divide", "div")
def _divide(flow: Inference, node: fx.Node) -> Any:
    """An index of (token, choice) divided by the number of choices is an index of the token."""
    source: Any = node.args[0]
    points = flow.facts.points.get(source)
    if points is None:
        return pointwise(flow, node)
    by, inner, left = node.args[1], 1, list(resolve(points))
    while left and isinstance(by, int) and inner < by:
        inner *= left.pop().size
    floors = op_name(node) == "floor_divide" or node.kwargs.get("rounding_mode") == "floor"
    if inner != by or not left or not floors:
        raise Refuse("token", "divides positions by something other than the choices of a token")
    flow.facts.points[node] = tuple(left)
    return flow.label(source)


@rule("grouped_mm")
def _grouped(flow: Inference, node: fx.Node) -> Label:
    """Rows in groups, each group times a matrix of its own."""
    x, weight = flow.optional(node, 0), flow.optional(node, 1)
    count = flow.facts.counts.get(argument(node, 2, "offs"))
    if x is None or weight is None or len(x) != 2 or len(weight) != 3 or count is None:
        keep_out(x or (), "grouped matmul without offsets that count tokens, along")
        return fresh_label(flow, node)
    keep_out([x[1], *weight], "grouped matmul sums over")
    flow.unify(x[1], weight[1])
    if len(x[0]) != 1 or flow.ascending.get(x[0][0]) is not count.chosen or count.sums != 1:
        raise Refuse("token", "the offsets of a grouped matmul are not the ends of its rows' groups")
    return (x[0], weight[2])


@rule("histc", "bincount")
def _count(flow: Inference, node: fx.Node) -> Label:
    label = flow.operand(node, 0)
    source: Any = node.args[0]
    if kinds_in(label) & {"token", "sorted"} and _one_bin_a_number(node):
        flow.facts.counts[node] = Count(flow.facts.multiset(source))
    else:
        keep_out(label, f"{op_name(node)} over")
    return fresh_label(flow, node)


def _one_bin_a_number(node: fx.Node) -> bool:
    """Whether the bins of a histogram are 0, 1, 2, ..."""
    if op_name(node) == "bincount":
        return argument(node, 1, "weights") is None
    bins, low, high = (argument(node, i, name) for i, name in ((1, "bins"), (2, "min"), (3, "max")))
    return isinstance(bins, int) and low in (None, 0) and high == bins - 1


@rule("one_hot")
def _one_hot(flow: Inference, node: fx.Node) -> Label:
    return (*flow.operand(node, 0), flow.fresh(node, -1, flow.probe.shape(node)[-1]))


@rule("where")
def _where(flow: Inference, node: fx.Node) -> Any:
    """With one argument, the indices of what is true: the tokens of one expert."""
    if len(node.args) > 1:
        return pointwise(flow, node)
    label = flow.operand(node, 0)
    chosen = flow.sorted_axes.setdefault(node, Atom("sorted", flow.probe.values[node][0].shape[0]))
    for i, dim in enumerate(label):
        if kinds_in([dim]) - {"free"}:
            flow.facts.parts[node, i] = dim
    return [((chosen,),)] * len(label)


# Lookups.


@rule("embedding")
def _embedding(flow: Inference, node: fx.Node) -> Label:
    table, index = flow.operand(node, 0), flow.operand(node, 1)
    keep_out([table[0]], "looks up along")
    return (*index, table[1])


@rule("index", "index_select")
def _index(flow: Inference, node: fx.Node) -> Label:
    label = flow.operand(node, 0)
    indices: Any = node.args[1]
    if op_name(node) == "index_select":
        indices = [None] * dim_argument(node, 1, len(label)) + [node.args[2]]
    places = [d for d, index in enumerate(indices) if index is not None]
    space: list[Dim] = []
    for d in places:
        index = flow.label(indices[d])
        space = _broadcast(flow, space, list(index))
        points = flow.facts.points.get(indices[d])
        if points is not None and resolve(points) == label[d]:
            continue
        if points is not None:
            raise Refuse("token", "an index of one axis is used on another")
        keep_out([label[d]], "indexes")
    rest = [dim for d, dim in enumerate(label) if d not in places]
    _meets_once(flow, node, rest, space)
    together = places == list(range(places[0], places[-1] + 1))
    at = places[0] if together else 0
    return (*rest[:at], *space, *rest[at:])


def _meets_once(flow: Inference, node: fx.Node, rest: list[Dim], space: list[Dim]) -> None:
    both = kinds_in(rest) & kinds_in(space) & {"token", "batch", "key", "sorted"}
    if both and node in flow.moving:
        raise Refuse(min(both), "an index takes every token of every token")


def _broadcast(flow: Inference, a: list[Dim], b: list[Dim]) -> list[Dim]:
    rank = max(len(a), len(b))
    a, b = [()] * (rank - len(a)) + a, [()] * (rank - len(b)) + b
    return [flow.unify(x, y) for x, y in zip(a, b, strict=True)]


@rule("gather")
def _gather(flow: Inference, node: fx.Node) -> Label:
    """Along a free axis; the index may have keys there: relative positions looked up for every key."""
    source, index = flow.operand(node, 0), flow.operand(node, 2)
    d = dim_argument(node, 1, len(source))
    keep_out([source[d]], "gathers along")
    _same_extent(node, d, source, index)
    if node in flow.flips:
        source = tuple(flow.in_role(dim, "key") for dim in source)
        flow.entries.add(node)
        flow.record(node, (0, -1), source)
    dims = list(index)
    for i, (a, b) in enumerate(zip(source, index, strict=True)):
        if i != d:
            dims[i] = flow.unify(a, b) if node.args[2] in flow.moving else a
    if node.args[2] not in flow.moving and size_of(dims[d]) == flow.token.size:
        dims[d] = flow.fresh(node, "looked up", flow.token.size)  # tokens or keys, which is seen later
    flow.record(node, (2, -1), tuple(dims))
    return tuple(dims)


def _same_extent(node: fx.Node, d: int, one: Label, other: Label) -> None:
    """Both span all of every dimension but `d`: a shorter one would name the first entries, not broadcast."""
    for i, pair in enumerate(zip(one, other, strict=True)):
        if i != d and size_of(pair[0]) != size_of(pair[1]):
            keep_out(pair, f"{op_name(node)} takes the first entries of")


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(flow: Inference, node: fx.Node) -> Label:
    label = flow.operand(node, 0)
    d = dim_argument(node, 1, len(label))
    for position in (2, 3):
        other = flow.optional(node, position)
        if other is None:
            continue
        keep_out([label[d], other[d]], f"{op_name(node)} along")
        _same_extent(node, d, label, other)
        pairs = enumerate(zip(label, other, strict=True))
        label = tuple(flow.unify(a, b) if i != d and size_of(a) == size_of(b) else a for i, (a, b) in pairs)
    flow.record(node, (0, -1), label)
    return label


@rule("index_add", "index_copy")
def _index_add(flow: Inference, node: fx.Node) -> Label:
    """Rows added back to the tokens that they came from."""
    label, rows = list(flow.operand(node, 0)), flow.operand(node, 3)
    d = dim_argument(node, 1, len(label))
    index: Any = node.args[2]
    points = flow.facts.points.get(index)
    if points is None:
        keep_out([label[d], rows[d]], f"{op_name(node)} along")
    else:
        label[d] = flow.unify(label[d], points)
        flow.unify(rows[d], flow.label(index)[0])
    label = [dim if i == d else flow.unify(dim, rows[i]) for i, dim in enumerate(label)]
    flow.record(node, (0, -1), tuple(label))
    return tuple(label)


@rule("index_put")
def _index_put(flow: Inference, node: fx.Node) -> Label:
    """A permutation written through an index: rows put back in place, or, of 0, 1, 2, ..., its inverse."""
    label, values = flow.operand(node, 0), flow.operand(node, 2)
    indices: Any = node.args[1]
    index: Any = indices[0]
    points = flow.facts.points.get(index) if isinstance(index, fx.Node) else None
    if points is None or len(indices) > 1:
        used = [flow.label(n) for n in indices if n is not None]
        keep_out([*label, *values, *(dim for found in used for dim in found)], "index_put along")
        return label
    target: Any = node.args[0]
    label = (flow.unify(label[0], points), *label[1:])
    flow.record(node, (0, -1), label)
    axis = flow.label(index)[0]
    value: Any = node.args[2]
    if value not in flow.moving and len(values) == 1 and "sorted" not in kinds_in(values):
        if target in flow.moving or not _may_count_up(flow, value):
            raise Refuse("token", "writes a side input in sorted order")
        flow.iotas.add((node, (2, -1)))
        flow.record(node, (2, -1), (axis,))
        flow.facts.points[node] = axis
        if index in flow.facts.permutations:
            flow.facts.permutations.add(node)
        return label
    flow.unify(values[0], axis)
    for a, b in zip(label[1:], values[1:], strict=True):
        flow.unify(a, b)
    return label


def _may_count_up(flow: Inference, value: fx.Node) -> bool:
    """Whether a value can be 0, 1, 2, ...: an arange, or an integer side input (arange does not depend on a layer)."""
    known: Tensor = flow.probe.values[value]
    return (
        not known.dtype.is_floating_point
        and known.dtype is not torch.bool
        and (op_name(value) == "arange" if value.op == "call_function" else value in flow.valued)
    )
