"""Steps of fixed shapes: caches are rings, and where a token is only the device knows.

Whatever runs them again at another place, a CUDA graph too, gets that token's results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from depthc.ir.axes.caches import Cached, bounds, cached_of
from depthc.ir.axes.ports import ports_of
from depthc.ir.errors import IncrementalError
from depthc.ir.plans import Plan, token_dim
from depthc.ir.program import Block, Call, Kv, Segment
from depthc.ir.recurrent import LastStack
from depthc.ir.rows.execution import Cache
from depthc.ir.rows.gather import Rows
from depthc.ir.rows.rings import Rings
from depthc.ir.sections import Section, lagged_ports
from depthc.ir.side_by_side import Alone, Sections, late_carries, made_by
from depthc.ir.steps import Kept, Steps
from depthc.ir.tokens import TokenSet
from depthc.runtime.hoist import Hoisted

_ALIGNED = 8  # rows of a mask, where attention is fast


def ring_sizes(plan: Plan, op: Segment | Call, block: Block, length: int) -> list[int]:
    """How many rows each port keeps of up to `length` tokens: those of its window, and the token's own."""
    reaches = plan.reaches.get(op) if isinstance(op, Call) else None
    kept = bounds(block, reaches or (None,) * len(ports_of(block)))
    return [length if n is None else min(length, -(-(n + 1) // _ALIGNED) * _ALIGNED) for n in kept]


@dataclass
class Memory:
    """What one step leaves to the next, and what all of them run with.

    Attributes:
        place: int[1, 1], where the token at hand is.
        run_rows, param, write: run blocks, give parameters, and write rows into rings.
        rings: see `depthc.ir.rows.rings`.
        hoisted: runs what stands in front of the layers.
        streams: one a section that runs beside others; none on a CPU.
        static: what the ports of every application keep, by its name; written over.
        repeated: side inputs that no token changes and that have a row a batch row, for all sections.
    """

    place: Tensor
    run_rows: Callable[..., Any]
    param: Callable[[str], Tensor]
    write: Callable[..., Any]
    rings: Rings
    hoisted: Hoisted
    streams: Sequence[torch.cuda.Stream] = ()
    static: dict[str, list[Cache | None]] = field(default_factory=dict)
    repeated: dict[str, Tensor] = field(default_factory=dict)


class Fixed(Steps):
    """Evaluates one token at a place that only the device knows, with caches whose sizes stay."""

    def __init__(self, memory: Memory, *given: Any) -> None:
        super().__init__(*given)
        self.memory, self.place, self.fresh = memory, memory.place, 1
        self.run_rows, self.evaluator.param = memory.run_rows, memory.param

    def whole(self, op: Segment | Call, site: str, indices: Mapping[str, int]) -> None:
        self.evaluator.run_body = partial(self.memory.hoisted.run, op, site)
        super().whole(op, site, indices)

    def _positions(self, tokens: TokenSet | None) -> Rows:
        return Rows(1, self.place)

    def _rows_of(self, name: str, block: Block) -> Tensor:
        value: Tensor = self.values[name]
        return value if self.kinds[name] == "rows" else value.index_select(token_dim(block), self.place[0])

    def _plans(self, op: Segment | Call, block: Block, site: str, indices: Mapping[str, int]) -> tuple[list[Kv], Kept]:
        plans = [Kv("read" if port.cross else "update", "cache") for port in ports_of(block)]
        return plans, Kept(tuple(self._kept(op, block, self._slot(op, site, indices))), self._nothing())

    def _kept_rows(self, block: Block, kept: Kept) -> dict[str, Any]:
        return {"rings": self.memory.rings}

    def _store(
        self, op: Segment | Call, block: Block, plans: Sequence[Kv], kept: Kept, site: str, indices: Mapping[str, int]
    ) -> None:
        """What is kept has been written over."""

    def _kept(self, op: Segment | Call, block: Block, name: str) -> Sequence[Cache | None]:
        """The caches of an application, made of what the prompt left there."""
        if name not in self.memory.static and name in self.past.caches:
            ports = zip(
                ports_of(block),
                cached_of(block),
                self.past.caches[name].caches,
                ring_sizes(self.plan, op, block, self.length),
                strict=True,
            )
            self.memory.static[name] = [
                cache if port.cross or cache is None else tuple(map(partial(self._as_ring, rows), cache, own))
                for port, own, cache, rows in ports
            ]
        return self.memory.static.get(name, ())

    def _as_ring(self, rows: int, cache: Tensor, layout: Cached) -> Tensor:
        """The last of the prompt's rows, each in its place."""
        if not layout.alone:
            raise IncrementalError(
                "keys share their dimension with others and cannot get more rows",
                expected="a cache with a dimension for the tokens",
                found=f"one of shape {list(cache.shape)}",
                remedy="use generate, or program.step",
            )
        count, end = min(rows, cache.shape[layout.dim]), self.past.length
        places = torch.arange(end - count, end, device=cache.device) % rows
        last = cache.narrow(layout.dim, cache.shape[layout.dim] - count, count)
        shape = [*cache.shape[: layout.dim], rows, *cache.shape[layout.dim + 1 :]]
        return cache.new_zeros(shape).index_copy_(layout.dim, places, last)


class FixedAlone(Alone, Fixed):
    """The same of a program whose layers are sections that need nothing of each other in a step."""

    def show(self, op: Call, site: str, indices: Mapping[str, int]) -> None:
        layouts = cached_of(self.program.blocks[op.block])
        for port in lagged_ports(self.program, op):
            dims = [c.dim for c in layouts[port]]
            self.memory.write(self.memory.static[site][port] or (), self.shown(op, port, indices), dims, self.place)


class FixedSections(Sections, FixedAlone):
    """Sections that run at the same time: branches of a CUDA graph.

    What a section shows to others is written as soon as it has run. Others may still read the cache: the row belongs to
    a token that none of them sees.
    """

    def layers(self, calls: Mapping[str, Call], indices: Mapping[str, int]) -> None:
        for site, call in calls.items():
            self._kept(call, self.program.blocks[call.block], site)  # before there are branches
        # None of them runs on the current stream: what that frees meanwhile is not given to others.
        current = torch.cuda.current_stream() if self.memory.streams else None
        for number, section in enumerate(self.sections):
            with self._branch(number, current):
                self._section(section, calls, indices)
        for stream in self.memory.streams:
            current.wait_stream(stream)  # type: ignore[union-attr]

    @contextmanager
    def _branch(self, number: int, current: torch.cuda.Stream | None) -> Iterator[None]:
        if current is None:
            yield
            return
        self.memory.streams[number].wait_stream(current)
        with torch.cuda.stream(self.memory.streams[number]):
            yield

    def _section(self, section: Section, calls: Mapping[str, Call], indices: Mapping[str, int]) -> None:
        sites = list(calls)
        for at in section.numbers:
            self.run_alone(calls[sites[at]], sites[at], indices)
        made = {name for call in section.calls for name in made_by(self.program, call)}
        for site, call in calls.items():
            if made & {call.reads[i] for i in late_carries(self.program, call)}:
                self.show(call, site, indices)


class FixedLastStack(LastStack, FixedAlone):
    """The last section alone: recurrent decoding."""
