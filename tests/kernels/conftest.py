"""Settings for the tests of kernels: what an op leaves unwritten shows."""

from collections.abc import Generator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned() -> Generator[None, None, None]:
    """Memory that torch hands out is NaN, or the largest integer, until it is written."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
