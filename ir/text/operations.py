"""Operations in program text: their names, the infix operators, and what their schemas say of their arguments."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from depthc.ir.text.syntax import dotted, fail, is_identifier, name, path_of, string
from depthc.ir.types import Scalar

aten = torch.ops.aten

# Infix operators: (on numbers, on two tensors, on a tensor and a number).
BINARY: dict[type, tuple[Any, Any, Any]] = {
    ast.Add: (operator.add, aten.add.Tensor, aten.add.Tensor),
    ast.Sub: (operator.sub, aten.sub.Tensor, aten.sub.Tensor),
    ast.Mult: (operator.mul, aten.mul.Tensor, aten.mul.Tensor),
    ast.Div: (operator.truediv, aten.div.Tensor, aten.div.Tensor),
    ast.FloorDiv: (operator.floordiv, aten.floor_divide.default, aten.floor_divide.default),
    ast.Mod: (operator.mod, aten.remainder.Tensor, aten.remainder.Scalar),
    ast.Pow: (operator.pow, aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar),
    ast.MatMult: (None, aten.matmul.default, None),
    ast.BitAnd: (operator.and_, aten.__and__.Tensor, aten.__and__.Scalar),
    ast.BitOr: (operator.or_, aten.__or__.Tensor, aten.__or__.Scalar),
    ast.BitXor: (operator.xor, aten.__xor__.Tensor, aten.__xor__.Scalar),
    ast.Eq: (operator.eq, aten.eq.Tensor, aten.eq.Scalar),
    ast.NotEq: (operator.ne, aten.ne.Tensor, aten.ne.Scalar),
    ast.Lt: (operator.lt, aten.lt.Tensor, aten.lt.Scalar),
    ast.LtE: (operator.le, aten.le.Tensor, aten.le.Scalar),
    ast.Gt: (operator.gt, aten.gt.Tensor, aten.gt.Scalar),
    ast.GtE: (operator.ge, aten.ge.Tensor, aten.ge.Scalar),
}
UNARY: dict[type, tuple[Any, Any]] = {
    ast.USub: (operator.neg, aten.neg.default),
    ast.Invert: (None, aten.bitwise_not.default),
}
INFIX: dict[Any, type] = {
    target: symbol
    for table in (BINARY, UNARY)
    for symbol, targets in table.items()
    for target in targets
    if target is not None
}

# Functions on sizes that torch.export writes beside those of `operator`.
NUMBER_FUNCTIONS: dict[str, Any] = {
    **{name: getattr(torch, name) for name in ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "sqrt", "trunc")},
}
# Functions of `operator` that compute numbers; `getitem` takes a member of a sequence.
_NUMBER_OPERATORS = {operator.getitem, *(targets[0] for table in (BINARY, UNARY) for targets in table.values())} | {
    getattr(operator, name) for name in ("truediv", "floordiv", "mod", "pow", "neg", "not_", "and_", "or_", "xor")
}
_NUMBER_NAMES = {function: name for name, function in NUMBER_FUNCTIONS.items()}
_NUMBER_TYPES = {"int", "float", "bool", "number", "SymInt", "Scalar"}


def infix_target(symbol: type, left_is_number: bool, right_is_number: bool) -> Any:
    """What an infix operator means for these operands; None if it has no meaning."""
    on_numbers, on_tensors, on_tensor_and_number = BINARY[symbol]
    if left_is_number:
        return on_numbers if right_is_number else None
    return on_tensor_and_number if right_is_number else on_tensors


def is_number(value: Any) -> bool:
    """Whether an argument is a number (not a tensor): a literal, a size, a constant slot."""
    if not isinstance(value, fx.Node):
        return isinstance(value, int | float)
    if value.op == "placeholder":
        info = value.meta["input"]
        return info.kind == "const" or isinstance(info.type, Scalar) or (info.name == "training" and info.kind == "env")
    if isinstance(value.target, torch._ops.OpOverload):
        results = value.target._schema.returns
        return len(results) == 1 and str(results[0].type) in _NUMBER_TYPES
    return value.target is not operator.getitem


def is_random(target: Any) -> bool:
    """Whether an operation draws random numbers, so that its order matters."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def is_operation(target: Any) -> bool:
    """Whether a body may hold this: an ATen or custom op, or a function on numbers."""
    if isinstance(target, torch._ops.OpOverload):
        return not any(argument.name == "filename" for argument in target._schema.arguments)  # text never opens files
    return target in _NUMBER_NAMES or target in _NUMBER_OPERATORS


def operation_syntax(target: Any) -> ast.expr:
    """The name of an operation: `linear` (aten, default overload), `slice.Tensor`, `prims.iota.default`,
    `operator.mul`, `sym_max`; in the form `op["aten.random.from"]` where a part is a Python keyword."""
    if target in _NUMBER_NAMES:
        return dotted(_NUMBER_NAMES[target])
    if not isinstance(target, torch._ops.OpOverload):
        return dotted(f"operator.{target.__name__}")
    namespace, opname = target._schema.name.split("::")
    parts = [opname, target._overloadname]
    if namespace != "aten":
        parts = [namespace, *parts]
    elif parts[1] == "default" and opname not in _NUMBER_NAMES.values():
        parts = parts[:1]
    if all(map(is_identifier, parts)):
        return dotted(".".join(parts))
    return ast.Subscript(name("op"), string(f"{namespace}.{opname}.{target._overloadname}"))


def read_operation(node: ast.expr) -> Any:
    """The operation that a name denotes."""
    match node:
        case ast.Subscript(value=ast.Name(id="op"), slice=ast.Constant(value=str(text))):
            path = text.split(".")
        case _:
            path = (path_of(node) or "?").split(".")
            if ".".join(path) in NUMBER_FUNCTIONS:
                return NUMBER_FUNCTIONS[".".join(path)]
            if path[0] == "operator" and len(path) == 2:
                path = ["operator", path[1]]
            elif len(path) < 3:
                path = ["aten", *path, "default"][:3]
    target = _lookup(path)
    if target is None:
        text = ".".join(path)
        foreign = path[0] not in ("aten", "operator")
        remedy = f"import the library that defines {path[0]!r} first" if foreign else "correct the name"
        fail(node, f"there is no operation {text!r}", expected="an ATen op", remedy=remedy)
    return target


def _lookup(path: Sequence[str]) -> Any:
    if path[0] == "operator" and len(path) == 2:
        function = vars(operator).get(path[1])
        return function if callable(function) and not isinstance(function, type) else None
    if len(path) != 3 or any(part.startswith("__") and not part.endswith("__") for part in path):
        return None
    namespace = getattr(torch.ops, path[0], None)
    packet = getattr(namespace, path[1], None) if isinstance(namespace, torch._ops._OpNamespace) else None
    overload = getattr(packet, path[2], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    return overload if isinstance(overload, torch._ops.OpOverload) else None


def misfit(target: Any, args: Sequence[Any], keywords: Sequence[str]) -> str:
    """What is wrong with the arguments of an operation by its schema; "" if nothing is."""
    if not isinstance(target, torch._ops.OpOverload):
        return "keywords" if keywords else ""
    parameters = target._schema.arguments
    positional = [p for p in parameters if not p.kwarg_only]
    if len(args) > len(positional):
        return f"{len(args)} positional arguments, at most {len(positional)}"
    given = {p.name for p in positional[: len(args)]}
    for word in keywords:
        if word in given or word not in {p.name for p in parameters}:
            return f"argument {word!r} is {'given twice' if word in given else 'not in the schema'}"
    missing = [p.name for p in parameters if not p.has_default_value() and p.name not in given | set(keywords)]
    return f"argument {missing[0]!r} is missing" if missing else ""
