"""A Python function back as a block: traced with symbolic sizes, then in the canonical form of captured graphs."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx

from depthc.codegen.rows import Example, traced
from depthc.ir.body import Body, Input, InputKind
from depthc.ir.errors import DepthError, InputError
from depthc.ir.graph.canonical import canonicalize
from depthc.ir.graph.size_nodes import SizeNames
from depthc.ir.program import Block
from depthc.ir.sizes import evaluate
from depthc.ir.text.syntax import read_type
from depthc.ir.types import Scalar, Type, ValueType


@dataclass(frozen=True)
class Signature:
    """The arguments of a block's function.

    Attributes:
        types: of its positional arguments: values, parameters, constants.
        names: of them.
        values, carries, consts: how many of them are values, carries, and constants.
        env: its keyword-only arguments.
    """

    names: tuple[str, ...]
    types: tuple[ValueType, ...]
    values: int
    carries: int
    consts: int
    env: tuple[str, ...]

    @classmethod
    def of(cls, function: Callable[..., Any], values: int, carries: int) -> Signature:
        """The signature of a function.

        Raises:
            InputError: an argument has no type.
        """
        parameters = inspect.signature(function).parameters.values()
        plain = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        types = tuple(_type(function, p) for p in plain)
        consts = sum(isinstance(type, Scalar) for type in types[values:])
        env = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        return cls(tuple(p.name for p in plain), types, values, carries, consts, env)

    def split(self, args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """(values, parameters, constants).

        Raises:
            InputError: not as many arguments as the function has.
        """
        if len(args) != len(self.types):
            expected, remedy = ", ".join(self.names), "give one argument for each"
            what = f"a block takes {len(self.types)} arguments"
            raise InputError(what, expected=expected, found=str(len(args)), remedy=remedy)
        end = len(args) - self.consts
        return args[: self.values], args[self.values : end], args[end:]


def _type(function: Callable[..., Any], parameter: inspect.Parameter) -> ValueType:
    note = parameter.annotation
    try:
        found = read_type(_expression(note)) if isinstance(note, str) else None
    except (SyntaxError, DepthError):
        found = None
    if found is None:
        what = f"argument {parameter.name!r} of the block {function.__name__!r} has no type"
        shown = "nothing" if note is parameter.empty else repr(note)
        raise InputError(what, expected='"f32[b, s, 64]" or "float"', found=shown, remedy="annotate it with its type")
    return found


def _expression(note: str) -> ast.expr:
    """The syntax of an annotation; where annotations are postponed, it is the text of a text."""
    node = ast.parse(note, mode="eval").body
    return _expression(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else node


def traced_block(function: Callable[..., Any], signature: Signature, consts: Sequence[float], training: bool) -> Block:
    """A function as a block of its values and parameters; constants and the mode are fixed in it.

    Raises:
        InputError: a value is a number.
    """
    tensors = signature.types[: len(signature.types) - signature.consts]
    for name, type in zip(signature.names, tensors, strict=False):
        if not isinstance(type, Type):
            what = f"argument {name!r} of the block {function.__name__!r} is a number"
            raise InputError(
                what, expected="a tensor", found=str(type), remedy="give it as a tensor, or after the rest"
            )
    hints = _hints(tensors)  # type: ignore[arg-type]
    env = {"training": training, "device": torch.device("cpu")}
    env = {name: env[name] for name in signature.env}

    def run(*given: Any) -> Any:
        results = function(*given, *consts, **env)
        return results if isinstance(results, tuple) else (results,)

    graph = traced(run, [_example(type, hints) for type in tensors])  # type: ignore[arg-type]
    known, names = _described(graph, signature, tensors)  # type: ignore[arg-type]
    canonicalize(graph, names, known, both_modes=False)
    return Block(function.__name__, Body(graph), signature.carries)


def _hints(types: Sequence[Type]) -> dict[str, int]:
    """A size to trace at for every name: a prime that is no fixed size, so that sizes are not equal by chance."""
    fixed = {size for type in types for size in type.shape if isinstance(size, int)}
    primes = (n for n in count(101) if n not in fixed and all(n % d for d in range(2, 101)))
    names = dict.fromkeys(name for type in types for name in sorted(type.size_names()))
    return dict(zip(names, primes, strict=False))


def _example(type: Type, hints: dict[str, int]) -> Example:
    shape = [evaluate(size, hints) for size in type.shape]
    dims = tuple(d for d, size in enumerate(type.shape) if isinstance(size, str))
    return Example(torch.empty(shape, dtype=type.dtype), dims)  # memory that nothing is written to


def _described(
    graph: fx.Graph, signature: Signature, types: Sequence[Type]
) -> tuple[dict[str, tuple[fx.Node, int]], SizeNames]:
    """Says of every placeholder what it is; returns where every size is read, and the names of the symbols."""
    known: dict[str, tuple[fx.Node, int]] = {}
    names = SizeNames()
    for number, (node, type) in enumerate(zip(_placeholders(graph), types, strict=True)):
        kind: InputKind = "value" if number < signature.values else "param"
        node.meta["input"] = Input(signature.names[number], kind, type)
        if kind == "param":
            node.meta["param"] = signature.names[number]
        for dim, size in enumerate(type.shape):
            if isinstance(size, str) and size.isidentifier():
                known.setdefault(size, (node, dim))
                names.fix(node.meta["val"].shape[dim].node.expr, size)
    return known, names


def _placeholders(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "placeholder")
