"""The ops of a loop in which every recursion chooses its tokens (recipes: section 4, expert choice)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from depthc.ir.masks.documents import Documents
from depthc.ir.masks.padding import Padding
from depthc.ir.names import Names
from depthc.ir.params import STEP, Init, Param
from depthc.ir.program import Call, Kv, Loop, Merge, On, Op, Segment, Select, Tap
from depthc.ir.types import Type
from depthc.passes.glue import Glue, aten, wide
from depthc.passes.routing_glue import combine, document_ids, membership_loss, router, router_shapes, z_loss

if TYPE_CHECKING:
    from depthc.passes.route import Route


@dataclass(frozen=True)
class ExpertChoice:
    """Writes the ops of a routed loop.

    Attributes:
        route: the pass, with its options.
        old: the loop as it is, over `calls`.
        ports: how many attention ports each block has.
        stream: the type of the hidden states.
        names: makes new names.
        documents: where tokens are chosen within each document.
    """

    route: Route
    old: Loop
    calls: Sequence[Call]
    ports: dict[str, int]
    stream: Type
    capacities: tuple[float, ...]
    names: Names
    documents: Documents | None = None

    @property
    def h(self) -> str:
        return self.calls[0].writes[0]

    @cached_property
    def _made(self) -> dict[str, str]:
        return {n: self.names.new(n) for n in ("real", "active", "chosen", "y", "logit", "judge", "document")}

    def before(self, padding: Sequence[Padding]) -> list[Op]:
        """The set of all real tokens, which all others are subsets of."""
        real, active = self._made["real"], self._made["active"]
        ops: list[Op] = []
        for number, found in enumerate(padding):
            score = found.argument
            if not found.on:
                score = self.names.new("is_token")
                g = Glue()
                body = g.body(g.op(aten.eq.Scalar, g.value("mask", found.type), 0))
                ops.append(Segment("is_token", body, (found.argument,), (score,)))
            ops.append(Select(real, "threshold(0)", score, real if number else None))
        ops = ops or [Select(real, "all", self.h)]
        if self.documents is not None:
            body = document_ids(self.documents.type, self.documents.counting)
            ops.append(Segment("documents", body, (self.documents.argument,), (self._made["document"],)))
        return [*ops, Select(active, "all", among=real)]

    def loop(self) -> Loop:
        """One recursion: select, run on the chosen tokens, merge, and say how well the router foretold it."""
        made, index = self._made, self.old.index
        body = combine(self.route.combine, self.stream, self.route.gate, self.route.alpha)
        scored = body is not None and len(body.inputs_of("value")) == 3
        ops: list[Op] = [
            self._router("router", made["logit"]),
            *([self._router("judge", made["judge"], apart=True)] if self.route.auxiliary else []),
            self._select(),
            On(made["chosen"], self._reads(), (made["y"],), tuple(self._layers())),
            Merge(self.h, self.h, made["y"], made["chosen"], body, (made["logit"],) if scored else ()),
            *self._taps(f"{index}.{{{index}}}"),
            Select(made["active"], "all", among=made["chosen"]),
        ]
        return replace(self.old, body=tuple(ops))

    def _router(self, name: str, write: str, apart: bool = False) -> Segment:
        body = router(self.stream, self.route.router, self.route.temperature, apart)
        index = self.old.index
        weights = [f"depth.{index}.{{{index}}}.{name}.{slot}" for slot in router_shapes(self.route.router, self.stream)]
        return Segment(name, body, (self.h,), (write,), tuple(weights), precise=self.route.router != "linear")

    def _select(self) -> Select:
        """The best in training; in inference those above zero, as the router or the auxiliary router says."""
        made, index = self._made, self.old.index
        warmup = f", warmup={self.route.warmup}" if self.route.warmup else ""
        floor = ", ".join("-inf" if c == 1 else "0.0" for c in self.capacities)
        return Select(
            made["chosen"],
            f"topk({list(self.capacities)}[{index}]{warmup})",
            made["logit"],
            made["active"],
            made["real"],
            f"threshold([{floor}][{index}])",
            made["judge"] if self.route.auxiliary else None,
            made["document"] if self.documents is not None else None,
        )

    def _reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for call in self.calls for name in call.reads))

    def _layers(self) -> list[Op]:
        """The layers on the rows of the chosen tokens."""
        ops: list[Op] = []
        y = self._made["y"]
        for number, call in enumerate(self.calls):
            reads = (self.h if not number else y, *call.reads[1:])
            ops.append(replace(call, reads=reads, writes=(y,), kv=self._kv(number, call)))
        return ops

    def _kv(self, number: int, call: Call) -> tuple[Kv, ...]:
        if self.route.kv == "recursion":
            return ()
        mode = "share" if self.route.kv == "share_first" else "overlay"
        return tuple(Kv(mode, f"{self.old.index}.{number}.{port}") for port in range(self.ports[call.block]))  # type: ignore[arg-type]

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
                ops += [Segment(function, body(self.stream, weight), reads, (write,)), Tap(f"loss.{at}.{name}", write)]
        return ops

    def params(self, seed: int) -> dict[str, Param]:
        """The routers of every recursion, and their auxiliary ones."""
        made: dict[str, Param] = {}
        count = Type(torch.int64, ())
        steps = {STEP: Param(count, "buffer", Init(count, "zeros"))} if self.route.warmup else {}
        law = f"normal({self.route.std})" if self.route.std else "zeros"
        for name in ("router", "judge") if self.route.auxiliary else ("router",):
            for slot, shape in router_shapes(self.route.router, self.stream).items():
                type = Type(wide(self.stream.dtype), shape)
                for r in range(len(self.capacities)):
                    own = f"depth.{self.old.index}.{r}.{name}.{slot}"
                    made[own] = Param(type, expr=Init(type, law, seed + len(made)))
        return made | steps
