"""Functions: bodies and graphs as Python functions that torch.compile counts apart."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import FunctionType
from typing import Any

from torch import fx, nn

from depthc.ir.body import Body

_NUMBERS = count()


def function_of(body: Body) -> Callable[..., Any]:
    """A body as one Python function of its inputs."""
    run = fx.GraphModule(nn.Module(), body.graph).forward

    def function(*inputs: Any) -> Any:
        return run(*inputs)

    return with_own_code(function)


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object, and a name, of its own.

    Dynamo keeps what it compiled by code object, and gives up after a few entries: closures made by one `def` would
    fill each other's share, and a model of many bodies would silently run uncompiled. And it keeps sizes by file, line
    and name: those in which two closures differ would be symbols in both, and their kernels slower.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_NUMBERS)}")
    return FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
