"""Live rows of fused projections: a product whose result is only partly read needs only part of its weight.

When keys and values come from elsewhere, the fused query-key-value projection still computes all three. The layout
ops behind it are run on a tensor of feature numbers; what arrives at a live reader says which rows of the weight it
needs, and how to lay them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from depthc.ir.axes.analysis import Axes
from depthc.ir.axes.labels import Atom, Dim, Label
from depthc.ir.axes.ops import Slot, map_operands, op_name
from depthc.ir.rows.gather import arrange

_LAYOUT = {
    *("view", "transpose", "permute", "t", "unsqueeze", "squeeze", "split", "split_with_sizes", "chunk", "unbind"),
    *("select", "slice", "python::getitem", "clone", "contiguous"),
}

# For each product: where its weight is and the dimension of its features there; the same for its bias.
_PROJECTIONS: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "linear": ((1, 0), (2, 0)),
    "addmm": ((2, -1), (0, -1)),
    "mm": ((1, -1), None),
    "matmul": ((1, -1), None),
}


@dataclass(frozen=True, eq=False)
class Slice:
    """A product that computes only its live features.

    Attributes:
        node: the product.
        skipped: its layout ops, which are not run.
        features: numbers of the live features in order.
        picks: for every value that others read: the places of its features among the live ones (None: all in order)
            and the atoms of those features.
    """

    node: fx.Node
    skipped: frozenset[fx.Node]
    features: tuple[int, ...]
    picks: Mapping[fx.Node, tuple[tuple[int, ...] | None, tuple[Atom, ...]]]

    def operand(self, slot: Slot, value: Tensor) -> Tensor:
        """An operand of the product, its weight or bias cut to the live features."""
        weight, bias = _PROJECTIONS[op_name(self.node)]
        for where in (weight, bias):
            if where is not None and slot == (where[0], -1):
                return take(value, where[1], self.features)
        return value

    def results(self, axes: Axes, y: Tensor, extent: Callable[[Dim], int]) -> dict[fx.Node, Tensor]:
        """What others read, from the live features `y`."""
        label: Label = axes.labels[self.node]
        outer = [a for dim in label[:-1] for a in dim]
        y = y.reshape([*(extent((a,)) for a in outer), y.shape[-1]])
        found = {}
        for node, (places, atoms) in self.picks.items():
            part = y if places is None else take(y, -1, places)
            part = part.reshape([*part.shape[:-1], *(a.size for a in atoms)])
            found[node] = arrange(part, [*outer, *atoms], axes.labels[node], extent)
        return found


def take(x: Tensor, dim: int, places: tuple[int, ...]) -> Tensor:
    """Some entries of a dimension, stretch by stretch: a view if they are one."""
    starts = [i for i, place in enumerate(places) if not i or place != places[i - 1] + 1]
    stops = [*starts[1:], len(places)]
    parts = [x.narrow(dim, places[a], b - a) for a, b in zip(starts, stops, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def slices_of(axes: Axes, live: Set[fx.Node], read: Callable[[fx.Node], list[fx.Node]]) -> dict[fx.Node, Slice]:
    """The products among the `live` ops that compute features nobody reads.

    Args:
        read: the live users of a node.
    """
    found = {}
    for node in live:
        if op_name(node) in _PROJECTIONS and len(read(node)) >= 1 and _weighs(axes, node):
            part = _slice(axes, node, read)
            if part is not None:
                found[node] = part
    return found


def _weighs(axes: Axes, node: fx.Node) -> bool:
    """Whether the other operand is a parameter, maybe transposed."""
    (index, _), _ = _PROJECTIONS[op_name(node)]
    weight = node.args[index]
    label: Label = axes.labels[node]
    plain = isinstance(weight, fx.Node) and weight not in axes.moving and len(axes.labels[weight]) == 2
    return plain and bool(label) and all(a.kind == "free" for a in label[-1])


def _slice(axes: Axes, node: fx.Node, read: Callable[[fx.Node], list[fx.Node]]) -> Slice | None:
    features = axes.probe.shape(node)[-1]
    layout, frontier = _chain(node, read)
    if node in frontier:
        return None
    numbers = _numbers(axes, node, layout, features)
    live = sorted({int(i) for n in frontier for i in numbers[n].flatten().tolist()})
    if len(live) == features:
        return None
    place = {feature: at for at, feature in enumerate(live)}
    picks = {}
    for n in frontier:
        places = tuple(place[i] for i in numbers[n].flatten().tolist())
        outer = {a for dim in axes.labels[node][:-1] for a in dim}
        atoms = tuple(a for dim in axes.labels[n] for a in dim if a not in outer)
        picks[n] = (None if places == tuple(range(len(live))) else places, atoms)
    return Slice(node, frozenset(layout), tuple(live), picks)


def _chain(node: fx.Node, read: Callable[[fx.Node], list[fx.Node]]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The layout ops behind a product in execution order, and those values that other ops read."""
    layout: list[fx.Node] = []
    frontier: list[fx.Node] = []
    queue = [node]
    for current in queue:
        users = read(current)
        if not users or any(op_name(u) not in _LAYOUT for u in users):
            frontier.append(current)
        queue.extend(u for u in users if op_name(u) in _LAYOUT and u not in queue)
    layout = queue[1:]
    return layout, frontier


def _numbers(axes: Axes, node: fx.Node, layout: list[fx.Node], features: int) -> dict[fx.Node, Tensor]:
    """The feature numbers of every layout op's value, where batch and tokens have size 1."""
    outer = {a for dim in axes.labels[node][:-1] for a in dim}
    values: dict[fx.Node, Tensor] = {
        node: torch.arange(features).reshape([1] * (len(axes.labels[node]) - 1) + [features])
    }
    for current in layout:
        args, kwargs = map_operands(current, lambda _, n: values[n] if n in values else axes.probe.values[n])
        if op_name(current) == "view":
            sizes = [_size(dim, outer) for dim in axes.labels[current]]
            values[current] = args[0].reshape(sizes)
        else:
            values[current] = current.target(*args, **kwargs)  # type: ignore[operator]
    return values


def _size(dim: Dim, outer: set[Atom]) -> int:
    size = 1
    for atom in dim:
        size *= 1 if atom in outer else atom.size
    return size
