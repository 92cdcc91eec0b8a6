"""Programs in MLIR: the depth dialect on torch-mlir, and the modules that programs become.

Importing this package needs no torch-mlir; every function in it does, and says so with an `MlirError`.
"""

from __future__ import annotations

from typing import Any

from depthc.ir.mlir.context import new_context, parse_module, verify_module
from depthc.ir.program import Program

__all__ = ["module_of", "new_context", "parse_module", "verify_module"]


def module_of(program: Program, context: Any = None) -> Any:
    """The module of a program in memory, verified: a `torch_mlir.ir.Module`.

    Args:
        program: any program; its weights are not read, so they may be on the meta device.
        context: of `new_context`; a new one by default.

    Raises:
        MlirError: torch-mlir is not installed, the program is for training only, or an op has no MLIR form (names the
            op, the body and the line of the model's source).

    Example:
        >>> import torch, depthc
        >>> from depthc.ir.mlir import module_of
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> module = module_of(depthc.capture(model, (torch.ones(2, 5, 4),)))
        >>> [op.operation.name for op in module.body.operations][-3:]
        ['depth.param', 'func.func', 'func.func']
    """
    from depthc.ir.mlir.emit import emit

    return emit(program, context)
