"""Early: what Inductor does once a process before its first C++ kernel, begun while Dynamo traces.

A tracing Python leaves all other processors idle, and most of a small model's compile is this.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import cache, partial
from threading import Thread
from typing import Any

from torch._inductor import cpu_vec_isa
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.cpu_vec_isa import valid_vec_isa_list


@cache
def start_early() -> None:
    """Find out in the background which vector instructions compiler and processor share, and compile the headers."""
    first = _thread(valid_vec_isa_list)

    def known() -> Any:
        first.join()  # two threads that find out at once would spoil each other's flags
        return valid_vec_isa_list()

    cpu_vec_isa.valid_vec_isa_list = known  # type: ignore[assignment]
    first.start()
    _thread(partial(CppPythonBindingsCodeCache.load_async, "")).start()


def _thread(function: Callable[[], Any]) -> Thread:
    """A thread that does no harm: where a function fails, it fails again for whoever needs its result."""

    def run() -> None:
        with suppress(Exception):
            function()

    return Thread(target=copy_context().run, args=(run,), daemon=True)  # the context holds Inductor's settings
