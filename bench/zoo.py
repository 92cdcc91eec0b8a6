"""Try the compiler on every architecture of the zoo, one process each, and write the table of the results.

python bench/zoo.py                     all architectures
python bench/zoo.py llama t5 --resume   some, leaving out those that have a row
python bench/zoo.py --checks mor,text   some checks; the others of a row stay as they were
python bench/zoo.py --ci                the twelve of continuous integration; exit status 1 on any failure
python bench/zoo.py --table docs/zoo.md write the table between the markers of a page, from the results
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from architectures import CI, ZOO
from zoo_table import HEADINGS

RESULTS = Path(__file__).parent / "results" / "zoo.json"
LIMIT_SECONDS = 600


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


def load(path: Path) -> dict[str, Any]:
    """The results so far; rows of other library versions are dropped, so that one file says one thing."""
    now = versions()
    if path.exists():
        report = json.loads(path.read_text())
        if report["versions"] == now:
            return report
        print(f"{path} was made with {report['versions']}: starting afresh", file=sys.stderr)
    return {"command": "", "versions": now, "rows": {}}


def save(report: dict[str, Any], path: Path) -> None:
    """Write to a neighbour first: an interrupted run leaves the old results whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(report, indent=1) + "\n")
    fresh.replace(path)


def run_row(name: str, limit: float, only: Sequence[str] = ()) -> dict[str, Any]:
    """Check one architecture in its own process; what a killed or crashed row leaves undone gets that as its reason.

    `only` names the checks, if not all are wanted.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, __file__, name, "--row", str(path), "--checks", ",".join(only)]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            said = child.stderr.strip().splitlines()
            reason = (
                None
                if child.returncode == 0
                else f"the process ended with {child.returncode}: {said[-1] if said else ''}"
            )
        except subprocess.TimeoutExpired:
            reason = f"stopped after {limit:.0f} s"
        checks = json.loads(path.read_text()) if path.exists() else {}
    return describe(name) | {"checks": checks, "stopped": reason, "seconds": round(time.perf_counter() - start, 1)}


def describe(name: str) -> dict[str, Any]:
    entry = ZOO[name]
    return {"kind": entry.kind, "dynamic": entry.dynamic, "held_out": entry.held_out, "refuses": list(entry.refuses)}


def merged(old: dict[str, Any] | None, new: dict[str, Any], only: Sequence[str]) -> dict[str, Any]:
    """A row with the checks of `only` done anew; a capture that was but the way to them counts where it now differs."""
    if not old or not only:
        return new
    status = {name: found["status"] for name, found in old["checks"].items()}
    done = {name: found for name, found in new["checks"].items() if name in only or found["status"] != status.get(name)}
    stopped = new["stopped"] or old["stopped"]
    return new | {"checks": old["checks"] | done, "stopped": stopped, "seconds": old["seconds"]}


def run_rows(
    names: list[str], path: Path, resume: bool, limit: float, jobs: int, only: Sequence[str] = ()
) -> list[str]:
    """Run the rows, saving after each; return the names of those with a failure."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    report = load(path)
    report["command"] = "python bench/zoo.py " + " ".join(sys.argv[1:])
    names = [name for name in names if not (resume and _done(report["rows"].get(name), only))]
    failing = []
    columns = TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("zoo", total=len(names))
        for name, found in finished(names, limit, jobs, only):
            progress.update(task, description=name)
            row = merged(report["rows"].get(name), found, only)
            rows = report["rows"] | {name: row}
            report["rows"] = {known: rows[known] for known in ZOO if known in rows}
            save(report, path)
            if failures(row):
                failing.append(name)
                progress.console.print(f"{name}: " + "; ".join(failures(row)))
            progress.advance(task)
    return failing


def _done(row: dict[str, Any] | None, only: Sequence[str]) -> bool:
    return row is not None and set(only) <= row["checks"].keys()


def finished(names: list[str], limit: float, jobs: int, only: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows as they get done, `jobs` processes at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run_row, name, limit, only): name for name in names}
        for done in as_completed(running):
            yield running[done], done.result()


def failures(row: dict[str, Any]) -> list[str]:
    """Every check of a row that is not as it must be, with its value or reason; expected refusals are not failures."""

    def wrong(name: str, found: dict[str, Any]) -> bool:
        return found["status"] == "failed" or (found["status"] == "refused" and name not in row["refuses"])

    failed = {name: found for name, found in row["checks"].items() if wrong(name, found)}
    texts = [f"{name} {found.get('reason', found.get('value'))}" for name, found in failed.items()]
    return texts + ([row["stopped"]] if row["stopped"] else [])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help="architectures; all when none is given")
    parser.add_argument("--ci", action="store_true", help="the twelve architectures that differ in kind")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results file")
    parser.add_argument("--resume", action="store_true", help="leave out architectures that have a row")
    parser.add_argument("--checks", type=_names, default=[], metavar="A,B", help="these checks alone, and the capture")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for one architecture")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time, one thread each")
    parser.add_argument("--table", type=Path, help="write the table into this Markdown page and stop")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in ZOO]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(ZOO)}")
    if unknown := [check for check in arguments.checks if check not in HEADINGS]:
        parser.error(f"unknown checks: {', '.join(unknown)}; known: {', '.join(HEADINGS)}")
    return arguments


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> int:
    arguments = parse_arguments()
    if arguments.row:
        from zoo_row import write_row

        write_row(arguments.names[0], arguments.row, arguments.checks)
        return 0
    if arguments.table:
        from zoo_table import update_page

        update_page(arguments.table, json.loads(arguments.out.read_text()))
        return 0
    names = arguments.names or (list(CI) if arguments.ci else list(ZOO))
    failing = run_rows(names, arguments.out, arguments.resume, arguments.limit, arguments.jobs, arguments.checks)
    print(f"{len(failing)} rows with a failure" + (": " + ", ".join(failing) if failing else ""))
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
