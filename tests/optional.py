"""What is not installed everywhere, and how tests that need it are skipped."""

from importlib.util import find_spec

import pytest

TORCH_MLIR = find_spec("torch_mlir") is not None
REASON = "needs torch-mlir"
needs_torch_mlir = pytest.mark.skipif(not TORCH_MLIR, reason=REASON)


def rest_needs_torch_mlir() -> None:
    """Skip what follows in a test; what it has checked so far needs no torch-mlir."""
    if not TORCH_MLIR:
        pytest.skip(REASON)
