"""Tests of kernels on CUDA, or on the CPU under Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and torch.compile imports it too. So without a GPU these files are
collected only where the variable is set: `tests/test_kernels.py` runs each in a process of its own, and so can you:

    TRITON_INTERPRET=1 .venv/bin/python -m pytest tests/kernels
"""

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What `torch.empty` gives is NaN, or the largest integer, so that reading what was not written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
