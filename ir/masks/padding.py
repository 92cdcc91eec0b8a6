"""Padding: which arguments say what tokens of a stack are real."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from depthc.ir.axes.ports import ports_of
from depthc.ir.errors import RecipeError
from depthc.ir.masks.attend import Attention
from depthc.ir.masks.cones import sites_of
from depthc.ir.masks.masks import Classifier, masks_of
from depthc.ir.program import Call, Program
from depthc.ir.types import Type


@dataclass(frozen=True)
class Padding:
    """An argument with an entry a token; `on` says whether real tokens are those above zero, or those at zero."""

    argument: str
    type: Type
    on: bool


def padding_of(program: Program, calls: Sequence[Call]) -> tuple[Padding, ...]:
    """The arguments that switch keys of the self-attentions of these calls off.

    Raises:
        RecipeError: one of them has not an entry a token.
    """
    found = dict.fromkeys(p for call in dict.fromkeys(calls) for p in _paddings(program, call))
    return tuple(found)


def _paddings(program: Program, call: Call) -> Iterator[Padding]:
    block = program.blocks[call.block]
    for index, port in enumerate(ports_of(block)):
        factors = () if port.cross else masks_of(program)[call][index].factors
        for name in (name for f in factors if f.kind == "keys" for name in f.of):
            site = next(s for s in sites_of(program) if s.op == call)
            classifier = Classifier(Attention(program, site, port))
            type = classifier.types[name]
            if len(type.shape) != 2 or len(classifier.along(name)) != 1:
                raise RecipeError(
                    f"the padding is given by {name!r}, which has not an entry a token",
                    where=call.layer,
                    expected="a mask [batch, tokens]",
                    found=str(type),
                    remedy="capture the model with such a mask, or without padding",
                )
            yield Padding(name, type, classifier.permissive()[name] != "zeros")
