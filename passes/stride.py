"""stride: layers on every q-th token, whose news go to the tokens behind it (Sequence-AltUp, arXiv 2301.13310)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from depthc.ir.masks.documents import documents_of
from depthc.ir.masks.masks import masks_of
from depthc.ir.names import Names
from depthc.ir.params import Init, Param
from depthc.ir.program import Call, Merge, Op, Program, Segment, Select
from depthc.ir.types import Type
from depthc.passes.base import Pass, text_of
from depthc.passes.glue import wide
from depthc.passes.layers import layers_of, names_in, stack_of, with_stack
from depthc.passes.stride_glue import correct, is_anchor, predict
from depthc.passes.subsets import candidates_of, group_of, numbers_of, region_of, require_subsets, stream_of

SCALARS = {"a1": "ones", "a2": "zeros", "b": "ones"}


@dataclass(frozen=True)
class Stride(Pass):
    """Run the inner layers on anchors, every q-th token; the tokens between two anchors take over what is new.

    yhat_i = a1 x_i + a2 x_a; ytilde_a = Layer(x_a), with keys of anchors only, at their own positions;
    y_i = yhat_i + b (ytilde_a - yhat_a), a = q floor(i / q) being the anchor of token i. a1, a2 and b are scalars of
    every layer, 1, 0 and 1 at first; with q = 1 the program is then what it was. No anchor is behind its token, so a
    causal model stays causal. Token by token, no layer of these runs or keeps keys between two anchors.

    Tokens are counted without padding, whose state stays as it is.

    Loops that tie made are written out: every layer has scalars of its own.

    Options:
        every: q, from 1 on.
        layers: which layers, by number; all but the first and the last by default.
        compute_on: what a layer reads, an anchor as it was ("old") or as predicted ("predicted").
        per: "document", the count begins anew with every document that the masks keep apart, or "row".
        stack: name or number; the last one by default.

    Raises:
        RecipeError: there are no such layers, one of them mixes tokens other than by attention, the masks may hide
            documents, or an option is out of range.

    Example:
        >>> print(Stride(every=2))
        stride(every=2)
    """

    chooses: ClassVar[bool] = True

    every: int = 4
    layers: tuple[int, ...] | None = None
    compute_on: str = "old"
    per: str = "document"
    stack: int | str | None = None

    def __post_init__(self) -> None:
        self.require_whole("every", 1)
        self.require_one_of("compute_on", ("old", "predicted"))
        self.require_one_of("per", ("document", "row"))

    def apply(self, program: Program) -> Program:
        """The program with layers on every q-th token."""
        stack = stack_of(self, program, self.stack)
        ops, places = layers_of(self, stack)
        layers: list[Call] = [ops[i] for i in places]  # type: ignore[misc]
        numbers = self._numbers(len(layers))
        require_subsets(self, program, layers, numbers)
        plain, names = with_stack(program, stack, ops), Names(names_in(program))
        chosen = [layers[n] for n in numbers]
        build = _Layer(self, group_of(program, "stride"), names)
        anchors = build.anchors(plain, layers[0], chosen)
        streams = {number: stream_of(program, layers[number]) for number in numbers}
        for number, stream in reversed(streams.items()):
            ops[places[number] : places[number] + 1] = build.ops(number, layers[number], stream)
        ops[places[0] : places[0]] = anchors
        params = {name: p for number, stream in streams.items() for name, p in build.params(number, stream).items()}
        return replace(with_stack(program, stack, ops), params={**program.params, **params})

    def _numbers(self, count: int) -> list[int]:
        """The layers that run on anchors."""
        given = tuple(range(1, count - 1)) if self.layers is None else self.layers
        expected = f"numbers below {count}, at least one; by default all but the first and the last"
        return numbers_of(self, count, given, expected, f"layers={text_of(self.layers)}")


class _Layer:
    """Writes the ops of layers on anchors, which use the same names."""

    def __init__(self, one: Stride, group: str, names: Names) -> None:
        self.one, self.group, self.names = one, group, names
        self.chosen, self.y, self.predicted = map(names.new, ("anchors", "y", "predicted"))
        self.real = ""

    def anchors(self, program: Program, first: Call, layers: Sequence[Call]) -> list[Op]:
        """The set of anchors, found in front of all layers: it is the same for each of them."""
        one = self.one
        per = one.per if one.per == "row" or self._documents(program, layers) else "row"
        found = candidates_of(one, program, [first, *layers], self.names, per)
        self.real = found.real
        if len(found.ops) == 1 and found.document is None and found.ops[0].rule == "all":  # type: ignore[union-attr]
            return [*found.ops, Select(self.chosen, f"stride({one.every})", among=self.real)]
        score = self.names.new("is_anchor")
        reads = (self.real, *filter(None, (found.document,)))
        body = is_anchor(stream_of(program, first), one.every, found.document is not None)
        judged = Segment("is_anchor", body, reads, (score,))
        return [*found.ops, judged, Select(self.chosen, "threshold(0)", score, self.real)]

    def _documents(self, program: Program, layers: Sequence[Call]) -> bool:
        """Whether masks keep documents apart; refuses masks that may do so in a way that is not known."""
        if documents_of(program, layers):
            return True
        masks = [mask for call in layers for mask in masks_of(program)[call]]
        hidden = next((m for m in masks if any(f.kind in ("document", "tensor") and f.of for f in m.factors)), None)
        if hidden is not None:
            raise self.one.refuse(
                "an argument masks pairs of tokens, and may keep documents apart in which anchors have to begin anew",
                where=layers[0].layer,
                expected="a mask with an entry a token",
                found=str(hidden),
                remedy='use per="row" if no row holds several documents',
            )
        return False

    def ops(self, number: int, call: Call, stream: Type) -> Iterator[Op]:
        """Run on the anchors, then predict all tokens and correct them by what is new of their anchors."""
        h, at = call.reads[0], f"depth.{self.group}.{number}"
        if self.one.compute_on == "predicted":
            yield Segment("predict", predict(stream), (h,), (self.predicted,), (f"{at}.a1", f"{at}.a2"))
            call = replace(call, reads=(self.predicted, *call.reads[1:]))
        yield from region_of(call, stream, self.chosen, self.y, self.names)
        scalars = tuple(f"{at}.{name}" for name in SCALARS)
        yield Merge(call.writes[0], h, self.y, self.chosen, correct(stream), (h,), scalars, over=self.real)

    def params(self, number: int, stream: Type) -> dict[str, Param]:
        """a1, a2 and b of a layer."""
        type = Type(wide(stream.dtype), ())
        return {f"depth.{self.group}.{number}.{n}": Param(type, expr=Init(type, law)) for n, law in SCALARS.items()}
