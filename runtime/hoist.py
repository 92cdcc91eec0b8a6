"""Hoisting: of what stands in front of the layers, only what a step's token changes is computed in every step.

Masks and rotary tables of a fixed length do not change; token embeddings do.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        self._kept: dict[str, dict[fx.Node, Any]] = {}

    def run(self, op: Segment | Call, site: str, body: Body, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The results of an op at a place; the inputs that do not change are those of the first time."""
        varying = self._varying(op, body)
        env: dict[fx.Node, Any] = dict(zip(body.placeholders, inputs, strict=True))
        kept = self._kept.get(site)
        env.update(kept or {})
        for node in body.nodes:
            if kept is None or node in varying:
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        if kept is None:
            read = {n for node in varying for n in node.all_input_nodes} | {*body.results}
            self._kept[site] = {node: env[node] for node in body.nodes if node in read and node not in varying}
        self.changing.update(name for name, node in zip(op.writes, body.results, strict=True) if node in varying)
        return tuple(env[node] for node in body.results)

    def _varying(self, op: Segment | Call, body: Body) -> set[fx.Node]:
        values = zip(body.placeholders_of("value"), op.reads, strict=True)
        varying = {node for node, name in values if name in self.changing}
        for node in body.nodes:
            if op_name(node) != "sym_size" and any(source in varying for source in node.all_input_nodes):
                varying.add(node)
        return varying
