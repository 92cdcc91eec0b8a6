"""Tests of kernels under Triton's interpreter, on the CPU.

Triton reads TRITON_INTERPRET when it is imported, and torch.compile imports it too. So these files are collected only
where the variable is set: `tests/test_kernels.py` runs each in a process of its own, and so can you:

    TRITON_INTERPRET=1 .venv/bin/python -m pytest tests/interpreted
"""

import os
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What `torch.empty` gives is NaN, so that reading what was not written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
