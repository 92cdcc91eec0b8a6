"""The ends of a model, found by structure: the table that its tokens are embedded by, and its head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from depthc.ir.axes.ops import op_name
from depthc.ir.axes.ports import PRODUCTS
from depthc.ir.body import Body, behind
from depthc.ir.program import Program, Segment, Stack
from depthc.passes.base import Pass

TRANSPOSITIONS = ("t", "transpose", "permute", "numpy_T")


@dataclass(frozen=True)
class End:
    """An op of a segment with a weight that is read by it alone.

    Attributes:
        node: the embedding, or the product.
        slot: the input of the segment's body that is its weight.
        name: of the parameter.
    """

    segment: Segment
    node: fx.Node
    slot: fx.Node
    name: str


@dataclass(frozen=True)
class Ends:
    """Finds the ends of a model around one of its stacks, or says why there are none.

    Attributes:
        one: the pass that looks for them.
        remedy: what to do without them.
    """

    one: Pass
    program: Program
    stack: Stack
    remedy: str

    def head(self, last: str) -> End:
        """The product with a weight [outputs, features] by which all goes that the layers end in, `last`."""
        at = self.program.body.index(self.stack)
        segment = next((s for s in self.program.body[at + 1 :] if isinstance(s, Segment) and last in s.reads), None)
        if segment is None:
            what, expected = f"no part of the model is behind {self.stack.name!r}", "a head"
            raise self.one.refuse(what, expected=expected, found=f"{last} is what it returns", remedy=self.remedy)
        body = segment.body
        state = body.placeholders_of("value")[segment.reads.index(last)]
        reached = ahead(body, [state])
        node = next((n for n in reversed(body.nodes) if n in reached and op_name(n) in PRODUCTS), None)
        if node is None or {*body.results} & ahead(body, [state], node):
            raise self.one.refuse(
                "there is no head by which all goes that the layers end in",
                where=segment.name,
                expected="one last product with a weight, and no way around it to what the model returns",
                found="no product" if node is None else f"{op_name(node)}, and a way around it",
                remedy=self.remedy,
            )
        slot = _weight_of(node)
        if slot is None:
            cone, slots = behind([node]), body.placeholders_of("param")
            made = [p for p, n in zip(segment.params, slots, strict=True) if n in cone]
            raise self.one.refuse(
                "the head, or what it is tied to, is no weight that its product alone reads as it is",
                where=str(node.meta.get("source", segment.name)),
                expected="x @ W.T of a parameter W, which can be M times as wide; a tied head is then W / M",
                found=f"{op_name(node)}, behind {', '.join(made) or 'no parameters'}",
                remedy=self.remedy,
            )
        return _end(segment, node, slot)

    def table(self, first: str, rows: int) -> End:
        """The embedding of what an argument says that alone becomes `first`; of several that with so many rows."""
        at = self.program.body.index(self.stack)
        writers = [s for s in self.program.body[:at] if isinstance(s, Segment) and first in s.writes]
        found = [end for s in writers[-1:] for end in self._lookups(s, first)]
        if len(found) > 1:
            found = [end for end in found if end.slot.meta["input"].type.shape[0] == rows]
        if len(found) != 1:
            raise self.one.refuse(
                f"{'several tables' if found else 'no table'} can be the one that tokens are embedded by",
                where=self.stack.name,
                expected=f"one embedding of an argument; of several, one with {rows} rows, as many as there are logits",
                found=", ".join(end.name for end in found) or "none",
                remedy=self.remedy,
            )
        end = found[0]
        reached = ahead(end.segment.body, [end.node])
        others = [n for n, r in zip(end.segment.writes, end.segment.body.results, strict=True) if r in reached]
        if others != [first] or len(end.slot.users) > 1:
            raise self.one.refuse(
                "the embedding goes to more than the first layer",
                where=str(end.node.meta.get("source", end.segment.name)),
                expected=f"a table that is read once, and what it gives in {first} alone",
                found=f"{len(end.slot.users)} readers of the table; what it gives is in {', '.join(others)}",
                remedy=self.remedy,
            )
        return end

    def _lookups(self, segment: Segment, first: str) -> list[End]:
        """The embeddings behind a value of a segment whose indices depend on an argument."""
        body, arguments = segment.body, {leaf.name for leaf in self.program.signature.inputs}
        given = [n for n, r in zip(body.placeholders_of("value"), segment.reads, strict=True) if r in arguments]
        asked, needed = ahead(body, given), behind([body.results[segment.writes.index(first)]])
        found = [n for n in body.nodes if n in needed and op_name(n) == "embedding" and n.args[1] in asked]
        slots = body.placeholders_of("param")
        return [_end(segment, n, n.args[0]) for n in found if n.args[0] in slots]  # type: ignore[arg-type]


def _end(segment: Segment, node: fx.Node, slot: fx.Node) -> End:
    return End(segment, node, slot, segment.params[segment.body.placeholders_of("param").index(slot)])


def _weight_of(node: fx.Node) -> fx.Node | None:
    """The parameter W of x @ W.T, if nothing else reads it."""
    name, weight = op_name(node), node.args[1]
    if not isinstance(weight, fx.Node) or [*weight.users] != [node]:
        return None
    if name in ("matmul", "mm") and op_name(weight) in TRANSPOSITIONS:
        weight = weight.args[0]
    elif name != "linear":
        return None
    is_slot = isinstance(weight, fx.Node) and weight.op == "placeholder" and weight.meta["input"].kind == "param"
    return weight if is_slot and len(weight.users) == 1 else None  # type: ignore[union-attr,return-value]


def ahead(body: Body, nodes: Sequence[fx.Node], beside: fx.Node | None = None) -> set[fx.Node]:
    """What depends on some nodes, those included, by other ways than through `beside`."""
    found = {*nodes}
    for node in body.nodes:
        if node is not beside and found & {*node.all_input_nodes}:
            found.add(node)
    return found
