"""Causal attention by its flag: masks that say no more than causality are neither computed nor read.

A captured model makes its mask as a tensor [batch, 1, tokens, tokens]. Where it is shown to be causality and no more,
attention is told so instead, as the model itself would have told it outside of a capture: its fast kernels take no
mask. What is shown: the mask is made of sizes and numbers alone, so neither arguments nor weights, modes or random
numbers change it; and it is causality, entry for entry, at a short length and at one above all of its numbers. Neither
do such kernels need keys and values that are repeated for every query head, in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.ops import argument, op_name
from depthc.ir.axes.ports import Port, ports_of
from depthc.ir.body import Body
from depthc.ir.liveness import reads_of
from depthc.ir.masks.cones import Choice, Evaluation, Site, Unknown, inside, sites_of
from depthc.ir.program import Block, Call, Loop, On, Op, Program, Segment, Stack
from depthc.ir.restrict import only
from depthc.ir.text.functions import walk
from depthc.ir.types import Type

LENGTHS = 37, 2048  # where a mask is looked at: the short one, and the longest that is worth it
_BATCH = 2


def flagged(program: Program) -> Program:
    """The program with `is_causal` in place of every mask that is causality and no more; the same function.

    A block keeps its mask if one of its applications has another one.
    """
    sites = sites_of(program)
    counts = [op.count for op, _ in walk(program.stacks) if isinstance(op, Loop)]
    if not all(isinstance(count, int) for count in counts):  # iterations that are not among the sites
        return program
    blocks = dict(program.blocks)
    dropped: dict[str, tuple[int, ...]] = {}
    for name, block in program.blocks.items():
        uses = [site for site in sites if site.block is block]
        nodes = [node for port in ports_of(block) if (node := _masked(block, port))]
        if nodes := [node for node in nodes if uses and all(_is_causal(program, site, node) for site in uses)]:
            blocks[name], dropped[name] = _with_flag(block, nodes)
    if not dropped:
        return program
    stacks = [_dropping(item, dropped) if isinstance(item, Stack) else item for item in program.body]
    return replace(program, blocks=blocks, body=_live(stacks, program.signature.outputs))


def _masked(block: Block, port: Port) -> fx.Node | None:
    """The op of a self-attention port, if it reads a mask and its keys are the tokens' own, none before or behind."""
    if port.kind != "fused" or port.cross:
        return None
    (node,) = port.entries
    axes, masked = analyse(block), isinstance(argument(node, 3, "attn_mask"), fx.Node)
    alone = all(axes.labels[source][-2] == (axes.token,) for source in node.args[:3])  # type: ignore[index]
    return node if masked and alone else None


def _is_causal(program: Program, site: Site, node: fx.Node) -> bool:
    """Whether the mask of an attention op is causality and no more in one application of its block."""
    mask = argument(node, 3, "attn_mask")
    axes, choice = analyse(site.block), Choice(program)  # type: ignore[arg-type]
    names = {size: name for name, size in axes.probe.sizes.items()}
    token, batch = names.get(axes.token.size), names.get(axes.batch.size)
    try:
        numbers = _numbers_of(site, [mask])
        lengths = LENGTHS[0], max(2 * max(numbers, default=0), LENGTHS[0]) + 30
        if token is None or lengths[1] > LENGTHS[1]:
            return False
        fixed = {batch: choice.clip(batch, _BATCH)} if batch else {}
        sizes = [choice.near(token, length, fixed) for length in lengths]
        if sizes[1][token] <= max(numbers, default=0):
            return False
        return all(_is_lower(Evaluation(program, own, {}).values(site, [mask])[0], own[token]) for own in sizes)
    except (Unknown, RuntimeError, ValueError, IndexError, TypeError):  # or an op does not take such sizes
        return False


def _numbers_of(site: Site, wanted: Sequence[fx.Node]) -> set[int]:
    """The numbers in what values are computed from.

    Raises:
        Unknown: more than sizes and numbers is in there.
    """
    found: set[int] = set()
    cone = inside(site, wanted, frozenset())
    for node in cone:
        if node.op == "call_function":
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise Unknown("random numbers")
            leaves = tree_leaves((node.args, dict(node.kwargs)))
            found.update(math.ceil(abs(x)) for x in leaves if isinstance(x, int | float) and abs(x) < _ENDLESS)
        elif node in wanted or any(user in cone and op_name(user) != "sym_size" for user in node.users):
            found |= _numbers_behind(site, node)
    return found


def _numbers_behind(site: Site, node: fx.Node) -> set[int]:
    """The numbers behind an input of a body."""
    origin, input = site.origin(node), node.meta["input"]
    if input.kind == "const":
        return {math.ceil(abs(origin))}
    if input.kind == "value" and isinstance(origin, tuple) and origin[0].block is None:
        source, index = origin
        return _numbers_of(source, [source.body.results[index]])
    if (input.kind, input.name) != ("env", "device"):
        raise Unknown(f"{input.name} has a part in it")
    return set()


_ENDLESS = 1e8  # numbers above are "up to the end", or stand for minus infinity


def _is_lower(mask: Tensor, length: int) -> bool:
    """Whether a mask allows the lower triangle, and says nothing else, for every batch row and head."""
    if mask.dim() < 2 or mask.shape[-2:] != (length, length):
        return False
    lower = torch.ones(length, length, dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        return bool((mask == lower).all())
    closed = (mask == -torch.inf) | (mask == torch.finfo(mask.dtype).min)
    return bool(torch.where(lower, mask == 0, closed).all())


def _with_flag(block: Block, nodes: Sequence[fx.Node]) -> tuple[Block, tuple[int, ...]]:
    """The block with the flag, without the side inputs that only masks read; and which those were."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in (*block.body.placeholders, *block.body.nodes):
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in nodes:
            rows = _unrepeated(block, node)
            read = [copies[source] for source in rows or node.args[:3]]  # type: ignore[index]
            scale, shared = argument(copies[node], 6, "scale"), bool(rows) or argument(node, 7, "enable_gqa", False)
            copies[node].args = (*read, None, argument(copies[node], 4, "dropout_p", 0.0), True)
            given = {"scale": scale, "enable_gqa": shared or None}
            copies[node].kwargs = {name: value for name, value in given.items() if value is not None}
    graph.output(tuple(copies[node] for node in block.body.results))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    values = block.body.placeholders_of("value")
    unread = tuple(i for i, node in enumerate(values) if i >= block.carries and node.users and not copies[node].users)
    for i in unread:
        graph.erase_node(copies[values[i]])
    return replace(block, body=Body(graph)), unread


def _unrepeated(block: Block, node: fx.Node) -> list[fx.Node] | None:
    """Queries, keys and values of an op whose key heads were repeated for its query heads, as they were before.

    In half precision only: in single precision no fast kernel shares key heads.
    """
    query, *rows = node.args[:3]
    found = [_repeats(block, row) for row in rows]  # type: ignore[arg-type]
    stream = block.body.inputs_of("value")[0].type
    half = isinstance(stream, Type) and stream.dtype in (torch.bfloat16, torch.float16)
    return [query, *found] if half and None not in found else None  # type: ignore[list-item]


def _repeats(block: Block, node: fx.Node) -> fx.Node | None:
    """x, if a node is x [batch, heads, tokens, features] with every head several times."""
    chain = [node]
    for name in ("reshape", "expand", "unsqueeze"):
        if op_name(chain[-1]) not in (name, {"reshape": "view"}.get(name, name)):
            return None
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    made, wide, thin, source = (analyse(block).probe.shape(n) for n in chain)
    batch, heads, *rest = source
    repeated = wide == (batch, heads, wide[2], *rest) and thin == (batch, heads, 1, *rest)
    return chain[-1] if repeated and made == (batch, heads * wide[2], *rest) else None


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
            read = _names(body)
            return replace(op, body=body, reads=tuple(name for name in op.reads if name in read or name in op.writes))
    return op


def _names(ops: Iterable[Op]) -> set[str]:
    found = [op for op, _ in walk(tuple(ops))]
    until = {op.until for op in found if isinstance(op, Loop) and op.until}
    return until | {name for op in found for name in reads_of(op)}


def _live(items: Sequence[Segment | Stack], outputs: Sequence[object]) -> tuple[Segment | Stack, ...]:
    """The items of a program without results of segments that nothing reads."""
    read = {name for name in outputs if isinstance(name, str)}
    kept: list[Segment | Stack] = []
    for item in reversed(items):
        if isinstance(item, Segment):
            item = only(item, read)
            read |= {*item.reads}
        else:
            read |= _names(item.ops)
        kept.append(item)
    return tuple(reversed(kept))
