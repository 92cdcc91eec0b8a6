"""Key heads as they are: attention reads them once for all the query heads that share one.

A captured model repeats keys and values for every query head. In a step of decoding that would be most of its traffic,
since a cache is read as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.ops import argument, op_name
from depthc.ir.axes.ports import ports_of
from depthc.ir.body import Body
from depthc.ir.program import Block, Program

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of an op, in terms of the nodes of its body
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}  # of scaled_dot_product_attention, from 3 on


def grouped(program: Program) -> Program:
    """The program with attention told so (`enable_gqa`) in place of repeated keys and values; the same function."""
    blocks = {name: _grouped(block) for name, block in program.blocks.items()}
    return replace(program, blocks=blocks)


def _grouped(block: Block) -> Block:
    found: dict[fx.Node, Arguments] = {}
    for node in (port.entries[0] for port in ports_of(block) if port.kind == "fused"):
        if rows := unrepeated(block, node):
            rest = [argument(node, at, name, value) for at, (name, value) in enumerate(_DEFAULTS.items(), 3)]
            found[node] = (*rows, *rest), {"scale": argument(node, 6, "scale"), "enable_gqa": True}
    return replace(block, body=Body(with_calls(block.body, found)[0])) if found else block


def with_calls(body: Body, calls: Mapping[fx.Node, Arguments]) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """The graph of a body with other arguments for some ops, without ops that nothing reads any more; and its nodes."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in (*body.placeholders, *body.nodes):
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in calls:
            copies[node].args, copies[node].kwargs = fx.map_arg(calls[node], copies.__getitem__)
    graph.output(tuple(copies[node] for node in body.results))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return graph, copies


def unrepeated(block: Block, node: fx.Node) -> list[fx.Node] | None:
    """Queries, keys and values of an attention op whose key heads are repeated for its query heads, as before that."""
    query, *rows = node.args[:3]
    found = [_repeated(block, row) for row in rows]  # type: ignore[arg-type]
    return None if None in found else [query, *found]  # type: ignore[list-item]


def _repeated(block: Block, node: fx.Node) -> fx.Node | None:
    """x, if a node is x [batch, heads, tokens, features] with every head several times."""
    chain = [node]
    for name in ("reshape", "expand", "unsqueeze"):
        if op_name(chain[-1]) not in (name, {"reshape": "view"}.get(name, name)):
            return None
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    made, wide, thin, source = (analyse(block).probe.shape(n) for n in chain)
    batch, heads, *rest = source
    several = wide == (batch, heads, wide[2], *rest) and thin == (batch, heads, 1, *rest)
    return chain[-1] if several and made == (batch, heads * wide[2], *rest) else None
