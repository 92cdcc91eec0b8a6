"""Kernels under Triton's interpreter: every file of tests/kernels, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = sorted((Path(__file__).parent / "kernels").glob("test_*.py"))
LONG = ("test_routing", "test_shared_attention")  # each in a process of its own
GROUPS = [*([file] for file in FILES if file.stem in LONG), [file for file in FILES if file.stem not in LONG]]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, without the interpreter"),
]


@pytest.mark.slow
@pytest.mark.parametrize("files", GROUPS, ids=lambda files: files[0].stem)
def test_interpreted(files: list[Path]) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-m", "not thorough"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=files[0].parents[2], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
