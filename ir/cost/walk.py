"""Walk: goes through a program as an evaluator does, with shapes for values, and counts what is run and kept."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import count

import sympy

from depthc.ir import sizes
from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.caches import bounds, cached_of
from depthc.ir.axes.ports import ports_of
from depthc.ir.body import Body
from depthc.ir.cost.applications import Application
from depthc.ir.cost.products import Shapes, products_of
from depthc.ir.cost.shapes import Shape, symbol
from depthc.ir.evaluate import indexed
from depthc.ir.masks.masks import masks_of
from depthc.ir.memo import once
from depthc.ir.plans import Kind, as_block, kinds_of
from depthc.ir.program import Block, Call, Kv, Loop, Merge, On, Op, Program, Segment, Select, Stack, Tap
from depthc.ir.regions import settled
from depthc.ir.selection import read_rule
from depthc.ir.types import Type


def walk_of(
    program: Program,
    masked: bool = True,
    selection: str = "training",
    symbolic: bool = False,
    kinds: Mapping[str, Kind] | None = None,
) -> Walk:
    """The walk through a whole program.

    Args:
        masked: whether attention counts the pairs that its mask allows; see `depthc.ir.cost.flops`.
        selection: whether sets are as large as the rules of "training" make them, or those of "inference".
        symbolic: whether capacities below 1 are symbols, whose values are in `capacities`.
        kinds: of the arguments, where what is kept token by token is wanted; see `depthc.ir.plans`.
    """
    inputs = {leaf.name: _shape(leaf.type) for leaf in program.signature.inputs if leaf.type is not None}
    own = {name: kinds[name] for leaf in program.signature.inputs if (name := leaf.name) in kinds} if kinds else {}
    walk = Walk(program, masked, inputs, selection, symbolic, own)
    for item in program.body:
        walk.ops(item.ops if isinstance(item, Stack) else (item,), {})
    return walk


def as_written(cost: sympy.Expr) -> sympy.Expr:
    """An expression in the symbols that people write: plain names, without assumptions."""
    return cost.xreplace({s: sympy.Symbol(s.name) for s in cost.free_symbols})


def _shape(type: Type) -> Shape:
    return tuple(map(_expression, type.shape))


def _expression(size: sizes.Size) -> sympy.Expr:
    if isinstance(size, int):
        return sympy.Integer(size)
    return sizes.evaluate(size, {name: symbol(name) for name in sizes.names(sizes.read(size))})  # type: ignore


@dataclass(frozen=True)
class _Set:
    """A token set: the rows that a region on it has for every row of the batch.

    Attributes:
        rows: how many they are.
        exact: whether the set has exactly so many members, whatever the data.
        share: the part of all tokens that it holds at most.
    """

    rows: sympy.Expr
    exact: bool = True
    share: float = 1.0


def _rational(share: float) -> sympy.Rational:
    """A share as the simple fraction that it is meant to be."""
    exact = Fraction(share)
    simple = exact.limit_denominator(1000)
    return sympy.Rational(simple if float(simple) == share else exact)


def _unused(name: str, taken: Container[str]) -> str:
    """The name, numbered if it is taken."""
    numbered = (f"{name}__{number}" for number in count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


@dataclass
class Walk:
    """What a program runs and keeps.

    Attributes:
        terms: the operations of every application of a body.
        kept: the bytes that attention keeps for later tokens, by slot or by place.
        kinds: of values, where the program is evaluated token by token; empty: nothing is kept.
        capacities: the values of the symbols that stand for capacities.
        unknown: for every symbol that stands for a number of rows that the data decide, what it is at most.
    """

    program: Program
    masked: bool
    shapes: dict[str, Shape]
    selection: str = "training"
    symbolic: bool = False
    kinds: dict[str, Kind] = field(default_factory=dict)
    terms: list[sympy.Expr] = field(default_factory=list)
    kept: dict[str, sympy.Expr] = field(default_factory=dict)
    capacities: dict[str, sympy.Rational] = field(default_factory=dict)
    unknown: dict[str, sympy.Expr] = field(default_factory=dict)
    sets: dict[str, _Set] = field(default_factory=dict)
    slots: dict[str, sympy.Expr] = field(default_factory=dict)  # how many keys each holds
    region: _Set | None = None

    def ops(self, ops: Sequence[Op], indices: Mapping[str, int]) -> None:
        """Go through ops in order under the given loop indices."""
        for op in ops:
            match op:
                case Segment():
                    self.terms.append(self._segment(op))
                case Call():
                    self.terms.append(self._call(op, indices))
                case Loop():
                    self._loop(op, indices)
                case Select():
                    self.sets[op.write] = self._select(op, indices)
                    self.shapes[op.write] = self._tokens(op)
                case On():
                    inner = {name: kind for name, kind in self.kinds.items() if name in op.reads}
                    replace(self, region=self.sets[op.tokens], kinds=inner).ops(op.body, indices)
                case Merge():
                    self.shapes[op.write] = self.shapes[op.read]
                    self._hold(op)
            if self.kinds and not isinstance(op, Loop | Tap):
                self.kinds.update(kinds_of(op, self.kinds))

    def _loop(self, op: Loop, indices: Mapping[str, int]) -> None:
        if isinstance(op.count, int):
            for index in range(op.count):
                self.ops(op.body, {**indices, op.index: index})
            return
        inner = replace(self, terms=[], kept={})
        inner.ops(op.body, {**indices, op.index: 0})
        times = _expression(op.count)
        self.terms.append(sympy.Add(*inner.terms) * times)
        self.kept[f"{len(self.kept)}"] = sympy.Add(*inner.kept.values()) * times

    def _segment(self, op: Segment) -> sympy.Expr:
        products, shapes = products_of(op.body)
        bound = self._bind(op.body, op.reads)
        self._write(op.body, op.writes, shapes, bound)
        if self.kinds and "rows" in kinds_of(op, self.kinds).values():
            self._keep(op, as_block(self.program, op, self.kinds), bound, (), {})
        return sympy.Add(*(p.flops for p in products)).subs(bound, simultaneous=True)

    def _bind(self, body: Body, reads: Sequence[str]) -> dict[sympy.Symbol, sympy.Expr]:
        """The size names of a body as they are here, from the shapes of what it reads."""
        bound: dict[sympy.Symbol, sympy.Expr] = {}
        for given, name in zip(body.inputs_of("value"), reads, strict=True):
            if isinstance(given.type, Type) and name in self.shapes:
                for size, actual in zip(given.type.shape, self.shapes[name], strict=True):
                    if isinstance(size, str) and size.isidentifier():
                        bound.setdefault(symbol(size), actual)
        return bound

    def _write(self, body: Body, writes: Sequence[str], shapes: Shapes, bound: dict) -> None:
        for node, name in zip(body.results, writes, strict=True):
            if isinstance(shapes.get(node), tuple):
                self.shapes[name] = tuple(size.subs(bound, simultaneous=True) for size in shapes[node])

    # token sets

    def _tokens(self, op: Select) -> Shape:
        """[batch, tokens]"""
        like = next(n for n in (op.score, op.among, op.of) if n in self.shapes)
        return self.shapes[like][:2]

    def _select(self, op: Select, indices: Mapping[str, int]) -> _Set:
        """As many as the rule chooses; see `depthc.ir.selection` and `TokenSet.width`."""
        everyone = self._tokens(op)[1]
        among = self.sets[op.among] if op.among else _Set(everyone)
        of = self.sets[op.of] if op.of else among
        text = op.inference if op.inference and self.selection == "inference" else op.rule
        rule, number = read_rule(text, indices)
        if rule == "all" or (rule == "threshold" and number == -float("inf")):
            return among
        name = "_".join([op.write, *map(str, indices.values())])
        if rule == "stride":
            return _Set(sympy.ceiling(everyone / int(number)), among.exact, 1 / number)
        if rule != "topk" or op.within is not None:
            name = _unused(name, self.unknown)
            self.unknown[name] = among.rows
            return _Set(symbol(name), exact=False)
        share = min(among.share, of.share * number)
        if not (of.exact and among.exact):
            return _Set(self._part(everyone, number, name), exact=False, share=share)
        wanted = self._part(of.rows, number, name)
        return _Set(wanted if of.share * number <= among.share else sympy.Min(wanted, among.rows), share=share)

    def _part(self, count: sympy.Expr, share: float, name: str) -> sympy.Expr:
        """`max(1, int(share * count))`."""
        if share == 1:
            return count
        part = _rational(share)
        if self.symbolic:
            name = f"c_{name}"
            name = name if self.capacities.get(name, part) == part else _unused(name, self.capacities)
            self.capacities[name] = part
            part = sympy.Symbol(name, positive=True)
        return sympy.Max(1, sympy.floor(part * count))

    # applications of blocks

    def _call(self, op: Call, indices: Mapping[str, int]) -> sympy.Expr:
        block = self.program.blocks[op.block]
        products, shapes = once(block, "products", lambda: products_of(block.body))
        bound = self._bind(block.body, op.reads)
        here = [replace(p, flops=p.flops.subs(bound, simultaneous=True)) for p in products]
        masks = masks_of(self.program)[op] if self.masked else ()
        application = Application(block, here, masks, self.shapes[op.reads[0]])
        self._write(block.body, op.writes, shapes, bound)
        if self.kinds and any(self.kinds[name] != "fixed" for name in op.reads):
            self._keep(op, block, bound, op.kv, indices)
        return application.whole() if self.region is None and not op.kv else self._planned(op, application, indices)

    def _keep(
        self,
        op: Segment | Call,
        block: Block,
        bound: Mapping[sympy.Symbol, sympy.Expr],
        plans: Sequence[Kv],
        indices: Mapping[str, int],
    ) -> None:
        """What the ports of an application keep; see `depthc.ir.steps`."""
        ports = ports_of(block)
        slot = f"{block.name}/{indexed(plans[0].slot, indices)}" if plans and plans[0].slot else ""
        overlays = any(plan.mode == "overlay" for plan in plans)  # a slot with other rows laid over it is kept whole
        if not ports or (slot in self.kept and not overlays):
            return
        axes, (_, shapes) = analyse(block), once(block, "products", lambda: products_of(block.body))
        carry = tuple(size.subs(bound, simultaneous=True) for size in shapes[block.body.placeholders_of("value")[0]])
        length = carry[axes.labels[block.body.placeholders_of("value")[0]].index((axes.token,))]
        total = sympy.S.Zero
        whole = self.region is None and not plans and isinstance(op, Call)
        reaches = [mask.reach for mask in masks_of(self.program)[op]] if whole else [None] * len(ports)  # type: ignore
        for port, own, most in zip(ports, cached_of(block), bounds(block, reaches), strict=True):
            rows = length if port.cross or self.region is None or overlays else self.region.rows
            rows = rows if most is None else sympy.Min(length, most)
            for cached in own:
                size = axes.probe.values[cached.node].dtype.itemsize
                total += size * sympy.Mul(*shapes[cached.node]).subs(bound, simultaneous=True) * rows / length
        name = slot if slot and slot not in self.kept else f"{len(self.kept)}"
        self.kept[name] = total

    def _hold(self, op: Merge) -> None:
        """What a merge over another set keeps: rows of the last token of its own set; see `depthc.ir.steps`."""
        if op.over is None or not self.kinds or kinds_of(op, self.kinds)[op.write] != "rows":
            return
        like = op.combine or next(iter(self.program.blocks.values())).body
        types = like.inputs_of("value")[1 : 2 + len(op.extra)] if op.combine else like.inputs_of("value")[:1]
        size = sum(i.type.dtype.itemsize for i in types if isinstance(i.type, Type))
        batch, _, *rest = self.shapes[op.read]
        self.kept[f"{len(self.kept)}"] = size * sympy.Mul(batch, *rest)

    def _planned(self, op: Call, application: Application, indices: Mapping[str, int]) -> sympy.Expr:
        """On rows, or with keys by plan; see `depthc.ir.regions.run_planned`."""
        rows = self.region.rows if self.region else application.length
        ports = len(ports_of(application.block))
        names = [indexed(plan.slot, indices) for plan in op.kv] or [""] * ports
        plans = [settled(p, n in self.slots) for p, n in zip(op.kv or (Kv(),) * ports, names, strict=True)]
        keys = [self.slots[n] if p.mode in ("read", "update") else rows for p, n in zip(plans, names, strict=True)]
        self.slots.update((n, rows) for p, n in zip(plans, names, strict=True) if p.mode == "store")
        return application.on_rows(plans, rows, keys)
