"""The header and the result of the program text as a signature."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

from torch.utils import _pytree as pytree

from depthc.ir.signature import Leaf, Signature
from depthc.ir.text.syntax import fail, is_value_name, literal, read_size, read_type
from depthc.ir.text.trees import Path, TreeReader, leaf_name
from depthc.ir.text.unfold import Scope, value_name
from depthc.ir.types import Type


def read_signature(
    main: ast.FunctionDef,
    classes: Mapping[str, type],
    sizes: Sequence[ast.Call],
    guards: Sequence[ast.expr],
    result: ast.expr,
) -> Signature:
    """The signature that a program's header, size declarations and return statement describe."""
    reader = TreeReader(classes)
    inputs: list[Leaf] = []
    names, specs = [], []
    parameters = _parameters(main)
    for parameter, annotation in parameters:
        if annotation is not None:
            names.append(parameter.strip("*="))
            specs.append(reader.read(annotation, lambda n, path: inputs.append(_input(n, path)), (names[-1],)))
    outputs: list[str | Leaf] = []
    out_spec = reader.read(result, lambda n, _: outputs.append(_output(n)))
    return Signature(
        tuple(parameter for parameter, _ in parameters),
        tuple(inputs),
        pytree.TreeSpec(dict, names, specs),
        tuple(outputs),
        out_spec,
        dict(_range(node) for call in sizes for node in call.args),
        tuple(str(read_size(guard)) for guard in guards),
    )


def _parameters(main: ast.FunctionDef) -> list[tuple[str, ast.expr | None]]:
    arguments = main.args
    if arguments.defaults or any(arguments.kw_defaults) or arguments.posonlyargs:
        fail(main, "a default value cannot stand here", expected="use_cache: False", found=main.name)
    found = [(a.arg, a.annotation) for a in arguments.args]
    found += [(f"*{a.arg}", a.annotation) for a in (arguments.vararg,) if a]
    found += [(f"{a.arg}=", a.annotation) for a in arguments.kwonlyargs]
    return found + [(f"**{a.arg}", a.annotation) for a in (arguments.kwarg,) if a]


def _named(node: ast.expr) -> tuple[str | None, ast.expr]:
    """(name, content) of `leaf("name", content)`; the name is None where it is the usual one."""
    match node:
        case ast.Call(func=ast.Name(id="leaf"), args=[ast.Constant(value=str(name)), content], keywords=[]):
            return name, content
    return None, node


def _input(node: ast.expr, path: Path) -> Leaf:
    name, content = _named(node)
    name = leaf_name(path) if name is None else name
    if isinstance(content, ast.Subscript):
        type = read_type(content)
        return Leaf(name, type if isinstance(type, Type) else None)
    return Leaf(name, None, literal(content))


def _output(node: ast.expr) -> str | Leaf:
    name, content = _named(node)
    if name is not None:
        return Leaf(name, None, literal(content))
    match content:
        case ast.Name(id=text) if is_value_name(text):
            return value_name(content, Scope())
        case ast.Subscript():
            return value_name(content, Scope())
    return Leaf("", None, literal(content))


def _range(node: ast.expr) -> tuple[str, tuple[int, int | None]]:
    """`2 <= s` or `2 <= s <= 64`."""
    match node:
        case ast.Compare(left=low, ops=[ast.LtE()], comparators=[ast.Name(id=size)]):
            return size, (_bound(low), None)
        case ast.Compare(left=low, ops=[ast.LtE(), ast.LtE()], comparators=[ast.Name(id=size), high]):
            return size, (_bound(low), _bound(high))
    fail(node, "this is not the range of a size", expected="2 <= s or 2 <= s <= 64")


def _bound(node: ast.expr) -> int:
    value = literal(node)
    if type(value) is not int:
        fail(node, "this is not a bound", expected="an integer")
    return value
