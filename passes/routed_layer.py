"""The ops of a layer that chooses its tokens (recipes: section 4, Mixture-of-Depths)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from depthc.ir.body import Body
from depthc.ir.names import Names
from depthc.ir.params import Init, Param, steps_taken
from depthc.ir.program import Call, Op, Segment, Select, Tap
from depthc.ir.types import Type
from depthc.passes.glue import Glue, aten, wide
from depthc.passes.routing_glue import combine, membership_loss, router, z_loss
from depthc.passes.subsets import Candidates, on_chosen

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
        self.chosen, self.y, self.logit, self.loss = map(names.new, ("chosen", "y", "logit", "loss"))
        self.judge = names.new("judge") if mod.predictor else self.logit

    def ops(self, number: int, call: Call, stream: Type) -> Iterator[Op]:
        """Score, select, run on the chosen tokens, merge, and say how well the choice was foretold."""
        at, x = f"{self.group}.{number}", call.reads[:1]
        yield Segment("router", router(stream, "linear", 1.0), x, (self.logit,), (f"depth.{at}.router.weight",))
        if self.mod.predictor:
            weights = tuple(f"depth.{at}.predictor.{name}.weight" for name in ("up", "down"))
            yield Segment("predictor", predictor(stream), x, (self.judge,), weights, precise=True)
        yield self._select()
        body = combine("delta" if self.mod.f == "difference" else "weighted", stream, "none", 1.0)
        yield from on_chosen(call, stream, self.chosen, self.y, self.names, body, (self.logit,))
        tapped = {"logit": self.judge, "candidates": self.candidates.real, "chosen": self.chosen}
        yield from (Tap(f"route.{at}.{what}", value) for what, value in tapped.items())
        yield from self._losses(at, stream)

    def _select(self) -> Select:
        """The best in training; in inference those above zero, as the router or the predictor says."""
        real, capacity = self.candidates.real, self.mod.capacity
        rule = f"topk({capacity}{f', warmup={self.mod.warmup}' if self.mod.warmup else ''})"
        later = "all" if capacity == 1 else "threshold(0.0)"
        judge = self.judge if self.mod.predictor else None
        return Select(self.chosen, rule, self.logit, real, real, later, judge, self.candidates.document)

    def _losses(self, at: str, stream: Type) -> Iterator[Op]:
        """Of what decides in inference: the predictor alone where there is one."""
        name, weight = ("predictor", 1.0) if self.mod.predictor else ("router", 0.001)
        weight = weight if self.mod.loss is None else self.mod.loss
        real = self.candidates.real
        losses = [
            (name, "membership_loss", membership_loss, weight, (self.judge, self.chosen, real)),
            ("z", "z_loss", z_loss, self.mod.z_loss, (self.logit, real)),
        ]
        for name, function, body, weight, reads in losses:
            if weight:
                yield Segment(function, body(stream, weight), reads, (self.loss,))
                yield Tap(f"loss.{at}.{name}", self.loss)

    def params(self, number: int, stream: Type) -> dict[str, Param]:
        """The router, the predictor, and the steps of the warm-up."""
        law = f"normal({self.mod.std})" if self.mod.std else "zeros"
        width: int = stream.shape[2]  # type: ignore[assignment]
        shapes: dict[str, tuple[int, ...]] = {"router": (width,)}
        if self.mod.predictor:
            shapes |= {"predictor.up": (hidden(width), width), "predictor.down": (hidden(width),)}
        made = steps_taken() if self.mod.warmup else {}
        for seed, (name, shape) in enumerate(shapes.items(), self.mod.seed + number * len(shapes)):
            type = Type(wide(stream.dtype), shape)
            made[f"depth.{self.group}.{number}.{name}.weight"] = Param(type, expr=Init(type, law, seed))
        return made


def hidden(width: int) -> int:
    """The hidden width of a predictor."""
    return max(1, width // 4)


def predictor(stream: Type) -> Body:
    """logit = w . gelu(W sg(x)): [batch, tokens], with an exact GELU; sg stops gradients."""
    g, dtype, width = Glue(), wide(stream.dtype), stream.shape[2]
    h = g.value("h", stream)
    up = g.param("up", Type(dtype, (hidden(width), width)))  # type: ignore[arg-type]
    down = g.param("down", Type(dtype, (hidden(width),)))  # type: ignore[arg-type]
    x = g.op(aten.to.dtype, g.op(aten.detach.default, h), dtype)  # autocast may have made it another than its type's
    x = g.op(aten.gelu.default, g.op(aten.linear.default, x, up))
    return g.body(g.op(aten.sum.dim_IntList, g.op(aten.mul.Tensor, x, down), [-1]))
