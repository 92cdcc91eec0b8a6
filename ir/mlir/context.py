"""Contexts: where MLIR modules with depth ops live, and the one place that asks whether torch-mlir is there."""

from __future__ import annotations

import importlib
from typing import Any

from depthc.ir.errors import MlirError


def require() -> None:
    """Check that torch-mlir can be imported.

    Raises:
        MlirError: it cannot.
    """
    try:
        importlib.import_module("torch_mlir.ir")
    except ImportError as error:
        raise MlirError(
            "torch-mlir is not installed",
            expected="the package torch-mlir, which has wheels for Linux x86-64",
            found=str(error),
            remedy="pip install torch-mlir",
        ) from error


def new_context() -> Any:
    """A `torch_mlir.ir.Context` with the torch and depth dialects, and all that lowering them needs."""
    require()
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.passmanager import PassManager

    from depthc.ir.mlir.dialect import Depth

    context = ir.Context()
    torch_dialect.register_dialect(context)
    context.load_all_available_dialects()
    with context, ir.Location.unknown():
        # Some dialects are registered by no call; a pass loads those that it makes ops of.
        passes = "builtin.module(torch-backend-to-linalg-on-tensors-backend-pipeline)"
        PassManager.parse(passes).run(ir.Module.create().operation)
        Depth.load()
    return context


def parse_module(text: str, context: Any = None) -> Any:
    """The module that a text says, verified.

    Raises:
        MlirError: the text cannot be read, or breaks a rule of the dialect; names the op.
    """
    context = context or new_context()
    from torch_mlir import ir

    try:
        return ir.Module.parse(text, context)
    except ir.MLIRError as error:
        raise MlirError("this is not a module of depth ops", found=diagnostics(error)) from error


def verify_module(module: Any) -> None:
    """Check a module in memory by the rules of its dialects.

    Raises:
        MlirError: the first rule that is broken; names the op.
    """
    from torch_mlir import ir

    try:
        module.operation.verify()
    except ir.MLIRError as error:
        raise MlirError("the module breaks a rule of its dialects", found=diagnostics(error)) from error


def diagnostics(error: Any) -> str:
    """What MLIR says is wrong, one line a diagnostic."""
    return "\n".join(f"{d.message} ({d.location})" for d in error.error_diagnostics) or str(error)
