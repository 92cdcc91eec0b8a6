"""Sizes: integers, or integer expressions over size names such as "s" and "2*s + 1".

A size expression is text in Python's own syntax, so it prints, compares and hashes as it is. It is read with
`ast` and never executed: names, integers, arithmetic, comparisons, `max` and `min` are all there is.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

Size = int | str

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"max": max, "min": min}
# What a token of a postfix expression stands for, and how many operands it takes.
_POSTFIX: dict[str, tuple[Callable[..., Any], int]] = {
    **{
        f"{op.__name__}/{1 if issubclass(op, ast.unaryop) else 2}": (f, 1 if issubclass(op, ast.unaryop) else 2)
        for op, f in OPERATORS.items()
    },
    **{f"{name}/2": (function, 2) for name, function in _FUNCTIONS.items()},
    "And/2": (lambda a, b: bool(a and b), 2),
    "Or/2": (lambda a, b: bool(a or b), 2),
}


@lru_cache(maxsize=4096)
def read(text: str) -> ast.expr:
    """The syntax tree of a size expression.

    Raises:
        ValueError: if `text` is anything but integer arithmetic.

    Example:
        >>> names(read("2*s + 1"))
        {'s'}
    """
    tree = ast.parse(text, mode="eval").body
    for node in ast.walk(tree):
        allowed = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Name, ast.Load, ast.boolop)
        known = isinstance(node, allowed) or type(node) in OPERATORS
        number = isinstance(node, ast.Constant) and isinstance(node.value, int)
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        if not (known or number or call):
            raise ValueError(f"not a size expression: {text!r}")
    return tree


def names(tree: ast.expr) -> set[str]:
    """The size names that an expression reads."""
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id not in _FUNCTIONS}


def evaluate(size: Size, values: Mapping[str, int]) -> int:
    """The value of a size expression, given the value of every size name in it.

    Raises:
        KeyError: a name without a value.

    Example:
        >>> evaluate("max(s, 4) * 2", {"s": 3})
        8
    """
    if isinstance(size, int):
        return size
    stack: list[Any] = []
    for token in postfix(size).split():
        if token.isdecimal():
            stack.append(int(token))
        elif token.isidentifier():
            stack.append(values[token])
        else:
            function, count = _POSTFIX[token]
            stack[-count:] = [function(*stack[-count:])]
    return stack[0]


def met(guard: str, values: Mapping[str, int]) -> bool:
    """Whether sizes fulfil a condition; one that divides by zero is not fulfilled.

    Example:
        >>> met("16 % (s // 16) == 0", {"s": 32}), met("16 % (s // 16) == 0", {"s": 8})
        (True, False)
    """
    try:
        return bool(evaluate(guard, values))
    except ZeroDivisionError:
        return False


def postfix(size: str) -> str:
    """A size expression in postfix form, "2 s * 1 +"."""
    return _cached_postfix(size)


@lru_cache(maxsize=4096)
def _cached_postfix(size: str) -> str:
    return " ".join(_tokens(read(size)))


def _tokens(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Constant(value=value):
            yield str(int(value))  # type: ignore[arg-type]
        case ast.Name(id=name):
            yield name
        case ast.UnaryOp(op=op, operand=operand):
            yield from (*_tokens(operand), f"{type(op).__name__}/1")
        case ast.BinOp(left=left, op=op, right=right):
            yield from _folded(f"{type(op).__name__}/2", [[*_tokens(left)], [*_tokens(right)]])
        case ast.BoolOp(op=op, values=operands):
            yield from _folded(f"{type(op).__name__}/2", [[*_tokens(operand)] for operand in operands])
        case ast.Compare(left=left, ops=ops, comparators=rights):
            chain = zip(ops, [left, *rights], rights, strict=False)
            yield from _folded("And/2", [[*_tokens(a), *_tokens(b), f"{type(op).__name__}/2"] for op, a, b in chain])
        case ast.Call(func=ast.Name(id=name), args=args):
            yield from _folded(f"{name}/2", [[*_tokens(arg)] for arg in args])
        case _:
            raise ValueError(f"not a size expression: {ast.unparse(node)!r}")


def _folded(operator: str, operands: Sequence[Sequence[str]]) -> Iterator[str]:
    """An operator between all operands, from the left."""
    for index, tokens in enumerate(operands):
        yield from (*tokens, operator) if index else tokens
