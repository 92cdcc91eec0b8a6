"""Train a small Llama of bytes in several ways at equal training operations: vanilla, tied, routed.

    python bench/corpus.py build/corpus.bin
    python bench/training.py --corpus build/corpus.bin --out build/training --measure   how fast each variant is
    python bench/training.py --corpus build/corpus.bin --out build/training --plan      what is to be run, how long
    python bench/training.py --corpus build/corpus.bin --out build/training             run it

A call ends before `--limit` seconds, between two runs if it can, else with a checkpoint; the same command goes on from
there. Exit status: 0 all runs are done, 3 some are left, 1 a run failed: its row says why, and the same command goes
on with the next run. Results: training.json in --out, written after every run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import corpus as texts
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from training_eval import judged
from training_model import Cost, Maker, parameters
from training_plan import TINY, VARIANTS, Run, Settings, runs, seconds_of
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

    def remaining(self) -> list[Run]:
        """The runs to do, as far as they are known."""
        rows = self.results.rows
        return [run for run in runs(self.settings, rows, self.options.only) if run.name not in rows]

    def all(self) -> int:
        """Runs until they are done or time is up; the exit status."""
        while remaining := self.remaining():
            run = remaining[0]
            wanted = seconds_of(run, self.budget, self.results.report, self.door)
            if wanted is not None and wanted > self.left() and not self._checkpoint(run).exists():
                self.console.print(f"{run.name} takes {wanted:.0f} s and {self.left():.0f} s are left: run this again")
                return 3
            try:
                row = self.one(run)
            except Exception as error:  # a run that diverges, or a device that gives up, is a result
                row = {"variant": run.variant, "rate": run.rate, "failed": f"{type(error).__name__}: {error}"}
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
        row |= {"parameters": parameters(module), "flops_per_token": trainer.cost.most / self.settings.read}
        row |= judged(module, run.variant, text, self.settings)
        row["wall"] = time.perf_counter() - began
        self.console.print(f"{run.name}: {row['causal']['bits']:.4f} bits a byte, {row['wall']:.0f} s")
        return row

    def measure(self) -> None:
        """A short training of every variant through both doors; nothing is kept but how fast it was."""
        for variant in VARIANTS:
            if self.options.only and variant not in self.options.only:
                continue
            for door in ("eager", self.door) if self.door != "eager" else ("eager",):
                self.results.speed(variant, door, self._speed(variant, door))

    def _speed(self, variant: str, door: str) -> dict[str, Any]:
        began = time.perf_counter()
        module, compiled = self.maker.module(variant, 0, door)
        made = time.perf_counter() - began
        run = Run(variant, 0, 1e-3, min(1.0, 2 * self.settings.every * self.settings.read / self.settings.tokens))
        trainer = Trainer(run, module, self.text["train"], self.settings, self.budget, Path("no checkpoint"))
        trainer.train(lambda: False, lambda *_: None)
        began, found = time.perf_counter(), trainer.result()
        judged(module, variant, self.text["choice"], self.settings)
        speeds = {name: found[name] / found["seconds"] for name in ("tokens", "flops")}
        return {
            "compiled": compiled,
            "tokens_per_second": speeds["tokens"],
            "flops_per_second": speeds["flops"],
            "made": made,
            "evaluated": time.perf_counter() - began,
        }

    def plan(self) -> None:
        """The runs that remain, with the seconds that each will take."""
        total = 0.0
        for run in self.remaining():
            wanted = seconds_of(run, self.budget, self.results.report, self.door)
            total += wanted or 0.0
            self.console.print(f"{run.name:24} {'not known: --measure' if wanted is None else f'{wanted:.0f} s'}")
        self.console.print(f"in all {total:.0f} s, and what the sweeps decide on")

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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--sha256", help="of the corpus, where it is another one than results are of")
    parser.add_argument("--out", type=Path, default=Path("build/training"), help="where results go")
    parser.add_argument("--checkpoints", type=Path, default=Path("build/checkpoints"), help="of a run in progress")
    parser.add_argument("--limit", type=float, default=540, help="seconds for this call (default: 540)")
    parser.add_argument("--tokens", type=int, help="that the vanilla model reads: the budget of every final run")
    parser.add_argument("--seeds", type=int, help="final runs of every variant")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=(), help="variants")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", default=not torch.cuda.is_available(), help="compile nothing")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: a tiny model, a few steps")
    parser.add_argument("--plan", action="store_true", help="say what remains")
    parser.add_argument("--measure", action="store_true", help="how fast variants train")
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    given = {name: getattr(options, name) for name in ("tokens", "seeds") if getattr(options, name) is not None}
    return replace(TINY if options.tiny else Settings(), **given)


def main() -> int:
    options = parse_arguments()
    corpus = texts.read(options.corpus, options.sha256 or texts.recorded())
    results = Results(options.out / "training.json", settings_of(options), corpus.sha256, options.device)
    experiment = Experiment(results, corpus, options, Console(highlight=False, soft_wrap=True))
    if options.plan:
        experiment.plan()
        return 0
    if options.measure:
        experiment.measure()
        return 0
    return experiment.all()


if __name__ == "__main__":
    sys.exit(main())
