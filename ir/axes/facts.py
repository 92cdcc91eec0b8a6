"""Facts about integers beyond their axes: what an index points into, and what counts tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from depthc.ir.axes.labels import Dim
from depthc.ir.axes.ops import op_name
from depthc.ir.axes.rules import Refuse

if TYPE_CHECKING:
    from depthc.ir.axes.inference import Inference

_CASTS = {"to", "type_as", "clone", "alias", "python::getitem", "detach", "contiguous"}
_LAYOUT = {"view", "unsqueeze", "squeeze", "expand", "transpose", "permute", "select", "split", "unbind"}
_DIVISIONS = {"floor_divide", "div"}  # of (token, choice) by the number of choices
_LOOKUPS = {"index", "index_select"}

# Where an op may read an index of tokens: the positions of its arguments.
_INDEX_ARGUMENTS = {
    **dict.fromkeys((*_CASTS, *_LAYOUT, *_DIVISIONS, "argsort", "sort"), (0,)),
    "index": (0, 1),
    "index_select": (0, 2),
    "index_put": (1,),
    "index_add": (2,),
    "index_copy": (2,),
}
_COUNTING = _CASTS | {"cumsum", "grouped_mm"}
_REORDERING = {"to", "view", "clone", "detach", "transpose", "permute", "sort"}


@dataclass(frozen=True)
class Count:
    """How often every group was chosen.

    Attributes:
        chosen: the value whose entries were counted, as `Facts.multiset` finds it.
        sums: how often the counts were added up: once makes them the ends of groups.
    """

    chosen: fx.Node
    sums: int = 0


@dataclass
class Facts:
    """What is known of integers beyond their axes.

    Attributes:
        points: for an integer value, the dimension that it indexes.
        parts: the same for members of a sequence.
        permutations: indices that name every entry of their dimension once.
        counts: values that count tokens; they may only become the offsets of groups.
    """

    points: dict[fx.Node, Dim] = field(default_factory=dict)
    parts: dict[tuple[fx.Node, int], Dim] = field(default_factory=dict)
    permutations: set[fx.Node | tuple[fx.Node, int]] = field(default_factory=set)
    counts: dict[fx.Node, Count] = field(default_factory=dict)

    def check(self, node: fx.Node) -> None:
        """Refuse ops that use one of these values as mere data."""
        name = op_name(node)
        if any(source in self.counts for source in node.all_input_nodes) and name not in _COUNTING:
            raise Refuse("token", f"{name} computes with a count of tokens")
        indexing = {n for i in _INDEX_ARGUMENTS.get(name, ()) for n in _nodes(node.args[i : i + 1])}
        pointing = [n for n in _nodes([*node.args, *node.kwargs.values()]) if n in self.points]
        if any(n not in indexing for n in pointing):
            raise Refuse("token", f"{name} computes with positions in the batch")

    def carry_over(self, flow: Inference, node: fx.Node) -> None:
        """What a result inherits from its operands."""
        name, first = op_name(node), next(iter(node.args), None)
        if not isinstance(first, fx.Node):
            return
        if first in self.counts and name in _CASTS | {"cumsum"}:
            count = self.counts[first]
            self.counts[node] = replace(count, sums=count.sums + (name == "cumsum"))
        if first in self.points and name in _CASTS | _LAYOUT | _LOOKUPS:
            self._carry_points(flow, node, self.points[first])
        if name == "python::getitem" and (first, node.args[1]) in self.parts:
            self.points[node] = self.parts[first, node.args[1]]  # type: ignore[index]
            if (first, node.args[1]) in self.permutations:
                self.permutations.add(node)

    def _carry_points(self, flow: Inference, node: fx.Node, points: Dim) -> None:
        """What is left of an index points where the index did."""
        source: Any = node.args[0]
        whole = op_name(node) not in _LOOKUPS or all(n in self.permutations for n in _nodes(node.args[1:]))
        value = flow.probe.values[node]
        if isinstance(value, list | tuple):
            self.parts.update({(node, part): points for part in range(len(value))})
            return
        self.points[node] = points
        if source in self.permutations and whole and value.numel() == flow.probe.values[source].numel():
            self.permutations.add(node)

    def multiset(self, node: fx.Node) -> fx.Node:
        """The value that has the same entries in some order: behind casts, reshapes and permutations."""
        while node.op == "call_function":
            name = op_name(node)
            permuted = name in _LOOKUPS and any(n in self.permutations for n in _nodes(node.args[1:]))
            ordered = name == "python::getitem" and op_name(node.args[0]) == "sort" and node.args[1] == 0  # type: ignore
            if name not in _REORDERING and not permuted and not ordered:
                break
            node = node.args[0]  # type: ignore[assignment]
        return node

    def tainted(self, node: fx.Node) -> bool:
        """Whether a value depends on which other tokens are there."""
        return node in self.counts or node in self.points


def _nodes(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(values, found.append)
    return found
