"""Facts about values beyond their axes: what an index points into, what counts tokens, what is zero at absent keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from depthc.ir.axes.labels import Dim, kinds_in
from depthc.ir.axes.ops import op_name
from depthc.ir.axes.rules import Refuse

if TYPE_CHECKING:
    from depthc.ir.axes.inference import Inference

_CASTS = {"to", "type_as", "clone", "alias", "python::getitem", "detach", "contiguous"}
_LAYOUT = {"view", "unsqueeze", "squeeze", "expand"}

# Ops that may read an index of tokens, a count of tokens, and scores shifted by something that a softmax cancels.
_INDEXING = _CASTS | _LAYOUT | {"floor_divide", "div", "index", "index_put", "index_add", "index_copy", "index_select"}
_INDEXING |= {"argsort", "sort", "select", "split", "unbind"}
_COUNTING = _CASTS | {"cumsum", "grouped_mm"}
_SHIFTED = _CASTS | _LAYOUT | {"add", "sub", "mul", "div", "neg", "where", "masked_fill", "dropout", "softmax"}

# Ops whose result is zero at a key whose score is -inf, and ops that keep such a zero.
_VANISHING = {"exp", "exp2", "softmax", "sigmoid", "relu", "softplus"}
_ZERO_KEPT = _CASTS | _LAYOUT | {"mul", "div", "where", "dropout", "masked_fill", "transpose", "permute"}


@dataclass
class Facts:
    """What is known of values beyond their axes.

    Attributes:
        points: for an integer value, the dimension that it indexes.
        parts: the same for members of a sequence.
        counts: values that count tokens; they may only become the offsets of groups.
        vanishing: values that are zero at a key whose score is -inf.
        shifted: scores to which something that depends on all keys was added, and the op that made it; a softmax
            does not see it.
    """

    points: dict[fx.Node, Dim] = field(default_factory=dict)
    parts: dict[tuple[fx.Node, int], Dim] = field(default_factory=dict)
    counts: set[fx.Node] = field(default_factory=set)
    vanishing: set[fx.Node] = field(default_factory=set)
    shifted: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def check(self, node: fx.Node) -> None:
        """Refuse ops that use one of these values as mere data."""
        name = op_name(node)
        for source in node.all_input_nodes:
            if source in self.counts and name not in _COUNTING:
                raise Refuse("token", f"{name} computes with a count of tokens")
            if source in self.points and name not in _INDEXING:
                raise Refuse("token", f"{name} computes with positions in the batch")
            if source in self.shifted and name not in _SHIFTED:
                raise Refuse("key", _uncancelled(name, self.shifted[source]))

    def carry_over(self, flow: Inference, node: fx.Node) -> None:
        """What a result inherits from its operands."""
        name, sources = op_name(node), node.all_input_nodes
        if not sources:
            return
        first = sources[0]
        kept = first in self.vanishing and name in _ZERO_KEPT
        if name in _VANISHING or kept or (name == "mul" and any(s in self.vanishing for s in sources)):
            self.vanishing.add(node)
        if name in _CASTS | {"cumsum"} and first in self.counts:
            self.counts.add(node)
        if name in _CASTS | _LAYOUT and first in self.points:
            self.points[node] = self.points[first]
        if name == "python::getitem" and (first, node.args[1]) in self.parts:
            self.points[node] = self.parts[first, node.args[1]]  # type: ignore[index]
        if name != "softmax":
            self._shift(flow, node, sources)

    def _shift(self, flow: Inference, node: fx.Node, sources: list[fx.Node]) -> None:
        """A shift stays one under sums and under factors that are the same for all keys."""
        shifted = [s for s in sources if s in self.shifted]
        if not shifted:
            return
        self.shifted[node] = self.shifted[shifted[0]]
        if op_name(node) in ("mul", "div"):
            others = [s for s in sources if s not in self.shifted and isinstance(flow.labels.get(s), tuple)]
            varies = any("key" in kinds_in(flow.label(s)) for s in others)
            divides = op_name(node) == "div" and node.args[0] not in self.shifted
            if len(shifted) > 1 or varies or divides:
                raise Refuse("key", _uncancelled(op_name(node), self.shifted[node]))

    def may_count(self, flow: Inference, node: fx.Node) -> bool:
        """Whether a sum over tokens counts them."""
        source: Any = node.args[0]
        if op_name(node) != "sum" or flow.probe.values[source].dtype.is_floating_point:
            return False
        self.counts.add(node)
        return True

    def may_reduce_keys(self, node: fx.Node) -> bool:
        """Whether a sum over keys is the same with absent keys as with keys at -inf, or may cancel in a softmax."""
        if op_name(node) not in ("sum", "mean"):
            return False
        if op_name(node) == "mean" or node.args[0] not in self.vanishing:
            self.shifted[node] = node
        return True

    def tainted(self, node: fx.Node) -> bool:
        """Whether a value depends on which other tokens are there."""
        return node in self.counts or node in self.points or node in self.shifted


def _uncancelled(name: str, reduction: fx.Node) -> str:
    return f"{name} sees {op_name(reduction)} over the keys, which no softmax cancels"
