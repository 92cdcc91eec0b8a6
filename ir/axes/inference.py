"""Inference: the labels of a block, forward from its carry, one rule an op, until nothing new is bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor, fx

from depthc.ir.axes import contractions, dispatch, layout, reductions, rules
from depthc.ir.axes.facts import Facts
from depthc.ir.axes.labels import Atom, Conflict, Dim, Label, SplitAxis, Unifier, kinds_in, label_text, resolve, size_of
from depthc.ir.axes.ops import FILLS, Slot, is_tensor, op_name, operands
from depthc.ir.axes.probe import Probe
from depthc.ir.axes.rules import Edge, Refusal
from depthc.ir.body import Body
from depthc.ir.program import Block
from depthc.ir.sizes import names, read

assert contractions and dispatch and layout and reductions  # imported for the rules that they register
_PASSES = 12  # far above what any model needed (2)


class Inference:
    """One inference over a block. The rules read labels with `read`, and say how operands are read with `record`."""

    def __init__(self, block: Block, probed: Probe, flips: set[fx.Node]) -> None:
        self.block, self.body, self.probe, self.flips = block, block.body, probed, flips
        self.unifier = Unifier()
        self.labels: dict[fx.Node, Any] = {}
        self.edges: dict[tuple[fx.Node, Slot], Edge] = {}
        self.refusals: dict[fx.Node | None, Refusal] = {}
        self.notes: dict[str, None] = {}
        self.facts = Facts()
        self.entries: set[fx.Node] = set()
        self.exits: set[fx.Node] = set()
        self.fused: set[fx.Node] = set()
        self.iotas: set[tuple[fx.Node, Slot]] = set()
        self.sorted_axes: dict[fx.Node, Atom] = {}
        self.ascending: dict[Atom, fx.Node] = {}  # by what values an axis was sorted, if they ascend on it
        self._fresh: dict[tuple[fx.Node, Any, int], Atom] = {}
        self._extended: dict[Any, Atom] = {}
        carries = self.body.placeholders_of("value")[: block.carries]
        self.moving = set(_reached(self.body, carries, probed))
        self.valued = set(_reached(self.body, self.body.placeholders_of("value"), probed))
        self._seed(carries)

    def _seed(self, carries: Sequence[fx.Node]) -> None:
        """Labels of the inputs: the carry's batch and token dimensions are known, all others are free."""
        where = _find_axes(carries[0]) if carries else (None, None)
        for node in self.body.placeholders:
            value = self.probe.values[node]
            if isinstance(value, Tensor):
                self.labels[node] = tuple(self.fresh(node, d, size) for d, size in enumerate(value.shape))
        batch, token = where
        shape = self.probe.shape(carries[0]) if carries else ()
        self.batch = Atom("batch", 1 if batch is None else shape[batch])
        self.token = Atom("token", 1 if token is None else shape[token])
        self.key = Atom("key", self.token.size)
        for node in carries:
            special = _special_dims(node, carries[0], where)
            self.labels[node] = tuple(
                {0: (self.batch,), 1: (self.token,)}.get(special.get(d, -1), dim) if dim else dim
                for d, dim in enumerate(self.labels[node])
            )
        self._seeded = token is not None and self.token.size > 1

    def run(self) -> None:
        """Apply the rules until a pass binds nothing."""
        for _ in range(_PASSES):
            before = self.unifier.bound
            for kept in (self.refusals, self.notes, self.edges, self.entries, self.exits, self.fused, self.iotas):
                kept.clear()
            self.facts = Facts()
            for node in self.body.nodes:
                self._visit(node)
            self._check_scores()
            self._check_results()
            if self.unifier.bound == before:
                return

    def _visit(self, node: fx.Node) -> None:
        value = self.probe.values[node]
        if not is_tensor(value):
            self.labels[node] = None
            return
        try:
            self.facts.check(node)
            label = rules.apply(self, node)
            self._check_side_reads(node)
            self.facts.carry_over(self, node)
        except (Conflict, SplitAxis, rules.Refuse) as error:
            label = self._after_refusal(node, error)
        self.labels[node] = label

    def _check_side_reads(self, node: fx.Node) -> None:
        """Rows gathered from a side input differ along the batch, so the op must have room for a batch dimension.

        None is in sorted order, but fills.
        """
        if node not in self.moving:
            return
        for slot, source in operands(node):
            if source in self.moving or not isinstance(self.labels.get(source), tuple):
                continue
            edge = self.edges.get((node, slot)) or Edge(self.label(source), ())
            kinds = kinds_in(map(resolve, edge.label))
            if "sorted" in kinds and (node, slot) not in self.iotas and op_name(source) not in FILLS:
                raise rules.Refuse("token", "a side input is read in sorted order")
            around = kinds | kinds_in(map(resolve, edge.space))
            if self.batch.size > 1 and kinds & {"token", "key"} and "batch" not in around:
                raise rules.Refuse("token", "a side input read by position has no batch dimension here", rules.STATIC)

    def _after_refusal(self, node: fx.Node, error: Exception) -> Any:
        """Record why, and guess the result's axes by size so that later ops are judged as well."""
        moves = node in self.moving
        if moves:
            axis, reason, remedy = rules.explain(error)
            self.refusals[node] = Refusal(str(node.target), axis, reason, remedy, node.meta.get("source", ""), node)
        value = self.probe.values[node]
        if isinstance(value, Tensor):
            return self._guess(node, value, 0, moves)
        return [self._guess(node, v, i, moves) if isinstance(v, Tensor) else None for i, v in enumerate(value)]

    def _guess(self, node: fx.Node, value: Tensor, slot: int, moves: bool) -> Label:
        known: list[Dim] = [(self.batch,), (self.token,), (self.batch, self.token)] if moves else []
        dims: list[Dim] = []
        for d, size in enumerate(value.shape):
            match = next((k for k in known if size > 1 and size_of(k) == size), None)
            if match is not None:
                known = [k for k in known if not set(k) & set(match)]
            dims.append(self.fresh(node, ("guess", slot, d), size) if match is None else match)
        return tuple(dims)

    def _check_scores(self) -> None:
        """Scores are for sums over keys: what else is made of them is no attention."""
        for entry in self.entries - self.refusals.keys():
            seen, stack = {entry}, [entry]
            while stack:
                node = stack.pop()
                label = self.labels[node]
                keyed = isinstance(label, list) or "key" in kinds_in(self.label(node))
                following = {u for u in node.users if keyed and u in self.moving and u in self.labels} - seen
                seen |= following
                stack.extend(following)
            if seen.isdisjoint(self.exits | self.fused | self.refusals.keys()):
                reason, source = "no sum over the keys ends its scores", entry.meta.get("source", "")
                self.refusals[entry] = Refusal(str(entry.target), "key", reason, rules.SPANS, source, entry)

    def _check_results(self) -> None:
        if not self._seeded:
            self.refusals[None] = Refusal(
                "input", "token", "the carry has no token axis", "give the model a dynamic length, or a longer example"
            )
        carries = self.body.placeholders_of("value")[: self.block.carries]
        for node, carry in zip_longest(self.body.results, carries):
            if node is None:
                break
            label = self.label(node)
            continued = carry is not None and self.probe.shape(node) == self.probe.shape(carry)
            wanted = self.label(carry) if continued else label
            places = [[d for d, dim in enumerate(x) if dim in ((self.batch,), (self.token,))] for x in (label, wanted)]
            tokens = [a for dim in label for a in dim if a.kind == "token"]
            strange = bool(kinds_in(label) & {"key", "sorted"}) or any(a.extended for a in tokens) or len(tokens) > 1
            if node in self.moving and (places[0] != places[1] or strange or self.facts.tainted(node)):
                self.refusals.setdefault(
                    node,
                    Refusal(
                        str(node.target),
                        "token",
                        f"the result has the axes {label_text(label)}, not one row a token",
                        "return one row a token",
                        node.meta.get("source", ""),
                        node,
                    ),
                )

    # What rules use.

    def resolved(self, label: Any) -> Any:
        """A label, or a sequence of labels, as far as it is known."""
        if isinstance(label, tuple):
            return tuple(map(resolve, label))
        return [self.resolved(part) for part in label] if isinstance(label, list) else None

    def label(self, node: fx.Node) -> Label:
        """The label of a tensor-valued node, as far as it is known."""
        return tuple(resolve(dim) for dim in self.labels[node])

    def operand(self, node: fx.Node, index: int) -> Label:
        """The label of a tensor argument of `node`."""
        source: Any = node.args[index]
        return self.label(source)

    def optional(self, node: fx.Node, index: int) -> Label | None:
        """The label of an argument of `node`, or None if it is not a tensor."""
        source = node.args[index] if index < len(node.args) else None
        tensor = isinstance(source, fx.Node) and isinstance(self.labels.get(source), tuple)
        return self.operand(node, index) if tensor else None

    def record(self, node: fx.Node, slot: Slot, label: Label, space: Label | None = None) -> None:
        """Say how `node` reads the operand in `slot`."""
        self.edges[node, slot] = Edge(label, label if space is None else space)

    def fresh(self, node: fx.Node, slot: Any, size: int) -> Dim:
        """A free axis that `node` makes; the same one in every pass."""
        if size == 1:
            return ()
        atom = self._fresh.setdefault((node, slot, size), Atom("free", size))
        return resolve((atom,))

    def unify(self, left: Dim, right: Dim) -> Dim:
        """Make two dimensions equal."""
        return self.unifier.unify(left, right)

    def extended(self, base: Atom, before: tuple[Dim, ...], after: tuple[Dim, ...]) -> Atom:
        """A token or key axis with other dimensions concatenated to it."""
        before, after = (*before, *base.before), (*base.after, *after)
        if not before and not after:
            return self.key if base.kind == "key" else self.token
        size = self.token.size + sum(map(size_of, (*before, *after)))
        return self._extended.setdefault((base.kind, before, after), Atom(base.kind, size, before, after))

    def in_role(self, dim: Dim, kind: str) -> Dim:
        """A dimension with its token or key atoms read as `kind`."""

        def turn(atom: Atom) -> Atom:
            if atom.kind not in ("token", "key") or kind in (atom.kind, ""):
                return atom
            other = self.key if kind == "key" else self.token
            return self.extended(other, atom.before, atom.after) if atom.extended else other

        return tuple(map(turn, dim))

    def entries_behind(self, node: fx.Node) -> set[fx.Node]:
        """The ops that gave a value its key axis."""
        found: set[fx.Node] = set()
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if current in self.entries:
                found.add(current)
            for source in current.all_input_nodes:
                if source in self.moving and source not in seen and isinstance(self.labels.get(source), tuple):
                    seen.add(source)
                    if "key" in kinds_in(self.label(source)):
                        stack.append(source)
        return found


def _reached(body: Body, sources: Sequence[fx.Node], probed: Probe) -> Iterator[fx.Node]:
    """Every node that depends on the data of `sources`; sizes are not data."""
    reached = set(sources)
    yield from sources
    for node in body.nodes:
        if is_tensor(probed.values[node]) and any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            yield node


def _find_axes(carry: fx.Node) -> tuple[int | None, int | None]:
    """The batch and the token dimension of a carry: by size name, and by position where sizes are static."""
    shape = carry.meta["input"].type.shape
    named = [names(read(s)) if isinstance(s, str) else set() for s in shape]
    batch = next((d for d, found in enumerate(named) if found == {"b"}), None)
    token = next((d for d, found in enumerate(named) if found - {"b"} and d != batch), None)
    inner = range(len(shape) - 1)  # the last dimension holds the features
    if batch is None:
        batch = next((d for d in inner if d != token and not (token is None and d > 0)), None)
    if token is None:
        token = next((d for d in inner if batch is not None and d > batch), None)
    return batch, token


def _special_dims(node: fx.Node, first: fx.Node, where: tuple[int | None, int | None]) -> dict[int, int]:
    """Which dimensions of a carry are the batch (0) and the tokens (1): those with the sizes of the first carry's."""
    if node is first:
        return {d: i for i, d in enumerate(where) if d is not None}
    shape, known = node.meta["input"].type.shape, first.meta["input"].type.shape
    found: dict[int, int] = {}
    for i, d in enumerate(where):
        match = None if d is None else next((e for e, s in enumerate(shape) if s == known[d] and e not in found), None)
        if match is not None:
            found[match] = i
    return found
