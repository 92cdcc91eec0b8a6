"""Train a small Llama of bytes in several ways at equal training operations: vanilla, tied, routed; or staggered, wide.

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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import corpus as texts
import torch
from rich.console import Console
from training_experiment import Experiment
from training_plan import STUDIES, TINY, VARIANTS, Settings
from training_report import Results


def parse_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--sha256", help="of the corpus, where it is another one than results are of")
    parser.add_argument("--out", type=Path, default=Path("build/training"), help="where results go")
    parser.add_argument("--checkpoints", type=Path, default=Path("build/checkpoints"), help="of a run in progress")
    parser.add_argument("--limit", type=float, default=540, help="seconds for this call (default: 540)")
    parser.add_argument("--budget", type=int, metavar="TOKENS", help="of a final run: what vanilla takes for so many")
    parser.add_argument("--seeds", type=int, help="final runs of every variant")
    parser.add_argument("--study", choices=STUDIES, default="routing", help="what is compared (default: routing)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=(), help="variants, if not all of the study")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", default=not torch.cuda.is_available(), help="compile nothing")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: a tiny model, a few steps")
    parser.add_argument("--beside", action="store_true", help="other work is on the device: keep no speeds of runs")
    parser.add_argument("--retry", action="store_true", help="run what failed once more")
    parser.add_argument("--plan", action="store_true", help="say what remains")
    parser.add_argument("--measure", action="store_true", help="how fast variants train, compiled and eager")
    parser.add_argument("--compiled-only", action="store_true", help="measure no eager training")
    options = parser.parse_args(given)
    options.only = options.only or STUDIES[options.study].variants
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    """Those of the command line; a budget and seeds that are not given are the usual ones."""
    given = {"tokens": options.budget, "seeds": options.seeds}
    usual = replace(Settings(), layers=STUDIES[options.study].layers)
    if options.tiny:
        usual = TINY if options.study == "routing" else replace(TINY, layers=4)
    return replace(usual, **{k: v for k, v in given.items() if v is not None})


def main(given: Sequence[str] | None = None) -> int:
    options = parse_arguments(given)
    corpus = texts.read(options.corpus, options.sha256 or texts.recorded())
    results = Results(options.out / "training.json", settings_of(options), corpus.sha256, options.device)
    if options.retry:
        results.forget_failures()
    experiment = Experiment(results, corpus, options, Console(highlight=False, soft_wrap=True))
    if options.measure:
        return experiment.measure()
    if options.plan:
        experiment.plan()
        return 0
    return experiment.all()


if __name__ == "__main__":
    sys.exit(main())
