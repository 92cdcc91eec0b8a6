"""What a result was measured on, and results as JSON files."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def provenance(device: str) -> dict[str, Any]:
    """The command, the device and the versions, as every result holds them."""
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "command": " ".join(["python", "bench/" + Path(sys.argv[0]).name, *_options()]),
        "device": name,
        "versions": versions | {"python": platform.python_version()},
    }


def _options() -> list[str]:
    """The options of the command, without the place where its results go."""
    given = sys.argv[1:]
    return given[: given.index("--out")] + given[given.index("--out") + 2 :] if "--out" in given else given


def save(report: dict[str, Any], path: Path | None) -> None:
    """Print a report, and write it if there is a path."""
    text = json.dumps(report, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n")


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report, to a neighbour first: whoever is interrupted leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    new.replace(path)


def _message(printed: str) -> str:
    """What an error says, of what a process printed; its last lines may be advice."""
    lines = printed.strip().splitlines() or ["no message"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]*Error", line)), lines[-1])


def in_a_process(script: str, arguments: list[str], limit: int, fresh: bool = True) -> dict[str, Any]:
    """What a script prints as JSON in its last line, run in a process of its own; `failed` says why there is nothing.

    Args:
        limit: seconds.
        fresh: whether it finds no compiler cache.
    """
    with tempfile.TemporaryDirectory() as cache:
        empty = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache + "/triton"}
        empty |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        empty |= {"TMPDIR": cache}  # where Inductor keeps compiled headers, whatever its own variables say
        environment = os.environ | (empty if fresh else {})
        command = [sys.executable, script, *arguments]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {limit} s"}
    if done.returncode:
        return {"failed": _message(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
