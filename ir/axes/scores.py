"""How an attention makes weights of scores, read off the ops between the products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx

from depthc.ir.axes.analysis import Axes
from depthc.ir.axes.labels import size_of
from depthc.ir.axes.ops import argument, op_name

_WEIGHTS = {
    "softmax": "softmax",
    "exp": "softmax",
    "exp2": "softmax",
    **{name: name for name in ("sigmoid", "relu", "softplus", "elu", "silu", "gelu")},
}
_LAYOUT = {"view", "transpose", "permute", "unsqueeze", "squeeze", "clone", "slice", "t"}


@dataclass(frozen=True)
class Scores:
    """The descriptor of a port.

    Attributes:
        scale: the factor on the products of queries and keys; None is 1 over the root of the head size.
        softcap: c in `c * tanh(scores / c)`.
        biases: names of the values that are added to the scores or mask them.
        sinks: columns that take weight but have no key.
        dropout: the probability, in training.
        upcast: the dtype of the softmax, if it is not that of the scores.
        groups: query heads that share a key head.
        causal: whether the fused op itself masks later tokens.
        weights: what makes weights: "softmax", "sigmoid", "relu", ..., or "linear".
    """

    scale: float | None = None
    softcap: float | None = None
    biases: tuple[str, ...] = ()
    sinks: int = 0
    dropout: float = 0.0
    upcast: torch.dtype | None = None
    groups: int = 1
    causal: bool = False
    weights: str = "softmax"

    def __str__(self) -> str:
        """What differs from plain softmax attention, `scale=0.25 causal groups=2`."""
        default = Scores()
        found = [(f.name, getattr(self, f.name)) for f in fields(self)]
        shown = [(name, value) for name, value in found if value != getattr(default, name)]
        return " ".join(name if value is True else f"{name}={_text(value)}" for name, value in shown)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(value) if isinstance(value, tuple) else str(value)


def describe(axes: Axes, region: Sequence[fx.Node], keys: Sequence[fx.Node], biases: Sequence[fx.Node]) -> Scores:
    """The descriptor of a port.

    Args:
        region: its ops in execution order.
        keys: what makes scores with the queries.
        biases: what else meets the scores.
    """
    fused = next((n for n in region if axes.kinds.get(n) == "fused"), None)
    groups = max((_repeats(axes, n) for n in keys), default=1)
    names = tuple(n.name for n in biases)
    if fused is not None:
        return _describe_fused(axes, fused, Scores(biases=names, groups=groups))
    found = _Reader(axes, Scores(1.0, biases=names, groups=groups, weights="linear"))
    for node in region:
        found.read(node)
    return found.scores


def _describe_fused(axes: Axes, node: fx.Node, scores: Scores) -> Scores:
    rate = argument(node, 4, "dropout_p", 0.0)
    if isinstance(rate, fx.Node):  # training * p
        rate = next((a for a in rate.args if isinstance(a, float)), 0.0)
    q, k = (axes.probe.shape(n) for n in node.args[:2])  # type: ignore[arg-type]
    shared = q[-3] // k[-3] if argument(node, 7, "enable_gqa", False) and len(q) > 2 else 1
    causal = bool(argument(node, 5, "is_causal", False))
    scale = argument(node, 6, "scale")
    return replace(scores, scale=scale, dropout=float(rate), groups=scores.groups * shared, causal=causal)


class _Reader:
    """Reads the ops from the products to the weights, in order."""

    def __init__(self, axes: Axes, scores: Scores) -> None:
        self.axes, self.scores = axes, scores
        self.last = 1.0  # the factor before a tanh belongs to the softcap
        self.capped = False

    def read(self, node: fx.Node) -> None:
        """Take one op into account."""
        name, scores = op_name(node), self.scores
        if name == "dropout":
            self.scores = replace(scores, dropout=float(node.args[1]))  # type: ignore[arg-type]
        elif name == "cat":
            self.scores = replace(scores, sinks=self._sinks(node))
        elif scores.weights != "linear":
            return
        elif name in _WEIGHTS:
            self.scores = replace(scores, weights=_WEIGHTS[name], upcast=self._upcast(node))
        elif name == "tanh":
            self.capped = True
            self.scores = replace(scores, scale=(scores.scale or 1.0) / self.last)
        elif name == "baddbmm":
            self._scale(float(node.kwargs.get("alpha", 1.0)))  # type: ignore[arg-type]
        elif name in ("mul", "div"):
            factor = node.args[1]
            if isinstance(factor, int | float):
                self._scale(float(factor) if name == "mul" else 1.0 / factor)

    def _scale(self, factor: float) -> None:
        if self.capped and self.scores.softcap is None:
            self.scores = replace(self.scores, softcap=factor)
        else:
            self.last = factor
            self.scores = replace(self.scores, scale=(self.scores.scale or 1.0) * factor)

    def _sinks(self, node: fx.Node) -> int:
        extended = [a for dim in self.axes.labels[node] for a in dim if a.kind == "key" and a.extended]
        return sum(size_of(dim) for a in extended for dim in (*a.before, *a.after))

    def _upcast(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of the weights' op where it is wider than what the attention returns."""
        asked = argument(node, 2, "dtype")
        scores: Any = node.args[0]
        before = self.axes.probe.values[scores].dtype
        used = asked if isinstance(asked, torch.dtype) else self.axes.probe.values[node].dtype
        if used != before:
            return used
        cast = op_name(scores) == "to" and self.axes.probe.values[scores.args[0]].dtype != before
        return before if cast else None


def _repeats(axes: Axes, node: fx.Node) -> int:
    """How often the layout ops before a value repeat it."""
    times = 1
    while node in axes.moving and node.op == "call_function":
        source: Any = node.args[0]
        if op_name(node) == "expand":
            times *= axes.probe.values[node].numel() // max(axes.probe.values[source].numel(), 1)
        elif op_name(node) not in _LAYOUT:
            break
        node = source
    return times
