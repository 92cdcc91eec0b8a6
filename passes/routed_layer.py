"""The ops of a layer that chooses its tokens (recipes: section 4, Mixture-of-Depths)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from depthc.ir.names import Names
from depthc.ir.params import Param, drawn, steps_taken
from depthc.ir.program import Call, Op, Segment, Select
from depthc.ir.types import Type
from depthc.passes.glue import wide
from depthc.passes.routing_glue import combine, membership_loss, router, router_shapes, z_loss
from depthc.passes.subsets import Candidates, on_chosen
from depthc.passes.taps import loss_taps, route_taps

if TYPE_CHECKING:
    from depthc.passes.mod import Mod


class RoutedLayer:
    """Writes the ops of routed layers, which use the same names.

    Args:
        mod: the pass, with its options.
        group: what parameters and taps are named after.
        candidates: what every layer chooses among.
        names: makes new names.
    """

    def __init__(self, mod: Mod, group: str, candidates: Candidates, names: Names) -> None:
        self.mod, self.group, self.candidates, self.names = mod, group, candidates, names
        self.chosen, self.y, self.logit = map(names.new, ("chosen", "y", "logit"))
        self.judge = names.new("judge") if mod.predictor else self.logit

    def ops(self, number: int, call: Call, stream: Type) -> Iterator[Op]:
        """Score, select, run on the chosen tokens, merge, and say how well the choice was foretold."""
        at, mod, real = f"{self.group}.{number}", self.mod, self.candidates.real
        yield self._router("router", "linear", at, call, stream, self.logit)
        if mod.predictor:
            yield self._router("predictor", "predictor", at, call, stream, self.judge)
        yield self._select()
        body = combine("delta" if mod.f == "difference" else "weighted", stream, "none", 1.0)
        yield from on_chosen(call, stream, self.chosen, self.y, self.names, body, (self.logit,))
        yield from route_taps(at, real, self.chosen, self.judge)
        name, weight = ("predictor", 1.0) if mod.predictor else ("router", 0.001)
        if weight := weight if mod.loss is None else mod.loss:
            reads = (self.judge, self.chosen, real)  # of what decides in inference
            yield from loss_taps(at, name, membership_loss(stream, weight), reads, self.names)
        if mod.z_loss:
            yield from loss_taps(at, "z", z_loss(stream, mod.z_loss), (self.logit, real), self.names)

    def _router(self, name: str, kind: str, at: str, call: Call, stream: Type, write: str) -> Segment:
        weights = tuple(f"depth.{at}.{name}.{slot}" for slot in router_shapes(kind, stream))
        body = router(stream, kind, apart=name == "predictor")
        return Segment(name, body, call.reads[:1], (write,), weights, precise=True)

    def _select(self) -> Select:
        """The best in training; in inference those above zero, as the router or the predictor says."""
        real, capacity = self.candidates.real, self.mod.capacity
        rule = f"topk({capacity}{f', warmup={self.mod.warmup}' if self.mod.warmup else ''})"
        later = "all" if capacity == 1 else "threshold(0.0)"
        judge = self.judge if self.mod.predictor else None
        return Select(self.chosen, rule, self.logit, real, real, later, judge, self.candidates.document)

    def params(self, number: int, stream: Type) -> dict[str, Param]:
        """The router, the predictor, and the steps of the warm-up."""
        kinds = {"router": "linear"} | ({"predictor": "predictor"} if self.mod.predictor else {})
        shapes = {
            f"depth.{self.group}.{number}.{name}.{slot}": shape
            for name, kind in kinds.items()
            for slot, shape in router_shapes(kind, stream).items()
        }
        made = drawn(shapes, wide(stream.dtype), self.mod.std, self.mod.seed + number * len(shapes))
        return made | (steps_taken() if self.mod.warmup else {})
