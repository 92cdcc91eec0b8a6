"""Capture: from any `nn.Module` to a verified depth program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from depthc.ir.errors import InputError
from depthc.ir.graph.trace import trace
from depthc.ir.outline.assemble import assemble
from depthc.ir.outline.outline import outline
from depthc.ir.program import Program
from depthc.ir.verify import verify


def capture(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Program:
    """Capture a model as a depth program: its layers found by structure, its weights referred to by name.

    Args:
        model: any module; on any device, the meta device included; in any floating dtype.
        args: example arguments of its forward. Sizes above 1 stay dynamic where the model allows it.
        kwargs: example keyword arguments.

    Returns:
        A program that computes what the model computes as exported, bit for bit, in the modes that it says.

    Raises:
        InputError: arguments that its forward does not take.
        CaptureError: data-dependent control flow, side effects, arguments that are not data.
        OutlineError: no layer repeats.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> depthc.capture(model, (torch.ones(2, 5, 4),)).depths
        (3,)
    """
    if not isinstance(args, tuple | list):
        raise InputError(
            "the example arguments are not a tuple",
            expected="args=(tensor, ...)",
            found=type(args).__name__,
            remedy="write (x,) for one argument",
        )
    traced = trace(model, tuple(args), dict(kwargs or {}))
    program = assemble(traced, outline(traced))
    verify(program)
    return program
