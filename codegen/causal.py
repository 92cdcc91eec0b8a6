"""Causal attention by its flag: masks that say no more than causality are neither computed nor read.

A captured model makes its mask as a tensor [batch, 1, tokens, tokens]. Where it is shown to be causality and no more
(`depthc.ir.masks.causality`), attention is told so instead, as the model itself would have told it outside of a
capture: its fast kernels take no mask. Neither do they need keys and values that are repeated for every query head, in
half precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from depthc.codegen.grouped import Arguments, unrepeated, with_calls
from depthc.ir.axes.ops import argument
from depthc.ir.axes.ports import ports_of
from depthc.ir.body import Body
from depthc.ir.liveness import read_first
from depthc.ir.masks.causality import Causality
from depthc.ir.program import Block, Call, Loop, On, Op, Program, Stack
from depthc.ir.restrict import needed
from depthc.ir.types import Type


def flagged(program: Program) -> Program:
    """The program with `is_causal` in place of every mask that is causality and no more; the same function.

    A block keeps its mask if one of its applications has another one.
    """
    causality, blocks = Causality.of(program), dict(program.blocks)
    dropped: dict[str, tuple[int, ...]] = {}
    for name, block in program.blocks.items():
        if nodes := [port.entries[0] for port in ports_of(block) if causality.alone(block, port)]:
            blocks[name], dropped[name] = _with_flag(block, nodes)
    if not dropped:
        return program
    items = [_dropping(item, dropped) if isinstance(item, Stack) else item for item in program.body]
    outputs = {name for name in program.signature.outputs if isinstance(name, str)}
    return replace(program, blocks=blocks, body=needed(items, outputs)[0])


def _with_flag(block: Block, nodes: Sequence[fx.Node]) -> tuple[Block, tuple[int, ...]]:
    """The block with the flag, without the side inputs that only masks read; and which those were."""
    graph, copies = with_calls(block.body, {node: _by_flag(block, node) for node in nodes})
    values = block.body.placeholders_of("value")
    unread = tuple(i for i, node in enumerate(values) if i >= block.carries and node.users and not copies[node].users)
    for i in unread:
        graph.erase_node(copies[values[i]])
    return replace(block, body=Body(graph)), unread


def _by_flag(block: Block, node: fx.Node) -> Arguments:
    """The arguments of an attention op with its flag.

    In half precision, key heads are not repeated: in single precision no fast kernel shares them.
    """
    stream = block.body.inputs_of("value")[0].type
    half = isinstance(stream, Type) and stream.dtype in (torch.bfloat16, torch.float16)
    rows = unrepeated(block, node) if half else None
    scale, shared = argument(node, 6, "scale"), rows is not None or argument(node, 7, "enable_gqa", False)
    given = {"scale": scale, "enable_gqa": shared or None}
    args = *(rows or node.args[:3]), None, argument(node, 4, "dropout_p", 0.0), True
    return args, {name: value for name, value in given.items() if value is not None}


def _dropping(stack: Stack, dropped: Mapping[str, tuple[int, ...]]) -> Stack:
    return replace(stack, ops=tuple(_without(op, dropped) for op in stack.ops))


def _without(op: Op, dropped: Mapping[str, tuple[int, ...]]) -> Op:
    """An op whose calls do not read what their blocks no longer take."""
    match op:
        case Call():
            gone = dropped.get(op.block, ())
            return replace(op, reads=tuple(name for i, name in enumerate(op.reads) if i not in gone))
        case Loop():
            return replace(op, body=tuple(_without(inner, dropped) for inner in op.body))
        case On():
            body = tuple(_without(inner, dropped) for inner in op.body)
            read = read_first(body)
            return replace(op, body=body, reads=tuple(name for name in op.reads if name in read or name in op.writes))
    return op
