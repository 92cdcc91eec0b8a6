"""The ops of a loop in which every recursion chooses its tokens (recipes: section 4, expert choice)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from depthc.ir.names import Names
from depthc.ir.params import Param, drawn, steps_taken
from depthc.ir.program import Loop, Merge, Op, Segment, Select
from depthc.ir.types import Type
from depthc.passes.glue import wide
from depthc.passes.recursion import Recursion
from depthc.passes.routing_glue import combine, membership_loss, router, router_shapes, z_loss
from depthc.passes.subsets import Candidates
from depthc.passes.taps import loss_taps, route_taps

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
        kind, index = self.route.router, self._index
        weights = tuple(f"depth.{index}.{{{index}}}.{name}.{slot}" for slot in router_shapes(kind, self._stream))
        body = router(self._stream, kind, self.route.temperature, apart=apart)
        return Segment(name, body, (self.recursion.h,), (write,), weights, precise=True)

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

    def _taps(self, at: str) -> Iterator[Op]:
        """The route, and the losses that this recursion adds."""
        made, route, stream = self._made, self.route, self._stream
        active, chosen, logit, judge = (made[n] for n in ("active", "chosen", "logit", "judge"))
        yield from route_taps(at, active, chosen, judge if route.auxiliary else logit)
        if route.loss:
            body = membership_loss(stream, route.loss)
            yield from loss_taps(at, "router", body, (logit, chosen, active), self.names)
        if route.auxiliary:
            body = membership_loss(stream, route.auxiliary)
            yield from loss_taps(at, "judge", body, (judge, chosen, active), self.names)
        if route.z_loss:
            yield from loss_taps(at, "z", z_loss(stream, route.z_loss), (logit, active), self.names)

    def params(self) -> dict[str, Param]:
        """The routers of every recursion, and their auxiliary ones."""
        shapes = {
            f"depth.{self._index}.{r}.{name}.{slot}": shape
            for name in (("router", "judge") if self.route.auxiliary else ("router",))
            for slot, shape in router_shapes(self.route.router, self._stream).items()
            for r in range(len(self.capacities))
        }
        made = drawn(shapes, wide(self._stream.dtype), self.route.std, self.route.seed)
        return made | (steps_taken() if self.route.warmup else {})
