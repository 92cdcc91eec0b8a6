"""Restriction: the part of a program that one of its outputs needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx
from torch.utils import _pytree as pytree

from depthc.ir import sizes
from depthc.ir.body import Body, behind
from depthc.ir.liveness import read_first, without_taps
from depthc.ir.program import Program, Segment, Stack
from depthc.ir.signature import Leaf, Signature


def restricted(program: Program, output: str) -> Program:
    """A program that returns the value `output` alone, and takes only the arguments that it depends on.

    Example:
        >>> restricted(program, "logits")  # doctest: +SKIP
    """
    signature = replace(program.signature, outputs=(output,), out_spec=pytree.treespec_leaf())
    body, live = needed(without_taps(replace(program, signature=signature)).body, {output})
    return replace(program, body=body, signature=_taking(signature, live))


def needed(items: Sequence[Segment | Stack], live: set[str]) -> tuple[tuple[Segment | Stack, ...], set[str]]:
    """The stacks, and of segments the results that are read later or are `live` at the end; and what is live before."""
    kept: list[Segment | Stack] = []
    for item in reversed(items):
        if isinstance(item, Segment):
            if not live & {*item.writes}:
                continue
            item = _only(item, live)
            live = live - {*item.writes} | {*item.reads}
        else:
            live = live | {*read_first(item.ops)}
        kept.append(item)
    return tuple(reversed(kept)), live


def _only(segment: Segment, live: set[str]) -> Segment:
    """A segment with the results that are live, and the inputs that those need."""
    kept = [i for i, name in enumerate(segment.writes) if name in live]
    body = segment.body
    needed = behind(body.results[i] for i in kept)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in (*body.placeholders, *body.nodes):
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[body.results[i]] for i in kept))
    values, params = body.placeholders_of("value"), body.placeholders_of("param")
    return replace(
        segment,
        body=Body(graph),
        reads=tuple(name for node, name in zip(values, segment.reads, strict=True) if node in needed),
        params=tuple(name for node, name in zip(params, segment.params, strict=True) if node in needed),
        writes=tuple(segment.writes[i] for i in kept),
    )


def _taking(signature: Signature, live: set[str]) -> Signature:
    """The signature with the arguments of which something is read, and those without a tensor."""
    inputs: list[Leaf] = []
    names: list[str] = []
    specs: list[pytree.TreeSpec] = []
    leaves = iter(signature.inputs)
    for name, spec in zip(signature.in_spec.context, signature.in_spec.children(), strict=True):
        own = [next(leaves) for _ in range(spec.num_leaves)]
        if any(leaf.name in live for leaf in own) or all(leaf.type is None for leaf in own):
            names, specs, inputs = [*names, name], [*specs, spec], [*inputs, *own]
    known = {n for leaf in inputs if leaf.type for n in leaf.type.size_names()}
    guards = tuple(g for g in signature.guards if sizes.names(sizes.read(g)) <= known)
    ranges = {n: span for n, span in signature.ranges.items() if n in known}
    spec = pytree.TreeSpec(dict, names, specs)
    return replace(signature, inputs=tuple(inputs), in_spec=spec, guards=guards, ranges=ranges)
