"""Several ways to do the same, timed in turns, and what they are worth beside each other and beside a floor."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from routing_plan import Asked
from routing_time import WARM, Clock, Ready, Skip, Variants
from torch import Tensor

FLOPS, BYTES = 790e12, 4.3e12  # of one H200 in a second: products in bf16, and its memory
RUNS = 2
OTHERS = ("dense", "vanilla")  # variants that compute something else
FAR = 0.05  # relative errors of bf16, with a token chosen in place of another now and then, are far below


@dataclass
class Race:
    """Variants that take turns, and what is known of each.

    Attributes:
        clock: times them.
        times: the median seconds of a call in every run.
        made: seconds until a variant was ready, compilation included.
        failed, skipped: why there is no time.
        found: what the variants returned.
    """

    clock: Clock
    times: dict[str, list[float]] = field(default_factory=dict)
    made: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Seconds of a call, over the runs."""
        return statistics.mean(self.times[name])

    def run(self, variants: Variants) -> Race:
        """Make all variants, then time them in turns; what fails is left out and says why.

        Every round has another order: what runs behind a variant that leaves the device cool is faster.
        """
        ready = {name: one for name, make in variants.items() if (one := self._make(name, make))}
        with self.clock.place.turns.alone():
            self._time(ready)
        return self

    def _time(self, ready: dict[str, Ready]) -> None:
        """Time what is ready in turns."""
        order = random.Random(0)
        calls = {name: self.clock.calls(one) for name, one in ready.items()}
        for _ in range(RUNS):
            samples: dict[str, list[float]] = {name: [] for name in ready}
            for _ in range(self.clock.rounds):
                for name in order.sample(list(ready), len(ready)):
                    try:
                        samples[name].append(self.clock.sample(ready[name], calls[name]))
                    except Exception as error:
                        self._drop(name, error)
                        del ready[name]
            for name in ready:
                self.times.setdefault(name, []).append(statistics.median(samples[name]))

    def _drop(self, name: str, error: Exception) -> None:
        """Leave a variant out that failed."""
        self.failed[name] = reason(error)
        self.times.pop(name, None)
        if self.clock.place.cuda:
            torch.cuda.empty_cache()

    def _make(self, name: str, make: Callable[[], Ready]) -> Ready | None:
        self.clock.place.turns.beside()
        began = time.perf_counter()
        if began > self.clock.until + self.clock.place.turns.waited:
            self.skipped[name] = "the time of this row was gone before it was made"
            return None
        try:
            ready = make()
            self.found[name] = _copy(ready.run())
            for _ in range(WARM - 1):
                ready.run()
            if self.clock.place.cuda:
                torch.cuda.synchronize()
        except Skip as why:
            self.skipped[name] = str(why)
            return None
        except Exception as error:  # what compilers and devices raise has no common base
            self._drop(name, error)
            return None
        self.made[name] = time.perf_counter() - began
        return ready

    def errors(self, reference: str) -> dict[str, float]:
        """How far results are from those of another variant, relative to their norm; one that is far off has failed."""
        if reference not in self.found:
            return {}
        wanted, errors = self.found[reference].double(), {}
        for name in self.found.keys() - {reference, *OTHERS}:
            errors[name] = ((self.found[name].double() - wanted).norm() / wanted.norm()).item()
            if not errors[name] <= FAR:
                self.failed[name] = f"its result is {errors.pop(name):.2g} off that of {reference!r}"
        return errors


def _copy(result: Any) -> Any:
    return result.detach().clone() if isinstance(result, Tensor) else result


def reason(error: Exception) -> str:
    """An error in one line; compilers say what it is about behind their first one."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def judged(
    race: Race,
    asked: Sequence[Asked],
    *,
    flops: float,
    moved: float,
    floor: float,
    choices: str,
    reference: str = "eager",
    others: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """A row of the results: times, their ratios to each other and to the floor, and what was asked for.

    Args:
        flops, moved: operations and bytes that the task takes at least.
        floor: the seconds that these take at least on an H200.
        choices: which kernels run.
        reference: the variant that the results of all others are compared with.
        others: further numbers that are asked about, by name.
    """
    times = {name: race.median(name) for name in race.times}
    on_floor = race.clock.place.cuda and "H200" in torch.cuda.get_device_name()
    row: dict[str, Any] = {"times": race.times, "made": race.made, "failures": race.failed, "skipped": race.skipped}
    row["spread"] = {name: max(runs) / min(runs) - 1 for name, runs in race.times.items()}
    row["ratios"] = {name: {peer: own / other for peer, other in times.items()} for name, own in times.items()}
    row |= {"flops": flops, "bytes": moved, "floor": floor}
    row["percent_of_floor"] = {name: 100 * floor / own for name, own in times.items()} if on_floor else {}
    values = {**times, **(others or {}), **({"floor": floor} if on_floor else {})}
    row["asked"] = [one.answer(values) for one in asked]
    return row | {"error": race.errors(reference), "l2": race.clock.cache, "choices": choices.splitlines()}
