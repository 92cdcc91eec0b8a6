"""Native code: a program compiled through MLIR and LLVM for the CPU, and called on torch tensors."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from depthc.codegen.mlir.buffers import Results, descriptor
from depthc.codegen.mlir.lower import ENTRY, Lowered, lower
from depthc.codegen.mlir.passes import to_llvm
from depthc.ir.errors import MlirError
from depthc.ir.evaluate import WeightParams
from depthc.ir.mlir import module_of
from depthc.ir.mlir.types import dtype_of
from depthc.ir.program import Program


def native(program: Program, optimize: int = 2) -> Native:
    """A program as native code: func, scf and torch ops, then linalg, then LLVM, compiled in this process.

    Args:
        program: with its weights, on the CPU.
        optimize: LLVM's level, from 0 (compiles fast) to 3 (runs fast).

    Raises:
        MlirError: torch-mlir is not installed, or an op has no native form; says which and where.

    Example:
        >>> import torch, depthc
        >>> from depthc.codegen.mlir.native import native
        >>> model, x = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)]), torch.ones(2, 5, 4)
        >>> run = native(depthc.capture(model, (x,)))
        >>> bool(torch.allclose(run(x), model(x), atol=1e-6))
        True
    """
    return Native(program, lower(program, module_of(program)), optimize)


class Native:
    """A compiled program. It takes the model's arguments, on the CPU, and returns what the model returns.

    The weights are those that the program has when it is compiled; nothing is differentiable.
    """

    def __init__(self, program: Program, lowered: Lowered, optimize: int) -> None:
        from torch_mlir.execution_engine import ExecutionEngine

        self.signature, param = program.signature, WeightParams(program)
        self._params = [param(name).detach().contiguous() for name in lowered.params]
        if any(p.device.type != "cpu" for p in self._params):
            raise MlirError("native code runs on the CPU", found="weights on another device", remedy="move them")
        with lowered.module.context:
            to_llvm(lowered.module)
            self._engine = ExecutionEngine(lowered.module, opt_level=optimize)
        self._call = self._engine.lookup(ENTRY)
        self._fixed = [descriptor(p) for p in self._params]
        self._outputs = [name for name in self.signature.outputs if isinstance(name, str)]
        self._types = [(len(type.shape), dtype_of(type.dtype)) for type in lowered.results]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it.

        Raises:
            InputError: arguments that the program does not take.
            MlirError: arguments on another device than the CPU.
        """
        tensors = self.signature.flatten(args, kwargs)
        if any(t.device.type != "cpu" for t in tensors.values()):
            raise MlirError("native code runs on the CPU", found="arguments on another device", remedy="move them")
        given = [t.detach().contiguous() for t in tensors.values()]
        found = self._run(given)
        return self.signature.unflatten(dict(zip(self._outputs, found, strict=True)))

    def _run(self, given: list[Tensor]) -> list[Tensor]:
        results = Results(self._types)
        pointers = [ctypes.pointer(d) for d in (*map(descriptor, given), *self._fixed)]
        if self._types:
            pointers.insert(0, ctypes.pointer(results.room))
        packed = (ctypes.c_void_p * len(pointers))()
        for number, pointer in enumerate(pointers):
            packed[number] = ctypes.cast(ctypes.pointer(pointer), ctypes.c_void_p)
        self._call(ctypes.cast(packed, ctypes.c_void_p))
        return results.tensors([*given, *self._params])
