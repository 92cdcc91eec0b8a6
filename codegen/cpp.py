"""Kernels of Inductor in C++: few translation units, compiled while Python goes on.

Inductor starts a C++ compiler for every kernel, and waits for those of one graph before it turns to the next. Most of
that time goes into what each start does anew, such as reading headers. Here several kernels share a call of the
compiler, under Inductor's own options, and one is waited for when it is first called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import copy_context
from math import ceil
from threading import Lock
from typing import Any

from torch._inductor import async_compile
from torch._inductor.async_compile import AsyncCompile, get_compile_threads, kernel_code_log
from torch._inductor.codecache import CppPythonBindingsCodeCache

_LEAST = 4  # kernels in a unit: they take about as long as what each start of the compiler does anew


@contextmanager
def shared_units() -> Iterator[None]:
    """The graphs that Inductor compiles within share translation units, and are ready before their kernels are."""
    found, units = async_compile.AsyncCompile, _Units()

    class Shared(_Shared):
        kernels = units

    if get_compile_threads() > 1:
        async_compile.AsyncCompile = Shared  # type: ignore[misc]
    try:
        yield
    finally:
        async_compile.AsyncCompile = found  # type: ignore[misc]
        units.start()


class _Shared(AsyncCompile):
    """What the module that Inductor writes for a graph asks for its kernels."""

    kernels: _Units

    def cpp_pybinding(self, argtypes: list[str], source_code: str) -> Any:
        kernel_code_log.info("CPP+Bindings Kernel:\n%s", source_code)
        return self.kernels.add(argtypes, source_code)

    def wait(self, scope: dict[str, Any]) -> None:
        for name, value in scope.items():
            if isinstance(value, _Kernel):
                value.place = scope, name
        self.kernels.start(least=_LEAST)
        super().wait(scope)


class _Units:
    """Kernels that are waiting for others to be compiled with."""

    def __init__(self) -> None:
        self._waiting: list[_Kernel] = []
        self._lock = Lock()  # a kernel may be called in another thread than that which compiles

    def add(self, argtypes: Sequence[str], source: str) -> _Kernel:
        with self._lock:
            self._waiting.append(_Kernel(self, _binding(len(self._waiting), argtypes, source)))
            return self._waiting[-1]

    def start(self, least: int = 1) -> None:
        """Compile them in the background: a unit for each processor but that of Python, if there are so many."""
        with self._lock:
            if len(self._waiting) >= least:
                self._start()

    def _start(self) -> None:
        waiting, self._waiting = self._waiting, []
        size = max(_LEAST, ceil(len(waiting) / max(1, get_compile_threads() - 1)))
        for first in range(0, len(waiting), size):
            kernels = waiting[first : first + size]
            context = copy_context()  # it holds Inductor's settings
            built = AsyncCompile.pool().submit(context.run, _build, [kernel.binding for kernel in kernels])
            for kernel in kernels:
                kernel.built = built


class _Kernel:
    """A kernel in the making. It stands in the module of its graph until it is called."""

    place: tuple[dict[str, Any], str]
    built: Future[None] | None = None

    def __init__(self, units: _Units, binding: type[_Binding]) -> None:
        self.units, self.binding = units, binding

    def __call__(self, *args: Any) -> Any:
        if self.built is None:
            self.units.start()
        self.built.result()
        scope, name = self.place
        scope[name] = self.binding.function
        return self.binding.function(*args)


class _Binding(CppPythonBindingsCodeCache):
    """A kernel with the functions that make a Python module of it.

    Attributes:
        text: its C++.
        function: the kernel, once it is compiled.
    """

    text: str
    function: Callable[..., Any]

    @classmethod
    def load_async(cls, main_code: str, *_: Any, **__: Any) -> Any:
        cls.text = main_code


def _binding(number: int, argtypes: Sequence[str], source: str) -> type[_Binding]:
    class Binding(_Binding):
        entry_function = f"kernel{number}"

    Binding.load_pybinding_async(argtypes, source.replace('extern "C"', ""))  # namespaces do not part names of C
    return Binding


def _build(bindings: Sequence[type[_Binding]]) -> None:
    """Compile kernels in one translation unit, each in a namespace of its own."""
    lines = [line for binding in bindings for line in binding.text.splitlines()]
    parts = list(dict.fromkeys(line.strip() for line in lines if line.lstrip().startswith("#include")))
    for binding in bindings:
        own = (line for line in binding.text.splitlines() if not line.lstrip().startswith("#include"))
        parts += [f"namespace in_{binding.entry_function} {{", *own, "}"]

    class Unit(CppPythonBindingsCodeCache):
        entry_function = bindings[0].entry_function

    library = Unit.load_async("\n".join(parts))()
    for binding in bindings:
        module = binding._load_library(library.__file__, library.key)
        binding.function = getattr(module, binding.entry_function)
