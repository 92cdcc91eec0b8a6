"""Lazily: a program whose bodies torch.compile compiles when they are first called, with parameters from outside.

It is for programs that run layers on some of the tokens: how many, only the data tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from depthc.codegen.functions import function_of
from depthc.codegen.module import bodies_of
from depthc.codegen.rows import RowsLowering
from depthc.ir.body import Body
from depthc.ir.evaluate import Evaluator
from depthc.ir.program import Program


class LazyProgram:
    """A program of one mode, run with compiled bodies; gradients flow to what it is given.

    Args:
        device: that of its arguments.
        options: of torch.compile.
    """

    def __init__(self, program: Program, device: torch.device, **options: Any) -> None:
        self.program, self.device = program, device
        inner = partial(torch.compile, **options)
        self._functions = {body.certificate: inner(function_of(body)) for body in bodies_of(program)}
        self._rows = RowsLowering(inner)

    def __call__(self, values: Mapping[str, Tensor], param: Callable[[str], Tensor]) -> tuple[Tensor, ...]:
        """The outputs."""
        evaluator = Evaluator(self.program, param, self.device, self.program.modes[0], self._run_body)
        evaluator.run_rows = self._rows
        found = evaluator.run(self.program.body, dict(values), self.program.signature.size_values(values))
        return tuple(found[name] for name in self.program.signature.outputs if isinstance(name, str))

    def _run_body(self, body: Body, inputs: Sequence[Any]) -> Any:
        return self._functions[body.certificate](*inputs)
