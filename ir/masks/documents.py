"""Documents: which argument says where one document of a packed row ends and the next one begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from depthc.ir.axes.ports import ports_of
from depthc.ir.masks.masks import masks_of
from depthc.ir.program import Call, Program
from depthc.ir.types import Type


@dataclass(frozen=True)
class Documents:
    """An argument with an entry a token; `counting` says whether it counts up within a document, or is its id."""

    argument: str
    type: Type
    counting: bool


def documents_of(program: Program, calls: Sequence[Call]) -> tuple[Documents, ...]:
    """The arguments [batch, tokens] that divide rows into documents for the self-attentions of these calls."""
    types = {leaf.name: leaf.type for leaf in program.signature.inputs}
    found: dict[Documents, None] = {}
    for call in dict.fromkeys(calls):
        for port, mask in zip(ports_of(program.blocks[call.block]), masks_of(program)[call], strict=True):
            for factor in () if port.cross else mask.factors:
                type = types.get(factor.of[0]) if factor.kind == "document" else None
                if type is not None and len(type.shape) == 2:
                    found[Documents(factor.of[0], type, factor.counting)] = None
    return tuple(found)
