"""Depth routing on a GPU: routed layers, a whole Mixture-of-Recursions, and the ops around them, beside their peers.

    python bench/routing.py --out build/routing.json                              on an H200, several times
    python bench/routing.py --out build/routing.json --plan                       what remains
    python bench/routing.py --out build/tiny.json --tiny --device cpu             a rehearsal

Every row is a process of its own, the most important ones first, and its variants take turns (A B A B), twice over.
With `--jobs`, several rows compile beside each other, and each is timed alone. A row that does not fit into what is
left of `--limit` seconds is not begun; the same command goes on from there. A variant that fails says why in its row,
and so does a row; the rest goes on. Exit status: 0 all rows are done, 3 some are left, 1 all are done and a row, or a
variant of one, failed: `--retry` runs those again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import in_a_process, provenance, write
from routing_plan import ROWS, Row, tiny
from routing_race import BYTES, FLOPS
from routing_time import Place
from turns import Turns

from depthc.ir.errors import DepthError

MODULES = {"graph": "routing_layer"}  # that measure rows of a kind, where it is not named after the kind


class ResultsError(DepthError):
    """Results of one kind that would go among others."""


def parse_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/routing.json"), help="where results go")
    parser.add_argument("--limit", type=float, default=560, help="seconds for this call (default: 560)")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="a row, or all whose name begins so")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; eager compiles nothing: a rehearsal")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: tiny sizes, few calls")
    parser.add_argument("--retry", action="store_true", help="run what failed once more")
    parser.add_argument("--plan", action="store_true", help="say what remains")
    parser.add_argument("--jobs", type=int, default=1, help="rows that get ready at once (default: 1)")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def row_of(options: argparse.Namespace, name: str) -> Row:
    return tiny(ROWS[name]) if options.tiny else ROWS[name]


def measure(row: Row, place: Place) -> dict[str, Any]:
    """One row, in this process."""
    torch.manual_seed(0)
    module = importlib.import_module(MODULES.get(row.kind, f"routing_{row.kind}"))
    return module.measure(row, place)  # type: ignore[no-any-return]


class Results:
    """The rows that are done, and the file that holds them.

    Raises:
        ResultsError: the file is of another device or of other sizes.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.path, self._writing, made_by = options.out, threading.Lock(), provenance(options.device)
        made_by["command"] = f"python bench/{Path(sys.argv[0]).name}" + " --tiny" * options.tiny  # in several calls
        own = {"device": made_by["device"], "backend": options.backend, "tiny": options.tiny}
        held = json.loads(self.path.read_text()) if self.path.exists() else {**own, "rows": {}}
        for name, value in own.items():
            if held[name] != value:
                raise ResultsError(
                    f"these results are of another {name}",
                    where=str(self.path),
                    expected=str(held[name]),
                    found=str(value),
                    remedy="give another --out",
                )
        constants = {"flops_per_second": FLOPS, "bytes_per_second": BYTES}
        self.rows: dict[str, dict[str, Any]] = held["rows"]
        self.report = made_by | own | {"floors": constants, "rows": self.rows}

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Add a row."""
        with self._writing:
            self.rows[name] = row
            write(self.report, self.path)

    def expected(self, row: Row) -> float:
        """Seconds that a row will take: what rows of its kind took, and some more; its limit, if there are none."""
        alike = [
            done["seconds"]
            for done in list(self.rows.values())  # other threads add to them
            if all(done["settings"][name] == getattr(row, name) for name in ("kind", "layers", "training"))
        ]
        return min(row.limit, 1.3 * max(alike, default=float("inf")))

    def failed(self) -> list[str]:
        """Rows that failed, or a variant of which did."""
        return [name for name, row in self.rows.items() if "failed" in row or row.get("failures")]


def run(results: Results, options: argparse.Namespace, names: Sequence[str]) -> int:
    """Rows until they are done or time is up; the exit status."""
    began = time.perf_counter()

    def one(name: str, turns: list[str]) -> bool:
        """Whether a row is done."""
        row, left = row_of(options, name), options.limit - (time.perf_counter() - began)
        if (wanted := results.expected(row)) > left:
            print(f"{name} may take {wanted:.0f} s and {left:.0f} s are left: run this again", flush=True)
            return False
        given = ["--row", name, "--backend", options.backend, *turns]
        found = in_time(__file__, given, options, row.limit * (2 if turns else 1), left)
        if found is not None:
            results.keep(name, found | {"settings": row.described()})
        print(f"{name}: {'not done, run this again' if found is None else summary(found)}", flush=True)
        return found is not None

    done = side_by_side(one, names, options.jobs)
    return int(any(name in results.failed() for name in selected(options))) if done else 3


def side_by_side(one: Callable[[str, list[str]], bool], names: Sequence[str], jobs: int) -> bool:
    """Whether all rows are done, so many at once; each is told by what options its process takes turns with others."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        turns = ["--turns", str(Path(folder) / "device")] if jobs > 1 else []
        return all(list(pool.map(lambda name: one(name, turns), names)))


def in_time(
    script: str, given: Sequence[str], options: argparse.Namespace, limit: float, left: float
) -> dict[str, Any] | None:
    """A row in a process of its own, with the seconds that it took; None if the call's time was up before its limit."""
    began, seconds = time.perf_counter(), int(min(limit, left))
    given = [*given, "--device", options.device, *(["--tiny"] if options.tiny else [])]
    found = in_a_process(script, given, seconds, fresh=False)
    took = time.perf_counter() - began
    if "failed" in found and seconds < limit and took >= seconds:
        return None
    return found | {"seconds": took - found.pop("waited", 0.0)}


def in_turn(measure: Callable[[Place], dict[str, Any]], options: argparse.Namespace) -> None:
    """Measure a row in this process, as one of those that share the device, and print what was found."""
    with closing(Turns(options.turns)) as turns:
        turns.beside()
        before, turns.waited = turns.waited, 0.0  # what a row has for itself begins now
        found = measure(Place(options.device, options.backend, turns))
        print(json.dumps(found | {"waited": before + turns.waited}))


def summary(row: dict[str, Any]) -> str:
    """A row in a few words."""
    if "times" not in row:
        return next(f"{how}: {row[how]}" for how in ("failed", "skipped") if how in row)
    known = [f"{one['best']} {one['ratio']:.3f} of {one['peer']}" for one in row["asked"] if one["ratio"] is not None]
    return ", ".join([*(known or ["done"]), *(f"{name} failed" for name in row["failures"]), f"{row['seconds']:.0f} s"])


def selected(options: argparse.Namespace) -> list[str]:
    """The names of the rows that are asked for."""
    begins = tuple(one for one in options.only if one not in ROWS)
    return [name for name in ROWS if not options.only or name in options.only or name.startswith(begins)]


def main(given: Sequence[str] | None = None) -> int:
    options = parse_arguments(given)
    if options.row:
        in_turn(partial(measure, row_of(options, options.row)), options)
        return 0
    results = Results(options)
    again = results.failed() if options.retry else []
    remaining = [name for name in selected(options) if name not in results.rows or name in again]
    if options.plan:
        print(*(f"{name}: at most {row_of(options, name).limit} s" for name in remaining), sep="\n")
        return 0
    return run(results, options, remaining)


if __name__ == "__main__":
    sys.exit(main())
