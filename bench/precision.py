"""Precision: a body or a program in fp64, whatever dtypes it was written with.

Models hold islands of fp32 (norms, rotary tables, softmax) that stay fp32 when the model is converted, so a comparison
in fp64 stalls at 1e-8. A widened body has every floating dtype raised, in its ops and in its inputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from depthc.ir.body import Body
from depthc.ir.program import Loop, Op, Program, Segment, Stack
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
            copy.meta["input"] = replace(node.meta["input"], type=_wide_type(node.meta["input"].type))
    return Body(graph)


def _wide_dtype(value: Any) -> Any:
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def widen_program(program: Program) -> Program:
    """The program with every float in it, and every weight, in fp64."""

    def op(item: Op) -> Op:
        if isinstance(item, Segment):
            return replace(item, body=widen(item.body))
        return replace(item, body=tuple(map(op, item.body))) if isinstance(item, Loop) else item

    def top(item: Segment | Stack) -> Segment | Stack:
        return replace(item, ops=tuple(map(op, item.ops))) if isinstance(item, Stack) else op(item)  # type: ignore[return-value]

    leaves = [replace(leaf, type=leaf.type and _wide_type(leaf.type)) for leaf in program.signature.inputs]
    return replace(
        program,
        signature=replace(program.signature, inputs=tuple(leaves)),
        blocks={name: replace(block, body=widen(block.body)) for name, block in program.blocks.items()},
        params={name: replace(param, type=_wide_type(param.type)) for name, param in program.params.items()},
        body=tuple(map(top, program.body)),
        weights={
            name: weight.detach().to(_WIDE.get(weight.dtype, weight.dtype)) for name, weight in program.weights.items()
        },
    )


def widen_inputs(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a widened program."""
    return pytree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, (args, kwargs)
    )


def _wide_type(type: Type) -> Type:
    return replace(type, dtype=_WIDE.get(type.dtype, type.dtype))
