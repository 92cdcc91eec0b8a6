"""Functions that torch.compile counts apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from depthc.codegen.functions import with_own_code


def scaled(by: float) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        return x * by

    return with_own_code(function)


@pytest.mark.slow
def test_sizes_of_one_are_no_symbols_in_another() -> None:
    """Two functions of one `def`, each with sizes of its own."""
    torch.compiler.reset()
    found: list[Any] = []

    def backend(graph: fx.GraphModule, _: Any) -> fx.GraphModule:
        inputs = [n.meta["example_value"] for n in graph.graph.nodes if n.op == "placeholder"]
        found.extend(size for x in inputs if isinstance(x, Tensor) for size in x.shape)
        return graph

    for size in (3, 5, 7):
        torch.testing.assert_close(
            torch.compile(scaled(2.0), backend=backend)(torch.ones(size)), torch.full((size,), 2.0)
        )
    assert found == [3, 5, 7]
    assert all(type(size) is int for size in found)
