"""widen: a state of several blocks, of which every layer computes one (AltUp, arXiv 2301.13310; Gemma 3n)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from depthc.ir.names import Names
from depthc.ir.params import Init, Param, drawn
from depthc.ir.program import Call, Op, Program, Segment
from depthc.ir.types import Type
from depthc.passes.base import Pass, text_of
from depthc.passes.ends import Ends
from depthc.passes.glue import wide
from depthc.passes.layers import layers_of, names_in, stack_of, streams_of, with_stack
from depthc.passes.subsets import group_of, stream_of
from depthc.passes.widen_ends import with_wide_ends
from depthc.passes.widen_glue import collapse, correct, predict, routed_correct, routed_predict, split


@dataclass(frozen=True)
class Widen(Pass):
    """Widen the stream to blocks of the model's width. A layer predicts all of them, computes one, and corrects all.

    xhat_i = sum_j P_ij x_j; y = Layer(x_a), or Layer(xhat_a); x_i = xhat_i + g_i (y - xhat_a), a being the layer's
    active block. Every block starts as the model's own state. P starts as the identity and g as ones: unless
    the blocks end as their sum, the widened model computes what the model does, until it is trained.

    Loops that tie made are written out: every layer has coefficients of its own. Staggered stacks have blocks of their
    own, and the memory of the next stack is what they end as.

    Options:
        blocks: M, from 2 on.
        active: the block that every layer computes; None: blocks in turn.
        compute_on: what a layer reads, the active block as it was ("old") or as predicted ("predicted", Gemma 3n).
        coefficients: "scalars", P and g themselves; "router", both from the token's state through a small router whose
            two products start at zero (Gemma 3n).
        reads: the block from which a router predicts; None: the active one (Gemma 3n).
        embedding: "replicated", the model's own for every block, and blocks end as their mean; "recycled", and they
            end as their sum (Recycled-AltUp); "wide", a table and a head of M times the width, [W ... W] and
            [W/M ... W/M] at first, found by structure. A head that is tied to the table is then the wide table / M.
        eps: of the router's norm.
        std, seed: of the router's first product, normal draws.
        stack: name or number; the last one by default.

    Raises:
        RecipeError: the layers do more than pass one stream on, an option is out of range, or the model's embedding
            and head cannot be made wide: there is no one table or head, the head is tied to a table in another form
            than x @ W.T, or the states before and behind the layers are read elsewhere too.

    Example:
        >>> print(Widen(blocks=2, embedding="recycled"))
        widen(embedding="recycled")
    """

    blocks: int = 2
    active: int | None = None
    compute_on: str = "old"
    coefficients: str = "scalars"
    reads: int | None = 0
    embedding: str = "replicated"
    eps: float = 1e-6
    std: float = 0.02
    seed: int = 0
    stack: int | str | None = None

    def __post_init__(self) -> None:
        self.require_whole("blocks", 2)
        self.require_one_of("compute_on", ("old", "predicted"))
        self.require_one_of("coefficients", ("scalars", "router"))
        self.require_one_of("embedding", ("replicated", "recycled", "wide"))
        self.require_weight("eps")
        self.require_weight("std")
        for option in ("active", "reads"):
            value = getattr(self, option)
            if value is not None and (type(value) is not int or not 0 <= value < self.blocks):
                raise self.refuse(
                    f"option {option!r}",
                    expected=f"a block, 0 to {self.blocks - 1}, or None",
                    found=text_of(value),
                    remedy=f"give {option}=0",
                )

    def apply(self, program: Program) -> Program:
        """The program with several blocks between the first and the last layer."""
        stack = stack_of(self, program, self.stack)
        ops, places = layers_of(self, stack)
        layers: list[Call] = [ops[at] for at in places]  # type: ignore[misc]
        remedy = "widen a model that does not return or skip to what its inner layers compute"
        runs = streams_of(self, program, ops, layers, remedy)
        if self.embedding == "wide" and len(runs) > 1:
            found, remedy = f"{len(runs)} staggered stacks", 'use embedding="replicated"'
            raise self.refuse("wide ends need one stream", expected="one stack", found=found, remedy=remedy)
        stream, group, names = stream_of(program, layers[0]), group_of(program, "widen"), Names(names_in(program))
        widened = [_Layer(self, stream, group, names) for _ in runs]
        done, number = list[Op](), 0
        for run, layer in zip(runs, widened, strict=True):
            done += self._around(layer, run, [op for n, call in enumerate(run, number) for op in layer.ops(n, call)])
            number += len(run)
        params = {name: p for n in range(len(layers)) for name, p in widened[0].params(n).items()}
        made = with_stack(program, stack, [*ops[: places[0]], *done, *ops[places[-1] + 1 :]])
        made = replace(made, params={**program.params, **params})
        if self.embedding != "wide":
            return made
        ends = Ends(self, program, stack, 'use embedding="replicated", or "recycled", which leave it as it is')
        first, last = layers[0].reads[0], layers[-1].writes[0]
        return with_wide_ends(ends, made, (first, last), widened[0].states, group)

    def _around(self, layer: _Layer, run: Sequence[Call], ops: Sequence[Op]) -> list[Op]:
        """Ops of widened layers between what makes the blocks of one state, and one state of the blocks."""
        if self.embedding == "wide":
            return list(ops)
        kind = "mean" if self.embedding == "replicated" else "sum"
        before = Segment("split", split(layer.stream, self.blocks), run[0].reads[:1], layer.states)
        after = Segment("collapse", collapse(layer.stream, self.blocks, kind), layer.states, run[-1].writes[:1])
        return [before, *ops, after]


class _Layer:
    """Writes the ops of widened layers, which use the same names.

    Attributes:
        states, predicted: the names of the blocks.
    """

    def __init__(self, one: Widen, stream: Type, group: str, names: Names) -> None:
        self.one, self.stream, self.group = one, stream, group
        self.states, self.predicted = (
            tuple(names.new(f"{wish}{i}") for i in range(one.blocks)) for wish in ("x", "predicted")
        )
        self.y = names.new("y")

    def ops(self, number: int, call: Call) -> Iterator[Op]:
        """Predict, compute, correct."""
        one, active = self.one, self._active(number)
        if one.coefficients == "router":
            read = active if one.reads is None else one.reads
            before = routed_predict(self.stream, one.blocks, read, one.eps)
            after = routed_correct(self.stream, one.blocks, active, one.eps)
        else:
            before, after = predict(self.stream, one.blocks), correct(self.stream, one.blocks, active)
        h = (self.states if one.compute_on == "old" else self.predicted)[active]
        yield Segment("predict", before, self.states, self.predicted, self._names(number, "predict"))
        yield replace(call, reads=(h, *call.reads[1:]), writes=(self.y, *call.writes[1:]))
        yield Segment("correct", after, (*self.predicted, self.y), self.states, self._names(number, "correct"))

    def params(self, number: int) -> dict[str, Param]:
        """The coefficients of a layer, or its router."""
        one, dtype, at = self.one, wide(self.stream.dtype), f"depth.{self.group}.{number}"
        count, width = one.blocks, self.stream.shape[2]
        laws: dict[str, tuple[Sequence[Any], str]] = {"predict": ((count, count), "eye"), "correct": ((count,), "ones")}
        if one.coefficients == "router":
            laws = {
                "norm": ((width,), "ones"),
                "predict": ((count**2, count), "zeros"),
                "correct": ((count, count), "zeros"),
            }
        types = {name: Type(dtype, tuple(shape)) for name, (shape, _) in laws.items()}
        made = {f"{at}.{name}": Param(type, expr=Init(type, laws[name][1])) for name, type in types.items()}
        if one.coefficients == "router":
            made |= drawn({f"{at}.mix": (count, width)}, dtype, one.std, one.seed + number)  # type: ignore[dict-item]
        return made

    def _active(self, number: int) -> int:
        return number % self.one.blocks if self.one.active is None else self.one.active

    def _names(self, number: int, last: str) -> tuple[str, ...]:
        """The parameters of a glue, in the order of its slots."""
        slots = ("norm", "mix", last) if self.one.coefficients == "router" else (last,)
        return tuple(f"depth.{self.group}.{number}.{slot}" for slot in slots)
