"""Token axes: what every dimension inside a block is, and what every op does along the tokens.

Labels are inferred forward from the carry by one rule an op, repeated until nothing new is bound: side inputs and
parameters start as free axes and become token axes where they meet one. An op that moves data along the tokens or the
batch, other than an attention, is refused with its source line; all refusals are collected.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from depthc.ir.axes.inference import Inference
from depthc.ir.axes.labels import Atom, Label, kinds_in, label_text
from depthc.ir.axes.ops import Slot, operands
from depthc.ir.axes.probe import Probe, probe
from depthc.ir.axes.rules import Edge, Flip, Refusal
from depthc.ir.errors import SubsetError
from depthc.ir.memo import once
from depthc.ir.program import Block


@dataclass(frozen=True, eq=False)
class Axes:
    """The axes of a block.

    Attributes:
        labels: a label for every tensor-valued node; a list of labels where the value is a sequence.
        edges: how ops read operands, where that is not simply their label; by op and operand slot.
        kinds: of every op that depends on the carry: "token-wise", "positional" (reads a side input at the token's
            position), "dispatch", "score" (has a key axis), "entry", "exit", "fused" (an attention op), "mixing".
        moving: the nodes that depend on a carry.
        iotas: operands that number the rows of a dispatch, and are made anew for other rows.
        refusals: why the block cannot run on a subset of its tokens; empty if it can.
        notes: what a reader should know though it is legal.
        batch, token, key: the atoms of the three axes.
    """

    block: Block
    probe: Probe
    labels: dict[fx.Node, Any]
    edges: dict[tuple[fx.Node, Slot], Edge]
    kinds: dict[fx.Node, str]
    moving: frozenset[fx.Node]
    iotas: frozenset[tuple[fx.Node, Slot]]
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]
    batch: Atom
    token: Atom
    key: Atom

    @property
    def legal(self) -> bool:
        """Whether the block runs on any subset of its tokens."""
        return not self.refusals

    def read(self, node: fx.Node, slot: Slot, source: fx.Node) -> Label:
        """The label of the operand in `slot` as its op reads it; empty if it is not a tensor."""
        edge = self.edges.get((node, slot))
        label = edge.label if edge else self.labels.get(source)
        return label if isinstance(label, tuple) else ()

    def require_legal(self) -> None:
        """Raise what `run_rows` raises.

        Raises:
            SubsetError: with every refusal.
        """
        if self.refusals:
            raise SubsetError(
                f"block {self.block.name!r} cannot run on a subset of its tokens",
                where=self.refusals[0].source,
                expected="ops that treat tokens alike, and attentions",
                found="; ".join(map(str, self.refusals)),
                remedy=self.refusals[0].remedy,
            )

    def __str__(self) -> str:
        """One line a value: its name, its label and its kind."""
        nodes = self.block.body.graph.nodes
        tensors = ((n, self.labels[n]) for n in nodes if isinstance(self.labels.get(n), tuple))
        return "\n".join(f"{n.name}: {label_text(label)} {self.kinds.get(n, 'side')}" for n, label in tensors)


def analyse(block: Block) -> Axes:
    """The axes of a block; computed once a body.

    Example:
        >>> print(analyse(program.blocks["layer"]))  # doctest: +SKIP
        h: [batch, token, 64] side
        linear: [batch, token, 64] token-wise
    """
    return once(block, "axes", lambda: _analyse(block))


def batch_dim(block: Block) -> int:
    """The dimension of the batch in a block's state."""
    axes = analyse(block)
    return int(axes.labels[block.body.placeholders_of("value")[0]].index((axes.batch,)))


def _analyse(block: Block) -> Axes:
    probed = probe(block.body)
    flips: set[fx.Node] = set()
    while True:
        try:
            return _finished(Inference(block, probed, flips))
        except Flip as flip:
            flips |= flip.entries


def _finished(flow: Inference) -> Axes:
    flow.run()
    edges = {key: Edge(flow.resolved(e.label), flow.resolved(e.space)) for key, e in flow.edges.items()}
    order = {n: i for i, n in enumerate(flow.body.graph.nodes)}
    axes = Axes(
        flow.block,
        flow.probe,
        {n: flow.resolved(label) for n, label in flow.labels.items()},
        edges,
        {},
        frozenset(flow.moving),
        frozenset(flow.iotas),
        tuple(sorted(flow.refusals.values(), key=lambda r: order[r.node] if r.node else -1)),
        tuple(flow.notes),
        flow.batch,
        flow.token,
        flow.key,
    )
    axes.kinds.update({n: _kind(flow, axes, n) for n in flow.body.nodes if n in flow.moving})
    return axes


def _kind(flow: Inference, axes: Axes, node: fx.Node) -> str:
    named = {"mixing": flow.refusals, "fused": flow.fused, "entry": flow.entries, "exit": flow.exits}
    for kind, members in named.items():
        if node in members:
            return kind
    present = kinds_in(dim for n in (node, *node.all_input_nodes) for dim in _dims(axes, n))
    if "key" in present:
        return "score"
    if "sorted" in present or node in flow.facts.points:
        return "dispatch"
    sides = [(slot, source) for slot, source in operands(node) if source not in axes.moving]
    positional = any("token" in kinds_in(axes.read(node, slot, source)) for slot, source in sides)
    return "positional" if positional else "token-wise"


def _dims(axes: Axes, node: fx.Node) -> Iterator[Any]:
    label = axes.labels.get(node)
    yield from label if isinstance(label, tuple) else ()
