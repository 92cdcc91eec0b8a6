"""C++ kernels of Inductor in shared units: the same numbers, and fewer calls of the compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import CppCompileError
from torch._inductor.utils import fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx

import depthc.codegen.cpp
from depthc.codegen.cpp import shared_units

pytestmark = pytest.mark.slow
Function = Callable[[Tensor], Tensor]
x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def fresh(tmp_path: Any) -> Iterator[None]:
    with fresh_cache(dir=str(tmp_path)), config.patch(compile_threads=2):
        yield


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many kernels each unit has."""
    found: list[int] = []
    build = depthc.codegen.cpp._build

    def counted(bindings: Any) -> None:
        found.append(len(bindings))
        build(bindings)

    monkeypatch.setattr(depthc.codegen.cpp, "_build", counted)
    return found


def kernels(count: int, scale: float) -> Function:
    """A function of as many kernels: a product of matrices parts one from the next."""

    def run(x: Tensor) -> Tensor:
        for number in range(count):
            x = (x * (scale + number)).sin() * 0.1 @ x
        return x

    return run


def compiled(function: Function) -> Function:
    return compile_fx(make_fx(function)(x), [x])  # type: ignore[no-any-return]


def test_graphs_share_a_unit(built: list[int]) -> None:
    """Those of few kernels; a kernel that two graphs have is there twice, and a graph of many has its own unit."""
    functions = [kernels(1, 2.0), kernels(1, 2.0), kernels(2, 0.5), kernels(5, 0.25), kernels(1, 3.0)]
    with shared_units():
        found = [compiled(function) for function in functions]
    for function, ours in zip(functions, found, strict=True):
        torch.testing.assert_close(ours(x), function(x))
    assert sorted(built) == [1, 4, 5]


def test_many_processors_share_the_kernels(built: list[int]) -> None:
    with config.patch(compile_threads=4), shared_units():
        found = compiled(kernels(12, 0.25))
    torch.testing.assert_close(found(x), kernels(12, 0.25)(x))
    assert built == [4, 4, 4]


def test_a_kernel_that_is_called_early(built: list[int]) -> None:
    """Inductor may run what it has just compiled, before the others are."""
    with shared_units():
        first = compiled(kernels(1, 2.0))
        torch.testing.assert_close(first(x), kernels(1, 2.0)(x))
        second = compiled(kernels(1, 3.0))
    torch.testing.assert_close(second(x), kernels(1, 3.0)(x))
    assert built == [1, 1]


def test_what_does_not_compile_is_an_error_where_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthc.codegen.cpp._Binding, "load_async", classmethod(_broken))
    with shared_units():
        found = compiled(kernels(1, 2.0))
    with pytest.raises(CppCompileError):
        found(x)


def _broken(cls: Any, main_code: str, *_: Any, **__: Any) -> None:
    cls.text = main_code + "}"
