"""Kernels under Triton's interpreter: every file of tests/interpreted and tests/kernels, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDERS = ("interpreted", "kernels")
FILES = [file for folder in FOLDERS for file in sorted((Path(__file__).parent / folder).glob("test_*.py"))]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path) -> None:
    if file.parent.name == "kernels" and torch.cuda.is_available():
        pytest.skip("runs on the GPU, without the interpreter")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow", str(file)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=file.parents[2], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
