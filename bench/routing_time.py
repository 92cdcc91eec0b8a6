"""Seconds of a call, on CUDA and on the processor; calls as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from routing_plan import Row
from turns import Turns

from depthc.codegen.functions import with_own_code
from depthc.codegen.module import DepthModule

FLUSHED = 256 << 20  # bytes that are written to put everything else out of the cache
WARM = 3  # calls before the first that counts


class Skip(Exception):
    """Why a variant is not run here: no failure."""


@dataclass(frozen=True)
class Place:
    """Where rows are measured, what torch.compile compiles with, and whose turn it is."""

    device: str
    backend: str = "inductor"
    turns: Turns = field(default_factory=Turns)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """One graph of a function, for the shapes that it is called with."""
        return torch.compile(with_own_code(function), backend=self.backend, fullgraph=True, dynamic=False)

    def compile(self, module: DepthModule, dynamic: bool | None = False) -> None:
        """Compile the bodies of a module; `dynamic` is that of torch.compile."""
        module.compile(backend=self.backend, dynamic=dynamic)

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


def require_cuda(place: Place, what: str) -> None:
    """Leave a variant out where there is no CUDA.

    Raises:
        Skip: there is none.
    """
    if not place.cuda:
        raise Skip(f"{what} needs CUDA")


def nothing() -> None:
    """What most variants need before they run again."""


@dataclass(frozen=True)
class Ready:
    """A variant that can be run.

    Attributes:
        run: returns a tensor to compare with what the other variants make.
        reset: for those that write over their input: makes it what it was; not timed.
    """

    run: Callable[[], Any]
    reset: Callable[[], None] = nothing


Variants = Mapping[str, Callable[[], Ready]]


@dataclass(frozen=True)
class Clock:
    """Seconds of a call: by events on CUDA, else by the processor's clock.

    Attributes:
        rounds: samples of every variant in a run.
        least: seconds that a sample lasts; it has as many calls, one behind the other, as that takes.
        flush: whether every call begins with an empty L2; then a sample is the mean of calls by themselves.
        each: calls that `run` itself makes.
        until: when no further variant is begun, by `time.perf_counter`.
    """

    place: Place
    rounds: int
    least: float
    flush: bool = False
    each: int = 1
    until: float = float("inf")

    @property
    def cache(self) -> str:
        """What L2 holds when a call begins."""
        return "flushed before every call" if self.flush else "as the call before left it"

    def sample(self, ready: Ready, calls: int) -> float:
        """Seconds of one call, of so many."""
        ready.reset()
        if not self.place.cuda:
            return self._by_processor(ready, calls) / calls / self.each
        groups, inner = (calls, 1) if self.flush else (1, calls)
        events = [self._by_events(ready, inner) for _ in range(groups)]
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1000 / calls / self.each

    def _by_processor(self, ready: Ready, calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            ready.run()
        return time.perf_counter() - began

    def _by_events(self, ready: Ready, calls: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.flush:
            ready.reset()
            torch.empty(FLUSHED, dtype=torch.int8, device="cuda").zero_()
        else:
            ready.run()  # the device is busy with this one while the processor gets ahead
        start.record()
        for _ in range(calls):
            ready.run()
        end.record()
        return start, end

    def calls(self, ready: Ready) -> int:
        """How many calls a sample has."""
        once = self.sample(ready, 1) * self.each
        return max(1, min(30, round(self.least / max(once, 1e-9))))


def clock_of(row: Row, place: Place, began: float, **options: Any) -> Clock:
    """The clock of a row that began at a time: what is not made in two thirds of its limit is left out."""
    return Clock(place, row.rounds, row.least, until=began + row.limit * 2 / 3, **options)


def captured(ready: Ready) -> Ready:
    """A variant as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            ready.reset()
            ready.run()
    torch.cuda.current_stream().wait_stream(side)
    ready.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ready.run()

    def replay(held: Ready = ready) -> Any:  # its weights are read at addresses that the graph alone knows
        graph.replay()
        return result

    return Ready(replay, ready.reset)
