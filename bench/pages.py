"""Tables of the pages, made from bench/results/: `python bench/pages.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from pages_compositions import compositions
from pages_decode import decode
from pages_routing import routing
from pages_training import training
from tables import Report, markdown, origin

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"


def cold(report: Report) -> str:
    """Seconds of the first compiled step, with the ratio to torch.compile of the model itself."""
    plain = next(row for row in report["rows"] if row["recipe"] == "model")
    rows = []
    for row in report["rows"]:
        if "failed" in row:
            rows.append([f"{row['recipe']}, {row['door']}", row["failed"], *[""] * 5])
            continue
        seconds = [f"{row['first']:.1f}", f"{plain['first'] / row['first']:.1f}x"]
        steps = [f"{1000 * row[name]:.1f}" for name in ("second", "eager")]
        rows.append([f"{row['recipe']}, {row['door']}", str(row["graphs"]), *seconds, *steps, f"{row['error']:.0e}"])
    head = ["module, door", "graphs", "first step, s", "faster", "later step, ms", "eager step, ms", "relative error"]
    return f"{origin(report)} {report['layers']} layers, backend {report['backend']}.\n\n{markdown(head, rows)}"


def agreement(report: Report) -> str:
    """Relative errors of the routed module, beside those of the model that it was made of."""
    rows = [
        [f"{kv}, {dtype}", f"{found['routed']:.1e}", f"{found['model']:.1e}", f"{found['routed'] / found['model']:.2f}"]
        for kv, case in report["cases"].items()
        for dtype, found in case.items()
    ]
    return f"{origin(report)}\n\n{markdown(['keys, precision', 'mor', 'the model', 'ratio'], rows)}"


def backend(report: Report) -> str:
    """The first compiled step through both backends, and how far both are from eager."""
    plain = [row for row in report["rows"] if row["backend"] == "inductor"]
    rows = []
    for number, row in enumerate(report["rows"]):
        other = plain[number // 2]
        ratios = [f"{other[name] / row[name]:.1f}x" for name in ("first", "cpu")]
        seconds = [f"{row['first']:.1f}", ratios[0], f"{row['cpu']:.1f}", ratios[1]]
        steps = [f"{1000 * row[name]:.0f}" for name in ("later", "eager")]
        rows.append([row["backend"], *seconds, *steps, f"{row['error']:.0e}"])
    head = ["backend", "first step, s", "faster", "processor, s", "less", "later step, ms", "eager step, ms", "error"]
    models = [
        [row["model"], str(row["layers"])]
        + [f"{row[name][what]:.0e}" for what in ("outputs", "gradients") for name in ("depthc", "inductor")]
        for row in report["models"]
    ]
    kinds = ["model", "layers", "outputs", "by Inductor alone", "gradients", "by Inductor alone"]
    text = f"{origin(report)} {report['layers']} layers; the rows ran one after the other.\n\n{markdown(head, rows)}"
    return f"{text}\n\nThe largest errors against eager, of gradients relative:\n\n{markdown(kinds, models)}"


TABLES: dict[str, dict[str, Callable[[Report], str]]] = {
    "measured.md": {"cold": cold, "agreement": agreement},
    "training.md": {"training": training},
    "doors.md": {"backend": backend},
    "kernels.md": {"routing": routing},
    "composition.md": {"compositions": compositions},
    "stagger.md": {"decode": decode, "staggered": training},
}


def replaced(page: str, name: str, text: str) -> str:
    """A page with what is between the markers of `name` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}"


def current(page: str) -> str:
    """A page as its results have it; where there are none yet, it stays as it is."""
    text = (DOCS / page).read_text()
    for name, table in TABLES[page].items():
        if (RESULTS / f"{name}.json").exists():
            text = replaced(text, name, table(json.loads((RESULTS / f"{name}.json").read_text())))
    return text


if __name__ == "__main__":
    for page in TABLES:
        (DOCS / page).write_text(current(page))
    sys.exit()
