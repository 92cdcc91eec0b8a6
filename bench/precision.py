"""Precision: a body in fp64, whatever dtypes it was written with.

Models hold islands of fp32 (norms, rotary tables, softmax) that stay fp32 when the model is converted, so a comparison
in fp64 stalls at 1e-8. A widened body has every floating dtype raised, in its ops and in its inputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from depthc.ir.body import Body
from depthc.ir.types import Type

_WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}


def widen(body: Body) -> Body:
    """The same ops with every floating dtype raised to fp64."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in body.graph.nodes:
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        copy.args = map_aggregate(copy.args, _wide_dtype)
        copy.kwargs = map_aggregate(copy.kwargs, _wide_dtype)
        if node.op == "placeholder" and isinstance(node.meta["input"].type, Type):
            type = node.meta["input"].type
            wide = replace(type, dtype=_WIDE.get(type.dtype, type.dtype))
            copy.meta["input"] = replace(node.meta["input"], type=wide)
    return Body(graph)


def _wide_dtype(value: Any) -> Any:
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value
