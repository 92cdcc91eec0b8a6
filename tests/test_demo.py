"""The main job, in short: it must run on any text, agree with itself and leave its pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.limit(240)
def test_demo_trains_compares_and_draws(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and the dog sat on the cat.\n" * 2000)
    command = [sys.executable, "examples/train_mor.py", "--seconds", "2", "--text", text, "--out", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {name: re.search(rf"│ {name} +│(.*)│", done.stdout) for name in ("original", "tied", "mor")}
    numbers = {name: [cell.replace(",", "").strip() for cell in row[1].split("│")] for name, row in rows.items() if row}
    parameters, cost, steps, _, _, bits, topk = (
        dict(zip(numbers, column, strict=True)) for column in zip(*numbers.values(), strict=True)
    )
    assert int(parameters["mor"]) - int(parameters["tied"]) == 3 * 96  # the routers
    assert int(cost["mor"]) < int(cost["tied"]) == int(cost["original"])
    spent = {name: int(steps[name]) * int(cost[name]) for name in steps}
    rounding = 0.51 * (int(cost["mor"]) + int(cost["original"]))  # to whole steps, on both sides
    assert spent["mor"] == pytest.approx(spent["original"], abs=rounding)
    assert all(0 < float(b) < 8 for b in bits.values())
    assert float(topk["mor"]) > 0
    assert "token by token as all at once: yes" in done.stdout
    assert (tmp_path / "depth.html").stat().st_size > 1000
    assert (tmp_path / "depth.png").stat().st_size > 1000
