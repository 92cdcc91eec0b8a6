"""Hoisting: of what stands in front of the layers, only what a step's token changes is computed in every step.

Masks and rotary tables of a fixed length do not change; token embeddings do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from depthc.ir.axes.ops import op_name
from depthc.ir.body import Body
from depthc.ir.program import Call, Segment


class Hoisted:
    """Runs segments, each node that no changing value reaches once; only sizes are taken of those that do.

    Attributes:
        changing: the names of values that differ from step to step; grows with what is made of them.
    """

    def __init__(self, changing: str) -> None:
        self.changing = {changing}
        self._kept: dict[str, tuple[set[fx.Node], dict[fx.Node, Any]]] = {}  # what varies, and what else is read

    def run(self, op: Segment | Call, site: str, body: Body, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The results of an op at a place; the inputs that do not change are those of the first time."""
        env: dict[fx.Node, Any] = dict(zip(body.placeholders, inputs, strict=True))
        if site not in self._kept:
            varying = self._varying(op, body)
            self.changing.update(name for name, node in zip(op.writes, body.results, strict=True) if node in varying)
            _compute(body.nodes, env)
            read = {n for node in varying for n in node.all_input_nodes} | {*body.results}
            self._kept[site] = varying, {n: env[n] for n in body.nodes if n in read - varying}
        else:
            varying, others = self._kept[site]
            env.update(others)
            _compute([node for node in body.nodes if node in varying], env)
        return tuple(env[node] for node in body.results)

    def _varying(self, op: Segment | Call, body: Body) -> set[fx.Node]:
        values = zip(body.placeholders_of("value"), op.reads, strict=True)
        varying = {node for node, name in values if name in self.changing}
        for node in body.nodes:
            if op_name(node) != "sym_size" and any(source in varying for source in node.all_input_nodes):
                varying.add(node)
        return varying


def _compute(nodes: Iterable[fx.Node], env: dict[fx.Node, Any]) -> None:
    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
