"""Glue: small bodies that passes write op by op."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from depthc.ir.body import Body, Input, add_input
from depthc.ir.types import Type

aten = torch.ops.aten


class Glue:
    """Builds a body.

    Example:
        >>> g = Glue()
        >>> x = g.value("x", Type(torch.float32, ("b", "s")))
        >>> len(g.body(g.op(aten.tanh.default, x)).nodes)
        1
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def value(self, name: str, type: Type) -> fx.Node:
        """A value input."""
        return add_input(self.graph, Input(name, "value", type))

    def param(self, name: str, type: Type) -> fx.Node:
        """A parameter slot."""
        return add_input(self.graph, Input(name, "param", type))

    def env(self, name: str) -> fx.Node:
        """An input of the environment: `training` or `device`."""
        return add_input(self.graph, Input(name, "env"))

    def op(self, target: Any, *args: Any) -> fx.Node:
        """One op."""
        return self.graph.call_function(target, args)

    def cast(self, node: fx.Node, source: torch.dtype, target: torch.dtype) -> fx.Node:
        """A value in another dtype; itself if it has that already."""
        return node if source == target else self.op(aten.to.dtype, node, target)

    def body(self, *results: fx.Node) -> Body:
        """The body that returns these."""
        self.graph.output(tuple(results))
        return Body(self.graph)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of routers, gates, scores and loss terms: fp32, or better if the model is."""
    return torch.promote_types(dtype, torch.float32)
