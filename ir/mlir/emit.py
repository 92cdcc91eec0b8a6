"""Emission: a program as a module of depth ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from depthc.ir.errors import MlirError
from depthc.ir.liveness import read_first, writes_of
from depthc.ir.mlir.context import new_context, verify_module
from depthc.ir.mlir.functions import Functions
from depthc.ir.mlir.trace import Sizes
from depthc.ir.mlir.types import ROW_DIMS, TensorType, tuple_text, type_text
from depthc.ir.names import Names
from depthc.ir.params import Param
from depthc.ir.program import Call, Kv, Loop, Merge, On, Op, Program, Segment, Select, Stack, Tap
from depthc.ir.regions import row_names
from depthc.ir.signature import Signature
from depthc.ir.text.functions import Function, collect, function_key
from depthc.ir.text.printer import expr_text, range_text

Values = dict[str, Any]


def emit(program: Program, context: Any = None) -> Any:
    """The verified module of a program, in memory.

    Raises:
        MlirError: torch-mlir is not installed, the program is for training only, or an op has no MLIR form.
    """
    if False not in program.modes:
        raise MlirError("the program was captured in train mode only", remedy="capture it in eval mode")
    context = context or new_context()
    from torch_mlir import ir

    with context, ir.Location.unknown():
        module = ir.Module.create()
        Emitter(program, module).emit()
    verify_module(module)
    return module


def labels_of(program: Program) -> tuple[str, dict[tuple[str, Any], Function]]:
    """The name of a program's public function, and its bodies with those of the private ones (`label`)."""
    names = Names()
    entry = names.new(program.name)
    return entry, collect(program, names.taken)


class Emitter:
    """Writes the ops of a program into a module."""

    def __init__(self, program: Program, module: Any) -> None:
        from torch_mlir import ir

        self.ir, self.program, self.module = ir, program, module
        self.entry, self.bodies = labels_of(program)
        self.results: dict[str, list[Any]] = {}
        self.inside = False  # of an `on` region

    def emit(self) -> None:
        """Parameters, bodies, then the program itself."""
        with self.ir.InsertionPoint(self.module.body):
            for name, param in self.program.params.items():
                self._param(name, param)
        signature = self.program.signature
        functions = Functions(self.module, Sizes.of(signature))
        for function in self.bodies.values():
            made = functions.add_body(function.body, function.label)
            self.results[function.label] = list(made.attributes["function_type"].value.results)
        with self.ir.InsertionPoint(self.module.body):
            self._main(signature)

    def _param(self, name: str, param: Param) -> None:
        attributes = {"sym_name": name, "type": self.ir.Type.parse(type_text(param.type)), "kind": param.kind}
        self.op("param", attributes=attributes | ({"expr": expr_text(param.expr)} if param.expr else {}))

    def _main(self, signature: Signature) -> None:
        from torch_mlir.dialects import func

        leaves = [leaf for leaf in signature.inputs if leaf.type is not None]
        types = [self.ir.Type.parse(type_text(leaf.type)) for leaf in leaves]  # type: ignore[arg-type]
        main = func.FuncOp(self.entry, (types, []))
        values: Values = dict(zip((leaf.name for leaf in leaves), main.add_entry_block().arguments, strict=True))
        outputs = [name for name in signature.outputs if isinstance(name, str)]
        with self.ir.InsertionPoint(main.entry_block):
            items = self.program.body
            for number, item in enumerate(items):
                after = {*outputs, *_read(items[number + 1 :])}
                self._stack(item, values, after) if isinstance(item, Stack) else self.ops((item,), values, after)
            returned = [values[name] for name in outputs]
            func.ReturnOp(returned)
        results = [value.type for value in returned]
        main.attributes["function_type"] = self.ir.TypeAttr.get(self.ir.FunctionType.get(types, results))
        main.attributes["arg_attrs"] = self.attribute(
            [{"depth.name": f.name, "depth.type": str(f.type)} for f in leaves]
        )
        if outputs:
            main.attributes["res_attrs"] = self.attribute([{"depth.name": name} for name in outputs])
        main.attributes["depth.sizes"] = self.attribute([*_conditions(signature)])

    # ops

    def pack(self, values: Sequence[Any]) -> list[Any]:
        """Values as an op takes them: several as one tuple."""
        if len(values) < 2:
            return list(values)
        type = self.ir.Type.parse(tuple_text([value.type for value in values]))
        return [self.ir.Operation.create("torch.prim.TupleConstruct", operands=list(values), results=[type]).result]

    def unpack(self, results: Sequence[Any], types: Sequence[Any]) -> list[Any]:
        """The values of an op's result."""
        if len(types) < 2:
            return list(results)
        unpacked = self.ir.Operation.create("torch.prim.TupleUnpack", operands=list(results), results=list(types))
        return list(unpacked.results)

    def op(
        self,
        name: str,
        operands: Sequence[Any] = (),
        results: Sequence[Any] = (),
        attributes: Mapping[str, Any] | None = None,
        regions: int = 0,
    ) -> Any:
        """A depth op; Python values become attributes, and None is left out."""
        if len(results) > 1:
            results = [self.ir.Type.parse(tuple_text(results))]
        made = {key: self.attribute(value) for key, value in (attributes or {}).items() if value is not None}
        return self.ir.Operation.create(
            f"depth.{name}", operands=list(operands), results=list(results), attributes=made, regions=regions
        )

    def attribute(self, value: Any) -> Any:
        """A Python value as an attribute."""
        ir = self.ir
        match value:
            case str():
                return ir.StringAttr.get(value)
            case bool():
                return ir.BoolAttr.get(value)
            case float():
                return ir.FloatAttr.get_f64(value)
            case ir.Type():
                return ir.TypeAttr.get(value)
            case list() | tuple():
                return ir.ArrayAttr.get([self.attribute(v) for v in value])
            case dict():
                return ir.DictAttr.get({k: self.attribute(v) for k, v in value.items()})
        return value

    def ops(self, ops: Sequence[Op], values: Values, after: set[str]) -> None:
        """Ops in order; `after` are the names that are read behind them."""
        for number, op in enumerate(ops):
            match op:
                case Segment() | Call():
                    self._apply(op, values)
                case Loop():
                    self._loop(op, values, after | set(read_first(ops[number + 1 :])))
                case Select():
                    self._select(op, values)
                case On():
                    self._on(op, values)
                case Merge():
                    self._merge(op, values)
                case Tap(name=name, read=read):
                    self.op("tap", [values[read]], attributes={"label": name})

    def _apply(self, op: Segment | Call, values: Values) -> None:
        callee = self.bodies[function_key(op)].label
        attributes: dict[str, Any] = {"callee": self.ir.FlatSymbolRefAttr.get(callee), "params": op.params}
        if isinstance(op, Call):
            attributes |= {"consts": [float(c) for c in op.consts] or None, "grad": op.grad, "layer": op.layer or None}
            attributes["kv"] = [_plan(plan) for plan in op.kv] or None
        elif op.precise:
            attributes["precise"] = self.ir.UnitAttr.get()
        kind = "call" if isinstance(op, Call) else "segment"
        results = [self._loosened(type) for type in self.results[callee]]
        made = self.op(kind, self.pack([values[name] for name in op.reads]), results, attributes)
        values.update(zip(op.writes, self.unpack(made.results, results), strict=True))

    def _loosened(self, type: Any) -> Any:
        """The type of a value in a region: rows of a set are as many as the set has."""
        tensor = TensorType.read(type) if self.inside else None
        return type if tensor is None else self.ir.Type.parse(str(tensor.loosened(ROW_DIMS)))

    def _region(
        self,
        kind: str,
        operands: Sequence[Any],
        arguments: Sequence[Any],
        fill: Callable[[list[Any]], list[Any]],
        attributes: Mapping[str, Any],
        more: int = 0,
    ) -> list[Any]:
        """An op with a region, and its results: what the region yields, except for the last `more` values.

        The region is filled before the op is made, since its types are those of the results.
        """
        home = self.ir.Operation.create("builtin.module", regions=1)
        block = home.regions[0].blocks.append(*arguments)
        with self.ir.InsertionPoint(block):
            yielded = fill(list(block.arguments))
            self.op("yield", self.pack(yielded))
        results = [value.type for value in yielded[: len(yielded) - more]]
        made = self.op(kind, operands, results, attributes, regions=1)
        block.append_to(made.regions[0])
        home.erase()
        return self.unpack(made.results, results)

    def _stack(self, stack: Stack, values: Values, after: set[str]) -> None:
        names = sorted(set().union(*map(writes_of, stack.ops)) & after)

        def fill(arguments: list[Any]) -> list[Any]:
            inner = dict(values)
            self.ops(stack.ops, inner, after)
            return [inner[name] for name in names]

        values.update(zip(names, self._region("stack", (), (), fill, {"label": stack.name}), strict=True))

    def _loop(self, op: Loop, values: Values, after: set[str]) -> None:
        writes, until = set().union(*map(writes_of, op.body)), [op.until] if op.until else []
        carried = [name for name in dict.fromkeys([*read_first(op.body), *until]) if name in writes & values.keys()]
        names = [*carried, *sorted((writes & after) - {*carried})]
        inits = [values[name] for name in carried]

        def fill(arguments: list[Any]) -> list[Any]:
            inner = values | dict(zip(carried, arguments, strict=True))
            self.ops(op.body, inner, after | {*carried})
            return [inner[name] for name in (*names, *until)]

        attributes = {"index": op.index, "count": str(op.count), "until": self.ir.UnitAttr.get() if until else None}
        types = [value.type for value in inits]
        values.update(
            zip(names, self._region("loop", self.pack(inits), types, fill, attributes, len(until)), strict=True)
        )

    def _select(self, op: Select, values: Values) -> None:
        names = (op.score, op.judge, op.among, op.of, op.within)
        segments = self.ir.DenseI32ArrayAttr.get([int(name is not None) for name in names])
        attributes = {"rule": op.rule, "inference": op.inference, "operandSegmentSizes": segments}
        operands = [values[name] for name in names if name is not None]
        tokens = TensorType.read(operands[0].type)
        assert tokens is not None, "verify asks for a score or candidates"
        type = self.ir.Type.parse(str(TensorType(tokens.shape[:2], "i1")))
        values[op.write] = self.op("select", operands, [type], attributes).results[0]

    def _on(self, op: On, values: Values) -> None:
        rows = row_names(op, self.program.blocks)
        reads = [values[name] for name in op.reads]
        gathered = [name in rows for name in op.reads]

        def fill(arguments: list[Any]) -> list[Any]:
            inner = dict(zip(op.reads, arguments, strict=True))
            self.ops(op.body, inner, set(op.writes))
            return [inner[name] for name in op.writes]

        self.inside = True
        types = [self._loosened(v.type) if g else v.type for v, g in zip(reads, gathered, strict=True)]
        results = self._region("on", [values[op.tokens], *self.pack(reads)], types, fill, {"gathered": gathered})
        self.inside = False
        values.update(zip(op.writes, results, strict=True))

    def _merge(self, op: Merge, values: Values) -> None:
        if op.over is not None:
            raise MlirError(
                f"the rows of {op.tokens!r} go to all tokens of {op.over!r}, and MLIR has no op for that",
                where=f"merge of {op.write}",
                expected="a merge into the tokens whose rows they are",
                found=f"over={op.over}",
                remedy="evaluate the program, or compile it as a module",
            )
        operands = [values[name] for name in (op.read, op.value, op.tokens)]
        operands += self.pack([values[name] for name in op.extra])
        attributes: dict[str, Any] = {}
        if op.combine is not None:
            callee = self.bodies[function_key(op)].label
            attributes = {"combine": self.ir.FlatSymbolRefAttr.get(callee), "params": op.params}
        values[op.write] = self.op("merge", operands, [operands[0].type], attributes).results[0]


def _read(items: Sequence[Segment | Stack]) -> tuple[str, ...]:
    """The names that segments and stacks read from before them."""
    return read_first([op for item in items for op in (item.ops if isinstance(item, Stack) else (item,))])


def _plan(plan: Kv) -> str:
    return f"{plan.mode} {plan.slot}".strip()


def _conditions(signature: Signature) -> Iterator[str]:
    """The legal sizes."""
    yield from (range_text(name, *span) for name, span in signature.ranges.items())
    yield from signature.guards
