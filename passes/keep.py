"""keep: each layer runs on a given share of the tokens, by a score that nothing trains (keep schedules, Simba-like)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from depthc.ir.body import Body
from depthc.ir.names import Names, closest
from depthc.ir.program import Call, Op, Program, Segment, Select, Tap
from depthc.ir.types import Type
from depthc.passes.base import Pass, text_of
from depthc.passes.glue import Glue, aten, wide
from depthc.passes.layers import layers_of, names_in, stack_of, with_stack
from depthc.passes.subsets import Candidates, candidates_of, group_of, is_share, on_chosen, require_subsets, stream_of


@dataclass(frozen=True)
class Keep(Pass):
    """Run each layer on the best share of a row's real tokens; the others keep their state. Nothing is trained.

    A layer of capacity 1 stays as it is. Which tokens are the best is a comparison with later ones, so such a model
    cannot be evaluated token by token: `start` and `generate` refuse it, unless a `threshold` decides outside of
    training, for every token by itself.

    Loops that tie made are written out first.

    Options:
        capacities: one a layer, in (0, 1].
        score: "norm", that of a token's hidden state; "last", later tokens are better; or the name of an argument of
            the model that has a number a token.
        nested: whether a token that a layer left out stays out of all later ones; capacities must not increase then.
        per: "row", or "document": what a capacity is a share of, and tokens are compared within.
        threshold: outside of training, tokens whose score is above it are chosen. Not for the score "last".
        stack: name or number; the last one by default.

    Raises:
        RecipeError: capacities do not fit, there is no such score, or a layer mixes tokens other than by attention.

    Example:
        >>> print(Keep(capacities=(1.0, 0.5, 0.25)))
        keep(capacities=(1.0, 0.5, 0.25))
    """

    chooses: ClassVar[bool] = True

    capacities: tuple[float, ...]
    score: str = "norm"
    nested: bool = False
    per: str = "row"
    threshold: float | None = None
    stack: int | str | None = None

    def __post_init__(self) -> None:
        self.require_one_of("nested", (False, True))
        self.require_one_of("per", ("row", "document"))
        given = self.capacities
        fits = isinstance(given, tuple) and bool(given) and all(map(is_share, given))
        if not fits or (self.nested and any(b > a for a, b in pairwise(given))):
            raise self.refuse(
                "these are no capacities",
                expected="a share of the tokens for every layer, in (0, 1]"
                + ", none above the one before" * self.nested,
                found=f"capacities={given}",
                remedy="give for example capacities=(1.0, 0.5, 0.25)",
            )
        least = self.threshold
        if isinstance(least, bool) or not isinstance(least, float | int | None) or least != least:
            expected, remedy = "a number, or None", "give for example threshold=1.0"
            raise self.refuse("option 'threshold'", expected=expected, found=text_of(self.threshold), remedy=remedy)
        if self.threshold is not None and self.score == "last":
            raise self.refuse(
                "a threshold says nothing about which tokens are the last",
                expected="another score",
                found=f'score="last", threshold={self.threshold}',
                remedy='use score="norm"',
            )

    def apply(self, program: Program) -> Program:
        """The program with layers on some of their tokens."""
        stack = stack_of(self, program, self.stack)
        ops, places = layers_of(self, stack)
        layers: list[Call] = [ops[i] for i in places]  # type: ignore[misc]
        if len(layers) != len(self.capacities):
            expected, remedy = f"{len(layers)} capacities", "give one capacity a layer"
            found = str(self.capacities)
            raise self.refuse("capacities do not fit the stack", expected=expected, found=found, remedy=remedy)
        numbers = [n for n, capacity in enumerate(self.capacities) if capacity < 1]
        if not numbers:
            return program
        require_subsets(self, program, layers, numbers)
        names, plain = Names(names_in(program)), with_stack(program, stack, ops)
        candidates = candidates_of(self, plain, [layers[n] for n in numbers], names, self.per)
        build = _Layer(self, program, group_of(program, "keep"), candidates, names)
        for number in reversed(numbers):
            at, begins = places[number], number == numbers[0]
            among = candidates.real if begins or not self.nested else build.chosen
            ops[at : at + 1] = [*(candidates.ops if begins else ()), *build.ops(number, layers[number], among)]
        return with_stack(program, stack, ops)


class _Layer:
    """Writes the ops of a layer on some of its tokens."""

    def __init__(self, one: Keep, program: Program, group: str, candidates: Candidates, names: Names) -> None:
        self.one, self.program, self.group, self.candidates, self.names = one, program, group, candidates, names
        self.chosen, self.y, self.score = map(names.new, ("chosen", "y", "score"))

    def ops(self, number: int, call: Call, among: str) -> Iterator[Op]:
        """Score, select, run on the chosen tokens, merge, and expose the choice."""
        one, stream, at = self.one, stream_of(self.program, call), f"{self.group}.{number}"
        read, body = self._score(call, stream)
        later = None if one.threshold is None else f"threshold({float(one.threshold)})"
        yield Segment("score", body, (read,), (self.score,))
        yield Tap(f"route.{at}.candidates", among)
        rule, of, within = f"topk({one.capacities[number]})", self.candidates.real, self.candidates.document
        yield Select(self.chosen, rule, self.score, among, of, later, within=within)
        yield from on_chosen(call, stream, self.chosen, self.y, self.names)
        yield Tap(f"route.{at}.chosen", self.chosen)
        yield Tap(f"score.{at}", self.score)

    def _score(self, call: Call, stream: Type) -> tuple[str, Body]:
        """What a score reads, and how it is computed: [batch, tokens]."""
        if self.one.score in SCORES:
            return call.reads[0], SCORES[self.one.score](stream)
        types = {leaf.name: leaf.type for leaf in self.program.signature.inputs if leaf.type is not None}
        type = types.get(self.one.score)
        if type is None or len(type.shape) != 2:
            known = [*SCORES, *(name for name, other in types.items() if len(other.shape) == 2)]
            raise self.one.refuse(
                "there is no such score",
                expected="one of " + ", ".join(known),
                found=f"{self.one.score}{'' if type is None else f': {type}'}",
                remedy=f"use {closest(self.one.score, known)!r}",
            )
        g = Glue()
        return self.one.score, g.body(g.cast(g.value("argument", type), type.dtype, wide(stream.dtype)))


def norm(stream: Type) -> Body:
    """The Euclidean norm of every token's hidden state."""
    g, dtype = Glue(), wide(stream.dtype)
    x = g.cast(g.value("h", stream), stream.dtype, dtype)
    return g.body(g.op(aten.linalg_vector_norm.default, x, 2, [-1]))


def last(stream: Type) -> Body:
    """The number of a token in its row, from 1."""
    g, dtype = Glue(), wide(stream.dtype)
    x = g.cast(g.value("h", stream), stream.dtype, dtype)
    ones = g.op(aten.ones_like.default, g.op(aten.select.int, x, -1, 0))
    return g.body(g.op(aten.cumsum.default, ones, 1))


SCORES = {"norm": norm, "last": last}
"""Scores by name: bodies from the hidden states to a number a token."""
