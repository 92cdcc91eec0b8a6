"""Lowering: the depth ops of a module as functions, calls and structured loops on builtin tensors.

A call becomes a `func.call`, with the parameters that it binds as operands: every parameter that is read is an
argument of the entry function. A loop whose body reads its index (in the name of a parameter, in a rule) is unrolled,
since a name is not a value; any other becomes an `scf.for` over the carried tensors. Stacks dissolve; taps, which no
output needs, are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from depthc.codegen.mlir.passes import PREFIX, to_linalg
from depthc.codegen.mlir.routed import Routed
from depthc.ir import sizes
from depthc.ir.errors import MlirError
from depthc.ir.evaluate import indexed
from depthc.ir.mlir.context import verify_module
from depthc.ir.mlir.emit import labels_of
from depthc.ir.mlir.rules import count_of, texts
from depthc.ir.mlir.types import TensorType, parts
from depthc.ir.program import Program

ENTRY = "main"
_SCALARS = {"!torch.int": "i64", "!torch.float": "f64", "!torch.bool": "i1"}

Indices = dict[str, int]


@dataclass(frozen=True, eq=False)
class Lowered:
    """A module of functions on builtin tensors.

    Attributes:
        module: in memory; its entry function is `ENTRY`.
        params: the parameters that the entry takes after the program's inputs, in order.
        results: the types of what it returns.
    """

    module: Any
    params: tuple[str, ...]
    results: tuple[TensorType, ...]


def lower(program: Program, module: Any) -> Lowered:
    """The linalg form of a program's module, which is left as it is.

    Raises:
        MlirError: an op has no native form; says which and where.
    """
    from torch_mlir import ir

    with module.context, ir.Location.unknown():
        return Lowering(program, module).lower()


def builtin(type: Any) -> str:
    """A type of the torch dialect as it is after it."""
    tensor = TensorType.read(type)
    return tensor.builtin if tensor else _SCALARS[str(type)]


class Scope:
    """The values of a region by those of the depth module: one each, or several for a tuple."""

    def __init__(self, values: dict[Any, list[Any]], rows: dict[Any, tuple[Any, Any]]) -> None:
        self.values, self.rows = values, rows

    def inner(self) -> Scope:
        """The same values; what is added to it is not seen outside."""
        return Scope(dict(self.values), dict(self.rows))

    def read(self, operands: Sequence[Any]) -> list[Any]:
        """The values of operands, tuples taken apart."""
        return [value for operand in operands for value in self.values[operand]]


class Lowering:
    """Walks the ops of a module's public function and writes the entry function."""

    def __init__(self, program: Program, module: Any) -> None:
        from torch_mlir import ir

        self.ir, self.program = ir, program
        ops = [op.operation for op in module.body.operations]
        self.declared = {op.attributes["sym_name"].value: op for op in ops if op.name == "depth.param"}
        self.functions = {op.attributes["sym_name"].value: op for op in ops if op.name == "func.func"}
        self.main = self.functions.pop(
            next(n for n, f in self.functions.items() if "sym_visibility" not in f.attributes)
        )
        bodies = labels_of(program)[1]
        self.blocks = {f.label: program.blocks[f.name] for f in bodies.values() if f.kind == "block"}
        self.target, self.params = ir.Module.create(), dict[str, Any]()
        self.entry: Any = None  # the function that is written
        self.routed = Routed(self)

    def lower(self) -> Lowered:
        """The bodies in linalg, and the entry that calls them."""
        from torch_mlir.dialects import func

        type = self.main.attributes["function_type"].value
        inputs, outputs = type.inputs, type.results
        results = [TensorType.read(type) for type in outputs]
        if None in results:
            raise MlirError("an output is a number", expected="tensors as outputs", remedy="evaluate the program")
        for name, function in self.functions.items():
            self.target.body.append(function.clone())
            self.functions[name] = list(self.target.body.operations)[-1].operation
            self.publish(self.functions[name])
        home = self.ir.Module.create()
        with self.ir.InsertionPoint(home.body):
            self.entry = func.FuncOp(ENTRY, ([self.type(t) for t in inputs], [self.type(t) for t in outputs]))
        block = self.entry.add_entry_block()
        arguments = self.main.regions[0].blocks[0].arguments
        scope = Scope({a: [b] for a, b in zip(arguments, block.arguments, strict=True)}, {})
        with self.ir.InsertionPoint(block):
            returned = self.block(self.main.regions[0].blocks[0], scope, {})
            func.ReturnOp(self.cast(returned, outputs))
        types = self.ir.FunctionType.get([a.type for a in block.arguments], [self.type(t) for t in outputs])
        self.entry.attributes["function_type"] = self.ir.TypeAttr.get(types)
        self.entry.attributes["llvm.emit_c_interface"] = self.ir.UnitAttr.get()
        to_linalg(self.target)
        self.target.body.append(self.entry.operation.detach_from_parent())
        verify_module(self.target)
        return Lowered(self.target, tuple(self.params), tuple(r for r in results if r))

    def publish(self, function: Any) -> None:
        """Let a function stand alone: passes drop private ones before their call is there.

        Its name gets a prefix, so that no body is taken for the entry, or for a function of the C library.
        """
        del function.attributes["sym_visibility"]
        name = function.attributes["sym_name"].value
        function.attributes["sym_name"] = self.ir.StringAttr.get(f"{PREFIX}{name}")

    # values

    def type(self, type: Any) -> Any:
        """A type of the torch dialect as the one after it."""
        return self.ir.Type.parse(builtin(type))

    def cast(self, values: Sequence[Any], types: Sequence[Any]) -> list[Any]:
        """Values as other types say that they are: with more or fewer sizes known."""
        wanted = [self.type(type) for type in types]
        return [v if v.type == t else self.op("tensor.cast", [v], t) for v, t in zip(values, wanted, strict=True)]

    def op(self, name: str, operands: Sequence[Any], result: Any, attributes: Any = None) -> Any:
        """An op with one result."""
        made = self.ir.Operation.create(name, operands=list(operands), results=[result], attributes=attributes or {})
        return made.result

    def param(self, text: str, indices: Indices) -> Any:
        """A parameter as an argument of the entry."""
        name = indexed(text, indices)
        if name not in self.params:
            type = self.type(self.declared[name].attributes["type"].value)
            self.params[name] = self.entry.entry_block.add_argument(type, self.ir.Location.unknown())
        return self.params[name]

    def call(self, function: Any, operands: Sequence[Any]) -> list[Any]:
        """A call of a function of the target, from operands of fitting types."""
        type = function.attributes["function_type"].value
        name = self.ir.FlatSymbolRefAttr.get(function.attributes["sym_name"].value)
        results = [self.type(t) for t in type.results]
        made = self.ir.Operation.create(
            "func.call", operands=self.cast(operands, type.inputs), results=results, attributes={"callee": name}
        )
        return list(made.results)

    # ops

    def block(self, block: Any, scope: Scope, indices: Indices) -> list[Any]:
        """The ops of a block in order; what its last one hands out."""
        *ops, last = [op.operation for op in block.operations]
        for op in ops:
            self.one(op, scope, indices)
        return scope.read(last.operands)

    def one(self, op: Any, scope: Scope, indices: Indices) -> None:
        """One op; its results are added to the scope."""
        match op.name:
            case "torch.prim.TupleConstruct":
                scope.values[op.results[0]] = scope.read(op.operands)
            case "torch.prim.TupleUnpack":
                scope.values |= {r: [v] for r, v in zip(op.results, scope.read(op.operands), strict=True)}
            case "depth.stack":
                self.bind(op, self.block(op.regions[0].blocks[0], scope.inner(), indices), scope)
            case "depth.call" | "depth.segment":
                self.bind(op, self.apply(op, scope, indices), scope)
            case "depth.loop":
                self.bind(op, self.loop(op, scope, indices), scope)
            case "depth.select":
                self.bind(op, self.routed.select(op, scope, indices), scope)
            case "depth.on":
                self.bind(op, self.routed.on(op, scope, indices), scope)
            case "depth.merge":
                self.bind(op, self.routed.merge(op, scope, indices), scope)
            case "depth.tap":
                pass
            case name:
                raise MlirError(f"the op {name} has no native form", where=str(op.location))

    def bind(self, op: Any, values: list[Any], scope: Scope) -> None:
        """The values of an op's result, if it has one."""
        scope.values |= dict.fromkeys(op.results, values)

    def apply(self, op: Any, scope: Scope, indices: Indices) -> list[Any]:
        """A call or segment on all tokens."""
        self.refuse_plans(op)
        params = [self.param(text, indices) for text in texts(op, "params")]
        function = self.functions[op.attributes["callee"].value]
        return self.call(function, [*scope.read(op.operands), *params, *self.consts(op)])

    def refuse_plans(self, op: Any) -> None:
        """Check that a call makes its keys and values itself."""
        if any(plan != "fresh" for plan in texts(op, "kv")):
            raise no_native(op, "calls whose keys and values follow a plan", ", ".join(texts(op, "kv")))

    def consts(self, op: Any) -> list[Any]:
        """The constants that a call binds."""
        f64 = self.ir.F64Type.get()
        numbers = [n.value for n in op.attributes["consts"]] if "consts" in op.attributes else []
        return [self.op("arith.constant", [], f64, {"value": self.ir.FloatAttr.get(f64, n)}) for n in numbers]

    def loop(self, op: Any, scope: Scope, indices: Indices) -> list[Any]:
        """A loop: unrolled where its body reads the index, else an `scf.for`."""
        if "until" in op.attributes:
            raise no_native(op, "loops that end by the data", "until")
        try:
            count = sizes.evaluate(count_of(op), indices)
        except KeyError:
            raise no_native(op, "loops whose count is a size", op.attributes["count"].value) from None
        index, body = op.attributes["index"].value, op.regions[0].blocks[0]
        carried, found = scope.read(op.operands), list[Any]()
        if count > 1 and len(op.results) and not _reads(body, index) and len(body.arguments) == _width(op):
            return self.repeated(body, carried, count, scope, {**indices, index: 0})
        for number in range(count):
            inner = scope.inner()
            inner.values |= {a: [v] for a, v in zip(body.arguments, carried, strict=True)}
            found = self.block(body, inner, {**indices, index: number})
            carried = found[: len(carried)]
        return found or carried

    def repeated(self, body: Any, carried: list[Any], count: int, scope: Scope, indices: Indices) -> list[Any]:
        """The iterations of a loop that are all alike, as an `scf.for`."""
        from torch_mlir.dialects import arith, scf

        types = [argument.type for argument in body.arguments]
        number = self.ir.IndexType.get()
        bounds = [arith.ConstantOp(number, value).result for value in (0, count, 1)]
        made = scf.ForOp(*bounds, self.cast(carried, types))
        with self.ir.InsertionPoint(made.body):
            inner = scope.inner()
            inner.values |= {a: [v] for a, v in zip(body.arguments, made.inner_iter_args, strict=True)}
            scf.YieldOp(self.cast(self.block(body, inner, indices), types))
        return list(made.results)


def _width(op: Any) -> int:
    """How many values an iteration yields; several travel as one tuple."""
    *_, last = op.regions[0].blocks[0].operations
    return sum(len(parts(value.type)) for value in last.operands)


def _reads(block: Any, index: str) -> bool:
    """Whether an op below names a loop index in what it binds, selects or repeats."""
    return any(re.search(rf"\b{index}\b", text) for op in _below(block) for text in _expressions(op))


def _below(block: Any) -> Iterator[Any]:
    for op in block.operations:
        yield op.operation
        for region in op.operation.regions:
            for inner in region.blocks:
                yield from _below(inner)


def _expressions(op: Any) -> Iterator[str]:
    """The texts of an op that are read over the loop indices."""
    for text in (*texts(op, "params"), *texts(op, "kv")):
        yield from re.findall(r"\{([^}]*)\}", text)
    yield from (op.attributes[name].value for name in ("rule", "inference", "count") if name in op.attributes)


def no_native(op: Any, what: str, found: str) -> MlirError:
    """The error of an op that stays in the depth dialect."""
    layer = op.attributes["layer"].value if "layer" in op.attributes else ""
    return MlirError(
        f"{what} have no native form",
        where=f"{op.name}{f' of layer {layer!r}' if layer else ''}",
        found=found,
        remedy="evaluate the program, or lower it to a module",
    )
