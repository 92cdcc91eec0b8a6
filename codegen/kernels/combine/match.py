"""Which combine a program asks for: the body of a merge as options of the op."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import NamedTuple

from torch import fx

from depthc.ir.body import Body
from depthc.ir.program import Merge
from depthc.ir.types import Type
from depthc.passes.routing_glue import COMBINES, GATES
from depthc.passes.routing_glue import combine as body_of


class Options(NamedTuple):
    """The options of `depthc.codegen.kernels.combine.combine`."""

    kind: str
    gate: str = "none"
    alpha: float = 1.0

    def __str__(self) -> str:
        gated = self.kind in ("weighted", "delta")
        return f"{self.kind}, {self.alpha:g} {self.gate}" if gated and self.gate != "none" else self.kind


OFF = Options("off")


def options_of(op: Merge) -> Options | None:
    """The options under which the op computes what a merge does; None if there are none.

    A body is recognized by what it computes, op for op, not by who made it.

    Example:
        >>> from depthc.ir.program import Merge
        >>> options_of(Merge("h", "h", "y", "chosen"))
        Options(kind='off', gate='none', alpha=1.0)
    """
    if op.params or op.over is not None:
        return None
    if op.combine is None:
        return OFF
    return _found(op.combine)


@lru_cache(maxsize=256)
def _found(body: Body) -> Options | None:
    rows = body.inputs_of("value")[0].type
    if not isinstance(rows, Type) or len(rows.shape) != 3:
        return None
    stream = Type(rows.dtype, (rows.shape[0], "s", rows.shape[2]))
    for kind, gate, alpha in product(COMBINES, GATES, _numbers(body.graph)):
        made = body_of(kind, stream, gate, alpha)
        if made is not None and made == body:
            return Options(kind, gate, alpha)
    return None


def _numbers(graph: fx.Graph) -> list[float]:
    """The numbers that an op of the graph is given; 1 if there are none."""
    found = [arg for node in graph.nodes for arg in node.args]
    return [arg for arg in found if isinstance(arg, int | float) and not isinstance(arg, bool)] or [1.0]
