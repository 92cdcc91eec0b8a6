"""Which segments are linear routers: by what they compute, op for op, not by who made them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from depthc.ir.body import Body
from depthc.ir.program import Segment
from depthc.ir.types import Type
from depthc.passes.routing_glue import router


class Options(NamedTuple):
    """How a router reads its stream.

    Attributes:
        apart: its gradient does not go into the stream.
    """

    apart: bool


def options_of(op: Segment) -> Options | None:
    """The options under which the op computes what a segment does; None if there are none."""
    return _found(op.body) if len(op.reads) == len(op.params) == len(op.writes) == 1 else None


@lru_cache(maxsize=256)
def _found(body: Body) -> Options | None:
    stream = body.inputs_of("value")[0].type
    if not isinstance(stream, Type) or len(stream.shape) != 3:
        return None
    known = {router(stream, "linear", apart=apart): Options(apart) for apart in (False, True)}
    return next((options for made, options in known.items() if made == body), None)
