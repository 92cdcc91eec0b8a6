"""Processes of a test, run beside each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_ranks(script: str | Path, ranks: int, folder: Path, limit: int = 300) -> None:
    """Run a script once a rank, with its number and a folder as arguments, until all have ended well.

    Raises:
        AssertionError: one has not; says what it complained of.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, script, str(rank), str(folder)] for rank in range(ranks)]
    workers = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for worker in workers:
            _, complaint = worker.communicate(timeout=limit)
            assert worker.returncode == 0, complaint
    finally:
        for worker in workers:
            worker.kill()  # the others of one that failed
