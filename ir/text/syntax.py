"""What the printer and the parser of program text share: names, literals, types, declarations.

The text is a subset of Python that is read with `ast` and never executed. Both directions of every notation stand
next to each other here, as functions between values and `ast` nodes.
"""

from __future__ import annotations

import ast
import cmath
import json
import keyword
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import fx

from depthc.ir import sizes
from depthc.ir.errors import ParseError
from depthc.ir.types import DTYPE_NAMES, DTYPES, Scalar, Type, ValueType

VERSION = 1
HEADER = "# depthc program"
WIDTH = 110
END = 2**63 - 1  # what export writes for the open end of a slice

_CONSTANT_TYPES = (torch.dtype, torch.layout, torch.memory_format)
RESERVED = frozenset({"w", "c", "v", "op", "device", "training", "inf", "nan", "end", "torch", "operator", "math"})
STATEMENTS = frozenset(
    {"loop", "range", "stack", "on", "select", "merge", "tap", "sizes", "registered", "leaf", "tree"}
    | {"block", "segment", "glue", "training", "fresh", "store", "read", "update"}
    | {"ref", "mean", "init", "svd_left", "svd_right"}
)


def fail(node: ast.AST, what: str, *, expected: str = "", found: str = "", remedy: str = "") -> NoReturn:
    """Raise the ParseError of a place in the text."""
    where = f"line {getattr(node, 'lineno', 1)}, column {getattr(node, 'col_offset', 0) + 1}"
    found = found or (ast.unparse(node)[:80] if isinstance(node, ast.expr | ast.stmt) else "")
    raise ParseError(what, where=where, expected=expected, found=found, remedy=remedy or "write it as the printer does")


# small builders of syntax


def name(identifier: str) -> ast.Name:
    """A name as syntax."""
    return ast.Name(identifier)


def dotted(path: str) -> ast.expr:
    """`a.b.c` as syntax."""
    first, *rest = path.split(".")
    node: ast.expr = name(first)
    for part in rest:
        node = ast.Attribute(node, part)
    return node


def path_of(node: ast.expr) -> str | None:
    """The text of `a.b.c`, or None if the syntax is not a dotted path."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = path_of(node.value)
        return None if inner is None else f"{inner}.{node.attr}"
    return None


def call(
    function: ast.expr | str, args: Sequence[ast.expr], keywords: Mapping[str, ast.expr] | None = None
) -> ast.Call:
    """A call as syntax."""
    function = name(function) if isinstance(function, str) else function
    return ast.Call(function, list(args), [ast.keyword(k, v) for k, v in (keywords or {}).items()])


class _Quoted(str):
    """Text that unparses in double quotes."""

    def __repr__(self) -> str:
        return json.dumps(str(self), ensure_ascii=False)


def string(text: str) -> ast.Constant:
    """A string as syntax."""
    return ast.Constant(_Quoted(text))


def is_identifier(text: str) -> bool:
    """Whether a text can stand as a name."""
    return text.isidentifier() and text.isascii() and not keyword.iskeyword(text)


def is_value_name(text: str) -> bool:
    """Whether a value's name can stand as it is; others are written `v["past.0"]`."""
    return is_identifier(text) and text not in _NAMED


# literals


def literal_syntax(value: Any) -> ast.expr:
    """A constant argument as syntax.

    Raises:
        ValueError: a value that has no notation.

    Example:
        >>> ast.unparse(literal_syntax((torch.float32, -1, None, float("inf"))))
        '(f32, -1, None, inf)'
    """
    match value:
        case None | bool():
            return ast.Constant(value)
        case str():
            return string(value)
        case int() | float():
            return _number_syntax(value)
        case complex():
            return call(dotted("torch.complex"), [_number_syntax(value.real), _number_syntax(value.imag)])
        case torch.dtype() if value in DTYPE_NAMES:
            return name(DTYPE_NAMES[value])
        case torch.dtype() | torch.layout() | torch.memory_format():
            return dotted(str(value))
        case torch.device():
            return call(dotted("torch.device"), [string(str(value))])
        case list():
            return ast.List([literal_syntax(v) for v in value])
        case tuple():
            return ast.Tuple([literal_syntax(v) for v in value])
        case dict():
            return ast.Dict([literal_syntax(k) for k in value], [literal_syntax(v) for v in value.values()])
    raise ValueError(f"{value!r} has no notation in program text")


def _number_syntax(value: int | float) -> ast.expr:
    if value == END and isinstance(value, int):
        return name("end")
    if value < 0 or (isinstance(value, float) and math.copysign(1.0, value) < 0):
        return ast.UnaryOp(ast.USub(), _number_syntax(-value))
    if isinstance(value, float) and not cmath.isfinite(value):
        return name("inf" if value > 0 else "nan")
    return ast.Constant(value)


_NAMED = {"inf": math.inf, "nan": math.nan, "end": END, **DTYPES}


def literal(node: ast.expr) -> Any:
    """The constant that a piece of syntax denotes.

    Raises:
        ParseError: syntax that is not a literal.
    """
    match node:
        case ast.Constant(value=value) if value is None or isinstance(value, bool | int | float | str):
            return value
        case ast.Name(id=text) if text in _NAMED:
            return _NAMED[text]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = literal(operand)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return -value
        case ast.List(elts=items):
            return [literal(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(literal(item) for item in items)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {literal(k): literal(v) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.Attribute(value=ast.Name(id="torch"), attr=attribute):
            value = vars(torch).get(attribute)
            if isinstance(value, _CONSTANT_TYPES):
                return value
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=function), args=args, keywords=[]):
            return _torch_constant(node, function, [literal(a) for a in args])
    fail(node, "this is not a constant", expected="a number, a string, None, a dtype, or a list or tuple of these")


def _torch_constant(node: ast.expr, function: str, args: list[Any]) -> Any:
    try:
        if function == "complex" and len(args) == 2:
            return complex(*args)
        if function == "device" and len(args) == 1:
            return torch.device(*args)
    except (TypeError, ValueError, RuntimeError):
        pass
    fail(node, "this is not a constant", expected='torch.complex(0.0, 1.0) or torch.device("cpu")')


# types


def type_syntax(type: ValueType | None) -> ast.expr:
    """A type as syntax: `f32[b, s, 64]`, `f32[()]` for a tensor without dimensions, `int`, None."""
    if type is None:
        return ast.Constant(None)
    if isinstance(type, Scalar):
        return name(type.name)
    dims = [size_syntax(size) for size in type.shape]
    return ast.Subscript(literal_syntax(type.dtype), dims[0] if len(dims) == 1 else ast.Tuple(dims))


def type_text(type: ValueType | None) -> str:
    """A type as text."""
    return ast.unparse(type_syntax(type))


def read_type(node: ast.expr) -> ValueType | None:
    """The type that a piece of syntax denotes."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Name(id="int" | "float" | "bool" as text):
            return Scalar(text)
        case ast.Subscript(value=dtype, slice=dims):
            found = literal(dtype)
            if isinstance(found, torch.dtype):
                items = dims.elts if isinstance(dims, ast.Tuple) else [dims]
                return Type(found, tuple(read_size(item) for item in items))
    fail(node, "this is not a type", expected="a type such as f32[b, s, 64], int or float")


def size_syntax(size: sizes.Size) -> ast.expr:
    """A size as syntax; quoted where its spelling is not the usual one."""
    if isinstance(size, int):
        return _number_syntax(size)
    tree = sizes.read(size)
    return tree if ast.unparse(tree) == size else string(size)


def read_size(node: ast.expr) -> sizes.Size:
    """The size that a piece of syntax denotes."""
    if isinstance(node, ast.Name) and node.id == "end":
        return END
    quoted = isinstance(node, ast.Constant) and isinstance(node.value, str)
    text = str(node.value) if quoted else ast.unparse(node)  # type: ignore[attr-defined]
    try:
        tree = sizes.read(text)
    except (ValueError, SyntaxError):
        fail(node, "this is not a size", expected="integer arithmetic over size names")
    plain = ast.literal_eval(tree) if not sizes.names(tree) and isinstance(tree, ast.Constant | ast.UnaryOp) else None
    return plain if type(plain) is int and not quoted else text


# what a body's function declares


def size_sources(values: Iterable[fx.Node]) -> dict[str, tuple[fx.Node, int]]:
    """Where a body reads a size name: the first of its value inputs that has it as a dimension of its own."""
    sources: dict[str, tuple[fx.Node, int]] = {}
    for node in values:
        type = node.meta["input"].type
        for dim, size in enumerate(type.shape if isinstance(type, Type) else ()):
            if isinstance(size, str) and is_value_name(size) and size not in RESERVED:
                sources.setdefault(size, (node, dim))
    return sources


def slot_syntax(letter: str, slot: str) -> ast.expr:
    """A parameter or constant slot: `w.norm.weight`, or `w["experts.0.w1"]` where a part is no identifier."""
    if slot and all(map(is_identifier, slot.split("."))):
        return dotted(f"{letter}.{slot}")
    return ast.Subscript(name(letter), string(slot))


def unique(names: Iterable[str]) -> list[str]:
    """Names with a number behind those that are taken."""
    found: list[str] = []
    for wish in names:
        slot, count = wish or "slot", 1
        while slot in found:
            slot, count = f"{wish}_{count}", count + 1
        found.append(slot)
    return found
