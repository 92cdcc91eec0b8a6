"""A body as a Python function of PyTorch code: the text of the depth program with its notation spelled out."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._library import custom_ops

from depthc.ir.names import Names
from depthc.ir.text.functions import Function
from depthc.ir.text.operations import NUMBER_FUNCTIONS, read_operation
from depthc.ir.text.print_body import BodyText
from depthc.ir.text.printer import wrap
from depthc.ir.text.syntax import WIDTH, dotted, is_identifier, path_of, slot_syntax, string, type_text, unique
from depthc.ir.types import DTYPES

MODULES = ("torch", "math", "operator", "aten", "END")
_MOST_LISTED = 2  # so many parameters are written out where a function is called


@dataclass(frozen=True)
class PythonFunction:
    """A function of the program as Python.

    Attributes:
        function: what it prints.
        label: its name.
        slots: the name of the constant that lists its parameter slots; "" where a call lists the parameters.
        env: what of `training` and `device` it reads.
        lines: its definition, and that of its slots.
    """

    function: Function
    label: str
    slots: str
    env: tuple[str, ...]
    lines: tuple[str, ...]


def python_function(function: Function, label: str, slots: str, mark: str = "") -> PythonFunction:
    """A function with its name; `slots` is what the list of its slots may be called, `mark` its decorator."""
    text = BodyText(function.body, function.slots, function.results, taken=MODULES)
    spell = _Spelling(function, text.names)
    statements = [_statement(spell.visit(ast.parse(line).body[0])) for line in text.statements]
    env = tuple(i.name for i in function.body.inputs_of("env"))
    listed = len(function.slots) <= _MOST_LISTED
    lines = [] if listed else [*_tuple(slots, function.slots), "", ""]
    lines += [mark] if mark else []
    lines += _header(label, _parameters(text, function, spell), env)
    lines += [f"    {line}" for line in _sizes(text, spell)]
    for statement, source in zip(statements, text.sources, strict=True):
        lines += [f"    # {_shown(source)}"] if source else []
        lines += [f"    {statement}"]
    wrapped = (part for line in lines for part in ([line] if line.lstrip().startswith("#") else wrap(line)))
    return PythonFunction(function, label, "" if listed else slots, env, tuple(wrapped))


def _statement(node: ast.stmt) -> str:
    """A statement; results without brackets around them."""
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and node.value.elts:
        return f"return {', '.join(map(ast.unparse, node.value.elts))}"
    return ast.unparse(node)


def _tuple(name: str, slots: Sequence[str]) -> list[str]:
    return [f"{name} = (", *(f"    {ast.unparse(string(slot))}," for slot in slots), ")"]


def _header(label: str, parameters: Sequence[str], env: Sequence[str]) -> Iterator[str]:
    parts = [*parameters, *(["*", *env] if env else [])]
    short = f"def {label}({', '.join(parts)}):"
    if len(short) <= WIDTH:
        yield short
        return
    yield f"def {label}("
    yield from (f"    {part}," for part in parts)
    yield "):"


def _parameters(text: BodyText, function: Function, spell: _Spelling) -> list[str]:
    """The parameters with their types as notes: values, then parameter slots, then constants."""
    values = [part.partition(": ")[::2] for part in text.parameters]
    infos = [*text.body.inputs_of("param"), *text.body.inputs_of("const")]
    slots = zip((*spell.params, *spell.consts), infos, strict=True)
    typed = [*values, *((spell.slots[slot], type_text(info.type)) for slot, info in slots)]
    return [f"{name}: {ast.unparse(string(type))}" for name, type in typed]


def _sizes(text: BodyText, spell: _Spelling) -> Iterator[str]:
    """The sizes that the function reads, off its inputs."""
    read: dict[str, list[tuple[int, str]]] = {}
    for size in text.sizes:
        if size in spell.read:
            node, dim = text.sizes[size]
            read.setdefault(text.name_of(node), []).append((dim, size))
    for name, found in read.items():
        dims, sizes = zip(*sorted(found), strict=True)
        shape = f"{name}.shape[:{len(dims)}]" if dims == tuple(range(len(dims))) and len(dims) > 1 else ""
        yield f"{', '.join(sizes)} = {shape or ', '.join(f'{name}.shape[{dim}]' for dim in dims)}"


def _shown(source: str) -> str:
    """A source line without the folders of its file."""
    file, colon, rest = source.partition(":")
    line = f"{Path(file).name}{colon}{rest}"
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..."


class _Spelling(ast.NodeTransformer):
    """The notation of program text as plain Python: ops by their full names, slots as arguments, torch's constants."""

    def __init__(self, function: Function, names: Names) -> None:
        self.read: set[str] = set()
        self.slots: dict[str, str] = {}
        self.params = [_key(slot_syntax("w", slot)) for slot in function.slots]
        consts = unique(i.name for i in function.body.inputs_of("const"))
        self.consts = [_key(slot_syntax("c", slot)) for slot in consts]
        for text, slot in (*zip(self.params, function.slots, strict=True), *zip(self.consts, consts, strict=True)):
            self.slots[text] = names.new(slot)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        path = path_of(node.func)
        if path == "slice":  # a literal: the op has an overload in its name
            function: ast.expr = node.func
        elif path in ("torch.complex", "torch.device"):
            function = dotted("complex") if path == "torch.complex" else node.func
        else:
            function = ast.parse(operation_text(read_operation(node.func)), mode="eval").body
        args = [self.visit(a) for a in node.args]
        return ast.Call(function, args, [ast.keyword(k.arg, self.visit(k.value)) for k in node.keywords])

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return self._slot(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        return self._slot(node)

    def _slot(self, node: ast.expr) -> ast.expr:
        slot = self.slots.get(_key(node))
        return ast.Name(slot) if slot is not None else self.generic_visit(node)  # type: ignore[return-value]

    def visit_Name(self, node: ast.Name) -> ast.expr:
        self.read.add(node.id)
        if node.id in DTYPES:
            return dotted(str(DTYPES[node.id]))
        return dotted({"inf": "math.inf", "nan": "math.nan", "end": "END"}.get(node.id, node.id))


def _key(node: ast.expr) -> str:
    """One spelling for equal syntax, whatever its quotes were."""
    return ast.dump(ast.parse(ast.unparse(node), mode="eval"))


def operation_text(target: object) -> str:
    """What calls an operation in Python.

    An overload is named unless the operation has but one.

    Example:
        >>> operation_text(torch.ops.aten.linear.default), operation_text(torch.ops.aten.mean.dim)
        ('aten.linear', 'aten.mean.dim')
    """
    for name, function in NUMBER_FUNCTIONS.items():
        if target is function:
            return name if name.startswith("math.") else f"torch.{name}"
    if not isinstance(target, torch._ops.OpOverload):
        return f"operator.{target.__name__}"  # type: ignore[attr-defined]
    namespace, name = target._schema.name.split("::")
    packet = target.overloadpacket
    parts = [name] if namespace == "aten" and _only(packet.overloads()) else [name, target._overloadname]
    text = "aten" if namespace == "aten" else f"torch.ops.{namespace}"
    for part in parts:
        text = f"{text}.{part}" if is_identifier(part) else f'getattr({text}, "{part}")'
    return text


def _only(overloads: Iterable[str]) -> bool:
    return [name for name in overloads if not name.endswith("out") and "dimname" not in name.lower()] == ["default"]


def libraries(functions: Iterable[Function]) -> list[str]:
    """The modules that define the custom operations of some functions: a program that calls them imports them."""
    targets = {node.target for function in functions for node in function.body.nodes}
    found = {_library(t._schema.name) for t in targets if isinstance(t, torch._ops.OpOverload)}
    return sorted(found - {""})


def _library(name: str) -> str:
    """The module of an operation that `torch.library.custom_op` made; "" of torch's own, and where it is not known."""
    definition = custom_ops.OPDEFS.get(name)
    module = getattr(getattr(definition, "_init_fn", None), "__module__", "")
    return "" if module.split(".")[0] == "torch" else module
