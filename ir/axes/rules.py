"""Transfer rules, one an op: the axes of a result from the axes of the operands, or a refusal.

This file holds the registry and the rule of elementwise ops; `layout`, `reductions`, `contractions` (products and
attention) and `dispatch` (lookups, experts) hold the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from depthc.ir.axes.labels import Conflict, Dim, Label, SplitAxis, kinds_in
from depthc.ir.axes.ops import Slot, is_pointwise, op_name, operands

if TYPE_CHECKING:
    from depthc.ir.axes.inference import Inference

Rule = Callable[["Inference", fx.Node], Any]
RULES: dict[str, Rule] = {}

SPANS = "run the block on all tokens, or use a part of it that does not mix tokens (legal_spans)"
BATCH = "make the op treat every row of the batch alone"
STATIC = "write the op in terms of linear, matmul, softmax and elementwise ops"


@dataclass(frozen=True)
class Refusal:
    """One op that keeps a block from running on a subset of its tokens."""

    op: str
    axis: str
    reason: str
    remedy: str
    source: str = ""
    node: fx.Node | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.op}: {self.reason} ({self.axis} axis)" + (f" at {self.source}" if self.source else "")


@dataclass(frozen=True)
class Edge:
    """How an op reads an operand: `label` with token axes in the role that they have there.

    `space` are the dimensions that the operand is broadcast against, aligned on the right; it says where a batch
    dimension goes that the operand itself does not have.
    """

    label: Label
    space: Label


class Refuse(Exception):
    """A rule's answer for an op that a subset of the tokens cannot go through."""

    def __init__(self, axis: str, reason: str, remedy: str = SPANS) -> None:
        self.axis, self.reason, self.remedy = axis, reason, remedy
        super().__init__(reason)


class Flip(Exception):
    """The first operand of these ops turned out to hold the keys: infer again with that known."""

    def __init__(self, entries: set[fx.Node]) -> None:
        self.entries = entries
        super().__init__()


def explain(error: Exception) -> tuple[str, str, str]:
    """Axis, reason and remedy of anything that a rule raises."""
    if isinstance(error, Refuse):
        return error.axis, error.reason, error.remedy
    if isinstance(error, SplitAxis):
        return error.atom.kind, f"a reshape splits the {error.atom.kind} axis", SPANS
    assert isinstance(error, Conflict)
    kinds = kinds_in((error.left, error.right))
    axis = next((k for k in ("token", "key", "sorted", "batch") if k in kinds), "free")
    return axis, f"two different axes meet: {error}", SPANS


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under op names."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def apply(flow: Inference, node: fx.Node) -> Any:
    """The label of a node's value by the rule of its op."""
    known = RULES.get(op_name(node)) or (pointwise if is_pointwise(node) else _opaque)
    return known(flow, node)


def keep_out(dims: Iterable[Dim], verb: str) -> None:
    """Refuse an op that touches anything but free axes."""
    for kind in ("batch", "token", "key", "sorted"):
        if kind in kinds_in(dims):
            name = {"key": "key (the tokens that an attention reads)", "sorted": "sorted token"}.get(kind, kind)
            raise Refuse(kind, f"{verb} the {name} axis", BATCH if kind == "batch" else SPANS)


def flip_or_refuse(flow: Inference, node: fx.Node, source: fx.Node, reason: str) -> None:
    """Turn the attention that `source` comes from the other way around; if that was tried, refuse."""
    entries = flow.entries_behind(source)
    if node in flow.moving and entries and not entries & flow.flips:
        raise Flip(entries)
    raise Refuse("token", reason)


def _opaque(flow: Inference, node: fx.Node) -> Any:
    for _, source in operands(node):
        label = flow.labels.get(source)
        if isinstance(label, tuple):
            keep_out(flow.label(source), f"no rule says what {op_name(node)} does along")
    return fresh_label(flow, node)


def fresh_label(flow: Inference, node: fx.Node) -> Any:
    """Free axes for every dimension of a result."""
    value = flow.probe.values[node]
    if isinstance(value, Tensor):
        return tuple(flow.fresh(node, (0, d), size) for d, size in enumerate(value.shape))
    return [
        tuple(flow.fresh(node, (i, d), size) for d, size in enumerate(v.shape)) if isinstance(v, Tensor) else None
        for i, v in enumerate(value)
    ]


def pointwise(flow: Inference, node: fx.Node) -> Label | list[Label | None]:
    """Operands are aligned on the right and unified."""
    slots = [(slot, source) for slot, source in operands(node) if isinstance(flow.labels.get(source), tuple)]
    if op_name(node) == "type_as":
        slots = slots[:1]
    sizes = [s for s in node.args if isinstance(s, fx.Node) and type(flow.probe.values[s]) is int]
    if sizes and node in flow.moving:
        where = node.meta.get("source", "")
        flow.notes[f"{node.target} computes with a length, which stays that of all tokens {where}".strip()] = None
    label, value = align(flow, node, slots), flow.probe.values[node]
    return [label] * len(value) if isinstance(value, list | tuple) else label


def align(flow: Inference, node: fx.Node, slots: Sequence[tuple[Slot, fx.Node]]) -> Label:
    """Broadcast operands together, each token axis in its role, and record how each is read."""
    labels = {slot: flow.label(source) for slot, source in slots}
    rank = max(map(len, labels.values()), default=0)
    padded = {slot: [()] * (rank - len(label)) + list(label) for slot, label in labels.items()}
    _roles(flow, node, dict(slots), padded)
    space: list[Dim] = [()] * rank
    for dims in padded.values():
        space = [flow.unify(a, b) for a, b in zip(space, dims, strict=True)]
    for slot, _ in slots:
        dims = padded[slot][rank - len(labels[slot]) :]
        flow.record(node, slot, tuple(dims), tuple(space))
    return tuple(space)


def _roles(flow: Inference, node: fx.Node, sources: dict[Slot, fx.Node], padded: dict[Slot, list[Dim]]) -> None:
    """Read tokens as keys where another operand has its key axis, and where tokens meet tokens on another dimension."""
    moving = {slot: dims for slot, dims in padded.items() if sources[slot] in flow.moving}
    wanted: dict[int, str] = {}
    for dims in moving.values():
        if "key" in kinds_in(dims):
            wanted.update({d: kind for d, dim in enumerate(dims) for kind in kinds_in([dim]) & {"token", "key"}})
    tokens = {slot: _with(dims, "token") for slot, dims in moving.items() if "key" not in kinds_in(dims)}
    places = sorted({d for found in tokens.values() for d in found})
    if not wanted and len(places) > 1:  # the outer sum or product of tokens with tokens
        key = places[0] if node in flow.flips else places[-1]
        wanted = {d: "key" if d == key else "token" for d in places}
    elif not wanted and len(places) == 1:
        wanted = {places[0]: "token"}
    for slot, dims in padded.items():
        source, before = sources[slot], list(dims)
        if source in flow.moving:
            if "key" in kinds_in(dims) or not any(wanted.get(d) == "key" for d in tokens.get(slot, ())):
                continue
            if any(w == "token" and dims[d] for d, w in wanted.items()):
                _keys_by_lookup(flow, node, source)
        other = "key" if "token" in wanted.values() and source not in flow.moving else ""
        dims[:] = [flow.in_role(dim, wanted.get(d, other)) for d, dim in enumerate(dims)]
        if source in flow.moving and dims != before:
            flow.entries.add(node)


def _with(dims: Sequence[Dim], kind: str) -> list[int]:
    return [d for d, dim in enumerate(dims) if any(a.kind == kind for a in dim)]


def _keys_by_lookup(flow: Inference, node: fx.Node, source: fx.Node) -> None:
    """Keys that look their queries up (disentangled attention): the `gather` behind `source` reads keys."""
    while op_name(source) in ("transpose", "permute", "view", "unsqueeze", "squeeze", "to", "div", "mul"):
        source = source.all_input_nodes[0]
    if op_name(source) == "gather" and source not in flow.flips:
        raise Flip({source})
    raise Refuse("token", "token and key axis meet the wrong way around")
