"""Applications: the operations of a block on all tokens, or on some rows with keys from wherever a plan says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy
from torch import fx

from depthc.ir.axes.analysis import Axes, analyse
from depthc.ir.axes.labels import kinds_in
from depthc.ir.axes.ops import operands
from depthc.ir.axes.ports import ports_of
from depthc.ir.cost.pairs import pairs
from depthc.ir.cost.products import Product
from depthc.ir.cost.shapes import Shape
from depthc.ir.masks.masks import Mask
from depthc.ir.program import Block, Kv
from depthc.ir.rows.schedule import HERE, Frame, Schedule, Source, schedule_of

_SOURCES: dict[str, Source] = {"fresh": "own", "store": "own", "read": "given", "update": "update"}


@dataclass(frozen=True)
class Application:
    """One application of a block.

    Attributes:
        products: of the block, their operations over the sizes of the program.
        masks: one a port; none if attention counts all pairs.
        carry: the shape of what it carries, for all tokens.
    """

    block: Block
    products: Sequence[Product]
    masks: Sequence[Mask]
    carry: Shape

    @cached_property
    def length(self) -> sympy.Expr:
        """How many tokens there are in all."""
        axes = analyse(self.block)
        label = axes.labels[self.block.body.placeholders_of("value")[0]]
        return self.carry[label.index((axes.token,))]

    def whole(self) -> sympy.Expr:
        """The operations on all tokens."""
        return sympy.Add(*(p.flops * self._allowed(p.node, None) for p in self.products))

    def on_rows(self, plans: Sequence[Kv], rows: sympy.Expr, keys: Sequence[sympy.Expr]) -> sympy.Expr:
        """The operations on some rows; `keys` says how many keys every port reads."""
        sources = tuple(_SOURCES[plan.mode] for plan in plans)
        schedule = schedule_of(self.block, sources, tuple(plan.mode == "store" for plan in plans))
        flops = {p.node: p.flops for p in self.products}
        terms = [
            flops[node] * self._share(schedule, node, frame, rows, keys)
            for node, frame in (*schedule.steps, *((side, None) for side in schedule.sides))
            if node in flops
        ]
        return sympy.Add(*terms)

    def _share(
        self, schedule: Schedule, node: fx.Node, frame: Frame | None, rows: sympy.Expr, keys: Sequence[sympy.Expr]
    ) -> sympy.Expr:
        """The part of a product that is run."""
        if frame is None:
            return sympy.S.One
        part = self._allowed(node, rows if set(schedule.sources) == {"own"} else None)
        found = _kinds(schedule.axes, node)
        if found & {"token", "sorted"}:
            part *= (rows if frame == HERE else keys[frame]) / self.length
        if "key" in found:
            part *= keys[schedule.port_of[node]] / self.length
        if frame == HERE and node in schedule.slices:
            part *= sympy.Rational(len(schedule.slices[node].features), schedule.axes.probe.shape(node)[-1])
        return part

    @cached_property
    def _port_of(self) -> dict[fx.Node, int]:
        return {node: i for i, port in enumerate(ports_of(self.block)) for node in port.region if not port.cross}

    def _allowed(self, node: fx.Node, rows: sympy.Expr | None) -> sympy.Expr:
        """The part of the pairs that the mask of a product's port allows; `rows` read each other and no other keys."""
        port = self._port_of.get(node) if self.masks else None
        if port is None:
            return sympy.S.One
        factors = self.masks[port].factors
        # What a window lets through of some rows depends on where they are: the same part as of all tokens, on average.
        among = self.length if rows is None or any(f.kind != "causal" for f in factors) else rows
        return pairs(factors, among) / among**2


def _kinds(axes: Axes, node: fx.Node) -> set[str]:
    """The kinds of the axes that a product runs over, those that it sums over included."""
    read = [dim for slot, source in operands(node) for dim in axes.read(node, slot, source)]
    label = axes.labels[node]
    return {*kinds_in(read), *kinds_in(label if isinstance(label, tuple) else ())}
