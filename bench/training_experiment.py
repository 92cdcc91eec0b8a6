"""The training experiment: its runs one after the other, in calls that end in time."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import corpus as texts
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from training_eval import judged
from training_model import Cost, Maker, parameters
from training_plan import VARIANTS, Run, runs, seconds_of
from training_report import Results
from training_run import State, Trainer

RESERVE = 0.03  # the part of the limit that is kept for evaluation and for the checkpoint


class Experiment:
    """The runs of one call.

    Args:
        results: what is known, and where it is kept.
        corpus: text for training, for choosing rates, and for what is reported.
        options: of the command line.
    """

    def __init__(self, results: Results, corpus: texts.Corpus, options: argparse.Namespace, console: Console) -> None:
        self.results, self.options, self.console, self.settings = results, options, console, results.settings
        self.began = time.perf_counter()
        self.device, self.door = options.device, "eager" if options.eager else "bodies"
        self.text = {name: self._tensor(getattr(corpus, name)) for name in ("train", "choice", "report")}
        self.maker = Maker(self.settings, self.device)
        self.budget = self._budget()

    def _tensor(self, text: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)

    def _budget(self) -> float:
        """The operations that the vanilla model takes for the tokens of the settings."""
        cost = Cost(self.maker.program("vanilla", 0), self.settings)
        return cost.most * self.settings.tokens / self.settings.read

    def left(self) -> float:
        """Seconds until this call has to end."""
        return self.options.limit * (1 - RESERVE) - (time.perf_counter() - self.began)

    def remaining(self, unknown: float | None = None) -> list[Run]:
        """The runs to do, as far as they are known; `unknown` is a rate for those whose rate is not."""
        rows = self.results.rows
        return [run for run in runs(self.settings, rows, self.options.only, unknown) if run.name not in rows]

    def all(self) -> int:
        """Runs until they are done or time is up; the exit status."""
        while remaining := self.remaining():
            run = remaining[0]
            ready = self.maker.holds(run.variant, self.door)
            wanted = seconds_of(run, self.budget, self.results.report, self.door, ready)
            if wanted is not None and wanted > self.left() and not self._checkpoint(run).exists():
                self.console.print(f"{run.name} takes {wanted:.0f} s and {self.left():.0f} s are left: run this again")
                return 3
            try:
                row = self.one(run)
            except Exception as error:  # a run that diverges, or a device that gives up, is a result
                row = asdict(run) | {"kind": run.kind, "failed": f"{type(error).__name__}: {error}"}
                self.results.keep(run.name, row)
                self.console.print(f"{run.name} failed: {row['failed']}", markup=False)
                return 1
            if row is None:
                self.console.print(f"{run.name} is not done: run this again")
                return 3
            self.results.keep(run.name, row)
            self._checkpoint(run).unlink(missing_ok=True)
        return 0

    def _checkpoint(self, run: Run) -> Path:
        return Path(self.options.checkpoints) / f"{run.name.replace(', ', '-').replace(' ', '-')}.pt"

    def one(self, run: Run) -> dict[str, Any] | None:
        """One run's row; None if time was up before it was done."""
        began = time.perf_counter()
        module, compiled = self.maker.module(run.variant, run.seed, self.door)
        made = time.perf_counter() - began
        trainer = Trainer(run, module, self.text["train"], self.settings, self.budget, self._checkpoint(run))
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with self._shown(run) as show:
            done = trainer.train(lambda: self.left() < 0, show)
        if not done:
            return None
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        text = self.text["report" if run.kind == "final" else "choice"]
        row = asdict(run) | {"kind": run.kind, "recipe": VARIANTS[run.variant].recipe.format(seed=run.seed)}
        row |= trainer.result() | {"peak_memory": peak, "compiled": compiled, "device": self.results.device}
        if self.options.beside:
            row["tokens_per_second"] = None
        row |= {"parameters": parameters(module), "flops_per_token": trainer.cost.most / self.settings.read}
        evaluation = time.perf_counter()
        row |= judged(module, run.variant, text, self.settings)
        row |= {"made": made, "evaluated": time.perf_counter() - evaluation}
        self.console.print(f"{run.name}: {row['causal']['bits']:.4f} bits a byte, {time.perf_counter() - began:.0f} s")
        return row

    def measure(self) -> int:
        """A short training of every variant, compiled and eager: only how fast it is is kept; the exit status."""
        longest = 0.0
        for variant in self.options.only:
            for door in dict.fromkeys((self.door,) if self.options.compiled_only else ("eager", self.door)):
                if door in self.results.report["speed"].get(variant, {}):
                    continue
                if longest > self.left():
                    self.console.print(f"{self.left():.0f} s are left: run this again")
                    return 3
                began = time.perf_counter()
                self.results.speed(variant, door, self._speed(variant, door))
                longest = max(longest, time.perf_counter() - began)
        return 0

    def _speed(self, variant: str, door: str) -> dict[str, Any]:
        began = time.perf_counter()
        module, compiled = self.maker.module(variant, 0, door)
        made = time.perf_counter() - began
        steps = 4 * self.settings.every
        run = Run(variant, 0, 1e-3, steps * self.settings.read / self.settings.tokens)
        trainer = Trainer(run, module, self.text["train"], self.settings, self.budget, Path("no checkpoint"))
        trainer.train(lambda: False, lambda *_: None)
        began, found = time.perf_counter(), trainer.result()
        judged(module, variant, self.text["choice"], self.settings)
        self.console.print(
            f"{variant}, {compiled}: {found['tokens_per_second']:,.0f} tokens a second, made in {made:.0f} s"
        )
        return {
            "compiled": compiled,
            "tokens_per_second": found["tokens_per_second"],
            "flops_per_second": found["tokens_per_second"] * found["flops"] / found["tokens"],
            "made": made,
            "evaluated": time.perf_counter() - began,
        }

    def plan(self) -> None:
        """The runs that remain, with the seconds that each will take."""
        total, training, before = 0.0, 0.0, ""
        for run in self.remaining(unknown=0.0):
            known = self.results.report, self.door, run.variant == before
            wanted, before = seconds_of(run, self.budget, *known), run.variant
            self.console.print(f"{run.name:24} {'not known: --measure' if wanted is None else f'{wanted:.0f} s'}")
            if wanted is not None:
                total, training = total + wanted, training + wanted - (seconds_of(run, 0.0, *known) or 0.0)
        text = f"{self.settings.tokens / 1e6:g} million bytes: in all {total:.0f} s, {training:.0f} s of them to train"
        self.console.print(f"{text}, and what a sweep may add")

    @contextmanager
    def _shown(self, run: Run) -> Iterator[Any]:
        """A bar on a terminal, else a line now and then."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[at]}"), TimeElapsedColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(run.name, total=1.0, at="")

            def show(state: State, share: float) -> None:
                bits = state.curve[-1][1]
                at = f"step {state.step}, {bits:.3f} bits a byte, {state.speeds[-1]:,.0f} tokens a second"
                progress.update(task, completed=share, at=at)
                if not self.console.is_terminal and (len(state.curve) % 10 == 1 or share > 0.999):
                    self.console.print(f"{run.name}: {share:.0%}, {at}")

            yield show
