"""Passes: a module of torch functions down to LLVM, with the passes that torch-mlir's wheel has."""

from __future__ import annotations

from typing import Any

from depthc.ir.errors import MlirError
from depthc.ir.mlir.context import diagnostics
from depthc.ir.mlir.types import TensorType

PREFIX = "depth."  # of the functions that are made of bodies
TO_TORCH_BACKEND = (
    "func.func(torch-match-quantized-custom-ops)",
    "torchdynamo-export-to-torch-backend-pipeline{extra-library=}",
)
TO_LINALG = ("torch-backend-to-linalg-on-tensors-backend-pipeline",)
TO_LLVM = (
    "func.func(refback-generalize-tensor-pad)",
    "func.func(refback-generalize-tensor-concat)",
    "func.func(tm-tensor-bufferize)",
    # Every op writes into a buffer of its own, so weights and arguments are never written to.
    "one-shot-bufferize{copy-before-write bufferize-function-boundaries "
    "function-boundary-type-conversion=identity-layout-map}",
    "refback-mlprogram-bufferize",
    "buffer-deallocation-pipeline",
    "func.func(tm-tensor-to-loops)",
    "func.func(refback-munge-memref-copy)",
    "func.func(convert-linalg-to-loops)",
    "func.func(lower-affine)",
    "convert-scf-to-cf",
    "func.func(refback-expand-ops-for-llvm)",
    "func.func(arith-expand)",
    "func.func(convert-math-to-llvm)",
    "convert-math-to-libm",
    "expand-strided-metadata",
    "lower-affine",
    "convert-bufferization-to-memref",
    "finalize-memref-to-llvm",
    "func.func(convert-arith-to-llvm)",
    "convert-func-to-llvm",
    "convert-cf-to-llvm",
    "convert-complex-to-llvm",
    "reconcile-unrealized-casts",
)


def run_passes(module: Any, passes: tuple[str, ...], what: str) -> None:
    """Run passes over a module, in place.

    Raises:
        MlirError: one of them fails; names the op and the line of the model's source.
    """
    from torch_mlir import ir
    from torch_mlir.passmanager import PassManager

    bodies = _bodies(module)
    try:
        PassManager.parse(f"builtin.module({','.join(passes)})").run(module.operation)
    except ir.MLIRError as error:
        places = dict.fromkeys(str(d.location) for d in error.error_diagnostics)
        raise MlirError(
            f"torch-mlir cannot lower this program to {what}",
            where=", ".join(f"body {bodies.get(place, '?')!r} {place}" for place in places),
            found=diagnostics(error),
            remedy="evaluate the program, or write this part of the model with other ops",
        ) from error


def _bodies(module: Any) -> dict[str, str]:
    """The function that is made of a line of the model's source, by the line."""
    from torch_mlir import ir

    found: dict[str, str] = {}
    for function in module.body.operations:

        def visit(op: Any, name: str = function.operation.attributes["sym_name"].value) -> Any:
            found.setdefault(str(op.location), name.removeprefix(PREFIX))
            return ir.WalkResult.ADVANCE

        function.operation.walk(visit)
    return found


def to_linalg(module: Any) -> None:
    """Functions of the torch dialect as linalg ops on builtin tensors.

    Raises:
        MlirError: an op has no way there.
    """
    run_passes(module, TO_TORCH_BACKEND, "torch-mlir's backend contract")
    _replace_views(module)
    run_passes(module, TO_LINALG, "linalg")


def to_llvm(module: Any) -> None:
    """Functions on builtin tensors as LLVM functions on buffers; results are buffers that the caller owns.

    Raises:
        MlirError: an op has no way there.
    """
    run_passes(module, TO_LLVM, "LLVM")


def _replace_views(module: Any) -> None:
    """Every view as `tensor.reshape`, which does what its sizes say.

    torch-mlir matches the dimensions before and after a view itself. Where two unknown sizes become one, as in
    [b, s, 16] -> [b * s, 16], it takes one of them for 1, and reads beside the data.
    """
    from torch_mlir import ir

    found: list[Any] = []

    def visit(op: Any) -> Any:
        if op.name == "torch.aten.view":
            found.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for op in found:
        with ir.InsertionPoint(op), op.location:
            _replace_view(op)


def _replace_view(op: Any) -> None:
    from torch_mlir import ir

    source, sizes = op.operands
    old, new = TensorType.read(source.type), TensorType.read(op.results[0].type)
    list_op = sizes.owner
    if old is None or new is None or getattr(list_op, "name", "") != "torch.prim.ListConstruct":
        return
    integer = ir.IntegerType.get_signless(64)

    def made(name: str, operands: list[Any], result: Any) -> Any:
        return ir.Operation.create(name, operands=operands, results=[result]).result

    given = made("torch_c.to_builtin_tensor", [source], ir.Type.parse(old.builtin))
    numbers = [made("torch_c.to_i64", [size], integer) for size in list_op.operands]
    shape = made("tensor.from_elements", numbers, ir.RankedTensorType.get([len(numbers)], integer))
    reshaped = made("tensor.reshape", [given, shape], ir.Type.parse(new.builtin))
    op.results[0].replace_all_uses_with(made("torch_c.from_builtin_tensor", [reshaped], op.results[0].type))
    op.erase()
