"""Reading folded text: `for` over a range written out, and the strings and numbers that depend on its index."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from depthc.ir.sizes import Size
from depthc.ir.text.syntax import fail, literal, path_of

_LONGEST_RANGE = 1 << 16


@dataclass(frozen=True)
class Scope:
    """Where a statement stands: values of the range indices around it, and counts of the program's own loops."""

    indices: Mapping[str, int] = field(default_factory=dict)
    loops: Mapping[str, Size] = field(default_factory=dict)

    def at(self, index: str, value: int) -> Scope:
        """The scope of one iteration of a range."""
        return Scope({**self.indices, index: value}, self.loops)

    def inside(self, loop: str, count: Size) -> Scope:
        """The scope below a loop of the program."""
        return Scope(self.indices, {**self.loops, loop: count})


def unfold(statements: Sequence[ast.stmt], scope: Scope) -> Iterator[tuple[ast.stmt, Scope]]:
    """The statements as they were before folding, each with its scope."""
    for statement in statements:
        match statement:
            case ast.Pass():
                continue
            case ast.For(
                target=ast.Name(id=index), iter=ast.Call(func=ast.Name(id="range")) as bounds, body=body, orelse=[]
            ):
                for value in _range(bounds, scope):
                    yield from unfold(body, scope.at(index, value))
            case _:
                yield statement, scope


def _range(bounds: ast.Call, scope: Scope) -> range:
    numbers = [_integer(a, scope) for a in bounds.args]
    if bounds.keywords or not 1 <= len(numbers) <= 3 or numbers[2:] == [0]:
        fail(bounds, "this range cannot be read", expected="range(stop), range(start, stop), range(start, stop, step)")
    found = range(*numbers)
    if len(found) > _LONGEST_RANGE:
        fail(bounds, "this range is too long", expected=f"at most {_LONGEST_RANGE} iterations")
    return found


def _integer(node: ast.expr, scope: Scope) -> int:
    """The value of integer arithmetic over range indices."""
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return value
        case ast.Name(id=name) if name in scope.indices:
            return scope.indices[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_integer(operand, scope)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() as op, right=right):
            a, b = _integer(left, scope), _integer(right, scope)
            return a + b if isinstance(op, ast.Add) else a - b if isinstance(op, ast.Sub) else a * b
    known = ", ".join(scope.indices) or "none here"
    fail(node, "this is not an integer", expected=f"sums and products of integers and range indices ({known})")


def number(node: ast.expr, scope: Scope) -> int | float:
    """A number, possibly over range indices: `0.5`, `l + 1`, `(0.1, 0.3)[l]`."""
    match node:
        case ast.Subscript(value=ast.Tuple(elts=items), slice=index):
            at = _integer(index, scope)
            if not 0 <= at < len(items):
                fail(node, "the index is outside of the table", expected=f"0 to {len(items) - 1}", found=str(at))
            return number(items[at], scope)
        case ast.BinOp() | ast.Name() if not (isinstance(node, ast.Name) and node.id not in scope.indices):
            return _integer(node, scope)
    value = literal(node)
    if not isinstance(value, int | float):
        fail(node, "this is not a number", expected="an integer or a float")
    return value


def string(node: ast.expr, scope: Scope) -> str:
    """A string or f-string: range indices are filled in, loop indices stay as expressions in braces."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_formatted(part, scope) for part in parts)
    fail(node, "this is not a string", expected='"..." or f"..." over the indices of the loops around it')


def _formatted(part: ast.expr, scope: Scope) -> str:
    match part:
        case ast.Constant(value=str(text)):
            return text
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            names = {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
            if names and names <= scope.loops.keys():
                return f"{{{ast.unparse(value)}}}"
            return str(_integer(value, scope))
    fail(part, "this part of the f-string cannot be read", expected="{index} or {index + 1}")


def value_name(node: ast.expr, scope: Scope) -> str:
    """The name of a value: `h`, or `v["past.0"]`."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Subscript(value=ast.Name(id="v"), slice=key):
            return string(key, scope)
    fail(node, "this is not the name of a value", expected='a name, or v["..."]')


def slot_name(node: ast.expr, letter: str, scope: Scope) -> str | None:
    """The slot of `w.a.b` or `w["a.b"]`; None if the syntax is no slot of this letter."""
    match node:
        case ast.Subscript(value=ast.Name(id=found), slice=key) if found == letter:
            return string(key, scope)
    path = path_of(node) or ""
    return path.removeprefix(f"{letter}.") if path.startswith(f"{letter}.") else None
