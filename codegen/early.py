"""Early: what Inductor does once a process before its first C++ kernel, begun while Dynamo traces.

A tracing Python leaves all other processors idle, and most of a small model's compile is this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import copy_context
from functools import cache, partial
from threading import Event, Thread
from typing import Any

from torch._inductor import cpu_vec_isa
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.cpu_vec_isa import valid_vec_isa_list


@cache
def start_early() -> None:
    """Find out in the background which vector instructions compiler and processor share, and compile the headers.

    Until the first is known, whoever else asks waits: two that find out at once would spoil each other's flags.
    """
    known = Event()

    def wait() -> Any:
        known.wait()
        return valid_vec_isa_list()

    def find_out() -> None:
        try:
            valid_vec_isa_list()
        finally:
            cpu_vec_isa.valid_vec_isa_list = valid_vec_isa_list
            known.set()

    cpu_vec_isa.valid_vec_isa_list = wait  # type: ignore[assignment]
    _thread(find_out).start()
    _thread(partial(CppPythonBindingsCodeCache.load_async, "")).start()


def _thread(function: Callable[[], Any]) -> Thread:
    """A thread that does no harm: where a function fails, it fails again for whoever needs its result."""

    def run() -> None:
        try:
            function()
        except Exception:
            logging.getLogger("depthc").debug("an early start failed", exc_info=True)

    return Thread(target=copy_context().run, args=(run,), daemon=True)  # the context holds Inductor's settings
