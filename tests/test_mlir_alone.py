"""MLIR without torch-mlir: what is refused before it is needed, and the sizes at which bodies are traced."""

import sys
from dataclasses import replace
from typing import Any

import pytest

import depthc
from depthc.ir import sizes
from depthc.ir.errors import MlirError
from depthc.ir.mlir.trace import Sizes

from .texts import GOLDEN


def test_torch_mlir_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {"torch_mlir", *(name for name in sys.modules if name.startswith("torch_mlir."))}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MlirError, match="torch-mlir is not installed"):
        depthc.parse(GOLDEN).mlir()


def test_programs_for_training_alone_are_refused() -> None:
    with pytest.raises(MlirError, match="train mode only"):
        replace(depthc.parse(GOLDEN), modes=(True,)).mlir()


@pytest.mark.parametrize(
    ("ranges", "guards"),
    [
        ((), ()),
        ((("s", (2, 64)),), ()),
        ((), ("s % 12 == 0", "t % 7 != 0")),
        ((), ("s == 128 + -1 * max(0, 128 + -1 * s)",)),
        ((), ("s // 8 * (t // 8) == 16", "16 % (s // 8) == 0", "s > t")),
        ((("s", (32, 39)),), ("s // 8 != 1", "1 + s // 8 * (s // 8) == 17")),
    ],
)
def test_bodies_are_traced_at_legal_sizes(ranges: Any, guards: tuple[str, ...]) -> None:
    found = Sizes(ranges, guards).hints(["s", "t"])
    assert all(sizes.evaluate(guard, found) for guard in guards)
    assert all(low <= found[name] <= high for name, (low, high) in ranges)
    assert len(set(found.values())) == 2
