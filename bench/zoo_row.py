"""One row of the zoo: every check of one architecture, each guarded, each recorded as soon as it is known.

A row runs in a process of its own. What it has found so far is on disk after every check, so that a time limit or a
crash in one check loses no other.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import zoo_checks
import zoo_mlir
import zoo_recipes
from architectures import ZOO, Architecture
from compare import cut, difference, gradients, rows_difference, without_cache
from torch import nn
from zoo_checks import Unmet

import depthc
from depthc.codegen.module import lower
from depthc.ir.graph.export import export
from depthc.ir.signature import bind, parameter_names, unbind

FORWARD = 1e-5  # of the lowered module; that the program is exact is checked before
PROMPT = 0.75  # the share of the tokens that incremental evaluation starts with


@dataclass
class Case:
    """A model, its inputs, and what was made from it: the captured program (None until then), the lowered module."""

    entry: Architecture
    model: nn.Module
    args: tuple
    kwargs: dict
    program: Any = None

    @cached_property
    def compiled(self) -> nn.Module:
        """What `depthc.compile(model, recipe="identity")` returns, without capturing a second time."""
        return lower(self.program, inspect.signature(self.model.forward))

    @cached_property
    def exported(self) -> Callable[..., Any]:
        """The model as torch.export has it, taking the model's arguments."""
        parameters = parameter_names(inspect.signature(self.model.forward))
        bound = bind(parameters, self.args, without_cache(self.model, self.kwargs))
        module = export(self.model, parameters, bound, training=False).module()

        def run(*args: Any, **kwargs: Any) -> Any:
            given = unbind(parameters, bind(parameters, args, without_cache(self.model, kwargs)))
            with torch.no_grad():
                return module(*given[0], **given[1])

        return run

    def reference(self, args: tuple, kwargs: dict) -> Any:
        """What the model itself returns, caches off."""
        with torch.no_grad():
            return self.model(*args, **without_cache(self.model, kwargs))


def captured(case: Case) -> float:
    start = time.perf_counter()
    case.program = depthc.capture(case.model, case.args, case.kwargs)
    return round(time.perf_counter() - start, 2)


def same(case: Case) -> float | str:
    return exact(case, case.args, case.kwargs)


def exact(case: Case, args: tuple, kwargs: dict) -> float | str:
    """The difference to the model; where torch.export differs from it, that the program is export's, bitwise."""
    with torch.no_grad():  # attention on a mask that requires grad is another kernel
        found = case.program.run(*args, **kwargs)
    gap = difference(found, case.reference(args, kwargs))
    if gap > case.entry.tolerance:
        exported = difference(found, case.exported(*args, **kwargs))
        return f"as export, {gap:.0e}" if exported == 0.0 else gap
    return gap


def other(case: Case) -> float | str:
    inputs = case.entry.elsewhere()
    if inputs is None:
        return "static"
    return exact(case, *inputs)


def depths(case: Case) -> str:
    found = tuple(case.program.depths)
    if found != case.entry.depths:
        raise Unmet(f"found {found}, expected {case.entry.depths}")
    return " + ".join(map(str, found))


def layer_check(check: Callable[..., str | float]) -> Callable[[Case], str | float]:
    return lambda case: check(case.program, case.model, case.args, case.kwargs)


def incremental(case: Case) -> float:
    """A prompt, then one token at a time, against the same rows of the full forward."""
    whole = case.reference(case.args, case.kwargs)
    stream = case.entry.stream
    inputs = dict(enumerate(case.args)) | case.kwargs
    name = next(iter(stream), None)
    if name is None:
        case.program.start(*case.args, **case.kwargs)
        raise Unmet("started, though no input of this model can be stepped")
    length = inputs[name].shape[stream[name].index("t")]
    prompt = int(length * PROMPT)
    args, kwargs = cut(inputs, stream, 0, prompt)
    out, past = case.program.start(*args, **kwargs)
    worst = rows_difference(out, whole, 0, prompt, length)
    for position in range(prompt, length):
        args, kwargs = cut(inputs, stream, position, position + 1)
        out, past = case.program.step(past, *args, **kwargs)
        worst = max(worst, rows_difference(out, whole, position, position + 1, length))
    return worst


def identity(case: Case, training: bool) -> float:
    """Forward, then all gradients relative to the largest, of the lowered module; equal random state on both sides."""
    compiled = case.compiled
    try:
        case.model.train(training)
        compiled.train(training)
        kwargs = without_cache(case.model, case.kwargs)
        expected, wanted = gradients(case.model, case.args, kwargs)
        found, got = gradients(compiled, case.args, case.kwargs)
    finally:
        case.model.eval()
    forward = difference(found, expected)
    if forward > max(case.entry.tolerance, FORWARD):
        raise Unmet(f"forward differs by {forward:.1e}")
    return difference(got, wanted) / max(1.0, *(float(g.abs().max()) for g in wanted.values() if g.numel()))


def text(case: Case) -> str:
    if depthc.parse(str(case.program), weights=case.program.weights) != case.program:
        raise Unmet("the parsed program is another one")
    return "equal"


def lines(case: Case) -> int:
    return len(str(case.program).splitlines())


@dataclass(frozen=True)
class Check:
    """A check and the largest number that it may return (None: any); an entry's tolerance can only raise the limit."""

    run: Callable[[Case], float | int | str]
    limit: float | None = None

    def met(self, value: float | int | str, tolerance: float) -> bool:
        return self.limit is None or isinstance(value, str) or value <= max(self.limit, tolerance)


CHECKS: dict[str, Check] = {
    "captured": Check(captured),
    "depths": Check(depths),
    "same": Check(same, 0.0),
    "other": Check(other, 0.0),
    "replay": Check(layer_check(zoo_checks.replay), 0.0),
    "ports": Check(layer_check(zoo_checks.ports)),
    "subset": Check(layer_check(zoo_checks.subset), zoo_checks.SUBSET),
    "incremental": Check(incremental, 1e-5),
    "eval": Check(lambda case: identity(case, training=False), 1e-6),
    "train": Check(lambda case: identity(case, training=True), 1e-6),
    "text": Check(text),
    "lines": Check(lines),
    "mlir": Check(layer_check(zoo_mlir.mlir)),
    "mor": Check(layer_check(zoo_recipes.mor)),
    "mor_token": Check(layer_check(zoo_recipes.mor_token)),
    "mod": Check(layer_check(zoo_recipes.mod)),
}


def guarded(check: Check, case: Case) -> dict[str, Any]:
    """Run a check; a typed refusal and a failure are both results, told apart by `status`."""
    start = time.perf_counter()
    try:
        value = check.run(case)
        found = {"status": "ok" if check.met(value, case.entry.tolerance) else "failed", "value": value}
    except depthc.DepthError as refusal:
        found = {"status": "refused", "reason": reason_of(refusal)}
    except Unmet as unmet:
        found = {"status": "failed", "reason": str(unmet)}
    except Exception as error:  # anything else is a bug, and a bug is a result of this row, not the end of the run
        found = {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
    return found | {"seconds": round(time.perf_counter() - start, 2)}


def reason_of(refusal: depthc.DepthError) -> str:
    """What is wrong; of a recipe that does not apply, also what was found: which op, or which options."""
    found = f": {refusal.found}" if isinstance(refusal, depthc.RecipeError) and refusal.found else ""
    return (first_line(refusal) + found)[:400]


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def results(entry: Architecture, only: Collection[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """All checks of an architecture, in order; the ones that need a program are skipped when there is none.

    With `only`, these checks alone, and the capture that they need.
    """
    args, kwargs = entry.example()
    torch.set_num_threads(1)
    case = Case(entry, entry.build(), args, kwargs)
    chosen = {name: check for name, check in CHECKS.items() if not only or name in ("captured", *only)}
    for name, check in chosen.items():
        if name != "captured" and case.program is None:
            yield name, {"status": "skipped", "reason": "not captured"}
        else:
            yield name, guarded(check, case)


def write_row(name: str, path: Path, only: Collection[str] = ()) -> None:
    """Check the architecture `name`, rewriting the row at `path` after every check."""
    found: dict[str, Any] = {}
    for check, result in results(ZOO[name], only):
        found[check] = result
        path.write_text(json.dumps(found))
