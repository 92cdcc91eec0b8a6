"""FLOPs: the floating-point operations of a program's forward, as a closed form in its sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import sympy

from depthc.ir import sizes
from depthc.ir.axes.ports import ports_of
from depthc.ir.body import Body
from depthc.ir.cost.applications import Application
from depthc.ir.cost.products import Shapes, products_of
from depthc.ir.cost.shapes import Shape, symbol
from depthc.ir.evaluate import indexed
from depthc.ir.masks.masks import masks_of
from depthc.ir.memo import once
from depthc.ir.program import Call, Kv, Loop, Merge, On, Op, Program, Segment, Select, Stack
from depthc.ir.regions import settled
from depthc.ir.selection import read_rule
from depthc.ir.types import Type


def flops(program: Program, *, masked: bool = True) -> sympy.Expr:
    """The operations of one forward: those of its products, over the size names of its inputs.

    A routed region counts for the rows that run, as many as the training rule of its `select` chooses; a set whose
    size only the data decide is a symbol of its own in every iteration ("active_0"). A training step takes three times
    as many, since backward has two products for each.

    Args:
        masked: whether attention counts the pairs of tokens that its mask allows, as kernels compute them (causal:
            half of all); if not, it counts all pairs. Padding and documents take nothing away. The rows of a region
            are taken to be spread evenly where a window, or keys of all tokens, makes it matter.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> cost = flops(depthc.capture(model, (torch.ones(2, 5, 4),)))
        >>> cost, cost.subs({"b": 2, "s": 5})
        (96*b*s, 960)
    """
    inputs = {leaf.name: _shape(leaf.type) for leaf in program.signature.inputs if leaf.type is not None}
    walk = _Walk(program, masked, shapes=inputs)
    for item in program.body:
        walk.ops(item.ops if isinstance(item, Stack) else (item,), {})
    total = sympy.Add(*walk.terms)
    return total.xreplace({s: sympy.Symbol(s.name) for s in total.free_symbols})  # as people write them


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


def _part(count: sympy.Expr, share: float) -> sympy.Expr:
    """`max(1, int(share * count))`, the share as the simple fraction that it is meant to be."""
    if share == 1:
        return count
    exact = Fraction(share)
    simple = exact.limit_denominator(1000)
    return sympy.Max(1, sympy.floor(sympy.Rational(simple if float(simple) == share else exact) * count))


@dataclass
class _Walk:
    """Goes through ops as an evaluator does, with the shapes of values in place of the values."""

    program: Program
    masked: bool
    shapes: dict[str, Shape]
    terms: list[sympy.Expr] = field(default_factory=list)
    sets: dict[str, _Set] = field(default_factory=dict)
    slots: dict[str, sympy.Expr] = field(default_factory=dict)  # how many keys each holds
    region: _Set | None = None

    def ops(self, ops: Sequence[Op], indices: Mapping[str, int]) -> None:
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
                    replace(self, region=self.sets[op.tokens]).ops(op.body, indices)
                case Merge():
                    self.shapes[op.write] = self.shapes[op.read]

    def _loop(self, op: Loop, indices: Mapping[str, int]) -> None:
        if isinstance(op.count, int):
            for index in range(op.count):
                self.ops(op.body, {**indices, op.index: index})
            return
        inner = replace(self, terms=[])
        inner.ops(op.body, {**indices, op.index: 0})
        self.terms.append(sympy.Add(*inner.terms) * _expression(op.count))

    def _segment(self, op: Segment) -> sympy.Expr:
        products, shapes = products_of(op.body)
        bound = self._bind(op.body, op.reads)
        self._write(op.body, op.writes, shapes, bound)
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
        """As many as the training rule chooses; see `depthc.ir.selection` and `TokenSet.width`."""
        everyone = self._tokens(op)[1]
        among = self.sets[op.among] if op.among else _Set(everyone)
        of = self.sets[op.of] if op.of else among
        rule, number = read_rule(op.rule, indices)
        if rule == "all" or (rule == "threshold" and number == -float("inf")):
            return among
        if rule == "stride":
            return _Set(sympy.ceiling(everyone / int(number)), among.exact, 1 / number)
        if rule != "topk" or op.within is not None:
            return _Set(symbol("_".join([op.write, *map(str, indices.values())])), exact=False)
        share = min(among.share, of.share * number)
        if not (of.exact and among.exact):
            return _Set(_part(everyone, number), exact=False, share=share)
        wanted = _part(of.rows, number)
        return _Set(wanted if of.share * number <= among.share else sympy.Min(wanted, among.rows), share=share)

    # applications of blocks

    def _call(self, op: Call, indices: Mapping[str, int]) -> sympy.Expr:
        block = self.program.blocks[op.block]
        products, shapes = once(block, "products", lambda: products_of(block.body))
        bound = self._bind(block.body, op.reads)
        here = [replace(p, flops=p.flops.subs(bound, simultaneous=True)) for p in products]
        masks = masks_of(self.program)[op] if self.masked else ()
        application = Application(block, here, masks, self.shapes[op.reads[0]])
        self._write(block.body, op.writes, shapes, bound)
        return application.whole() if self.region is None and not op.kv else self._planned(op, application, indices)

    def _planned(self, op: Call, application: Application, indices: Mapping[str, int]) -> sympy.Expr:
        """On rows, or with keys by plan; see `depthc.ir.regions.run_planned`."""
        rows = self.region.rows if self.region else application.length
        ports = len(ports_of(application.block))
        names = [indexed(plan.slot, indices) for plan in op.kv] or [""] * ports
        plans = [settled(p, n in self.slots) for p, n in zip(op.kv or (Kv(),) * ports, names, strict=True)]
        keys = [self.slots[n] if p.mode in ("read", "update") else rows for p, n in zip(plans, names, strict=True)]
        self.slots.update((n, rows) for p, n in zip(plans, names, strict=True) if p.mode == "store")
        return application.on_rows(plans, rows, keys)
