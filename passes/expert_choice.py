"""The ops of a loop in which every recursion chooses its tokens (recipes: section 4, expert choice)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from depthc.ir.names import Names
from depthc.ir.params import Init, Param, steps_taken
from depthc.ir.program import Loop, Merge, Op, Segment, Select, Tap
from depthc.ir.types import Type
from depthc.passes.glue import wide
from depthc.passes.recursion import Recursion
from depthc.passes.routing_glue import combine, membership_loss, router, router_shapes, z_loss
from depthc.passes.subsets import Candidates

if TYPE_CHECKING:
    from depthc.passes.route import Route


@dataclass(frozen=True)
class ExpertChoice:
    """Writes the ops of a routed loop.

    Attributes:
        route: the pass, with its options.
        recursion: the loop as it is.
        candidates: the real tokens, which all sets are subsets of.
        names: makes new names.
    """

    route: Route
    recursion: Recursion
    capacities: tuple[float, ...]
    candidates: Candidates
    names: Names

    @cached_property
    def _made(self) -> dict[str, str]:
        return {n: self.names.new(n) for n in ("active", "chosen", "y", "logit", "judge")}

    @property
    def _index(self) -> str:
        return self.recursion.loop.index

    @property
    def _stream(self) -> Type:
        return self.recursion.stream

    def ops(self) -> list[Op]:
        """All real tokens are candidates of the first recursion; then the loop."""
        return [Select(self._made["active"], "all", among=self.candidates.real), self._loop()]

    def _loop(self) -> Loop:
        """One recursion: select, run on the chosen tokens, merge, and say how well the router foretold it."""
        made, h = self._made, self.recursion.h
        body = combine(self.route.combine, self._stream, self.route.gate, self.route.alpha)
        scored = body is not None and len(body.inputs_of("value")) == 3
        ops: list[Op] = [
            self._router("router", made["logit"]),
            *([self._router("judge", made["judge"], apart=True)] if self.route.auxiliary else []),
            self._select(),
            self.recursion.on(made["chosen"], made["y"]),
            Merge(h, h, made["y"], made["chosen"], body, (made["logit"],) if scored else ()),
            *self._taps(f"{self._index}.{{{self._index}}}"),
            Select(made["active"], "all", among=made["chosen"]),
        ]
        return replace(self.recursion.loop, body=tuple(ops))

    def _router(self, name: str, write: str, apart: bool = False) -> Segment:
        body = router(self._stream, self.route.router, self.route.temperature, apart)
        index = self._index
        weights = [
            f"depth.{index}.{{{index}}}.{name}.{slot}" for slot in router_shapes(self.route.router, self._stream)
        ]
        return Segment(name, body, (self.recursion.h,), (write,), tuple(weights), precise=self.route.router != "linear")

    def _select(self) -> Select:
        """The best in training; in inference those above zero, as the router or the auxiliary router says."""
        made, index = self._made, self._index
        warmup = f", warmup={self.route.warmup}" if self.route.warmup else ""
        floor = ", ".join("-inf" if c == 1 else "0.0" for c in self.capacities)
        return Select(
            made["chosen"],
            f"topk({list(self.capacities)}[{index}]{warmup})",
            made["logit"],
            made["active"],
            self.candidates.real,
            f"threshold([{floor}][{index}])",
            made["judge"] if self.route.auxiliary else None,
            self.candidates.document,
        )

    def _taps(self, at: str) -> list[Op]:
        """The route, and the losses that this recursion adds."""
        made, route = self._made, self.route
        judged = made["judge"] if route.auxiliary else made["logit"]
        tapped = {"logit": judged, "candidates": made["active"], "chosen": made["chosen"]}
        ops: list[Op] = [Tap(f"route.{at}.{what}", value) for what, value in tapped.items()]
        sets = (made["chosen"], made["active"])
        losses = [
            ("router", "membership_loss", membership_loss, route.loss, (made["logit"], *sets)),
            ("judge", "membership_loss", membership_loss, route.auxiliary, (made["judge"], *sets)),
            ("z", "z_loss", z_loss, route.z_loss, (made["logit"], made["active"])),
        ]
        for name, function, body, weight, reads in losses:
            if weight:
                write = self.names.new("loss")
                ops += [Segment(function, body(self._stream, weight), reads, (write,)), Tap(f"loss.{at}.{name}", write)]
        return ops

    def params(self, seed: int) -> dict[str, Param]:
        """The routers of every recursion, and their auxiliary ones."""
        made: dict[str, Param] = {}
        law = f"normal({self.route.std})" if self.route.std else "zeros"
        for name in ("router", "judge") if self.route.auxiliary else ("router",):
            for slot, shape in router_shapes(self.route.router, self._stream).items():
                type = Type(wide(self._stream.dtype), shape)
                for r in range(len(self.capacities)):
                    own = f"depth.{self._index}.{r}.{name}.{slot}"
                    made[own] = Param(type, expr=Init(type, law, seed + len(made)))
        return made | (steps_taken() if self.route.warmup else {})
