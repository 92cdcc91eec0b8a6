"""Parse: program text back to a program. The text is read with `ast`; nothing in it is executed or imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

from torch import Tensor

from depthc.ir.errors import ParseError
from depthc.ir.params import Expr, Init, Mean, Param, Ref, Shuffle, Svd, Tile
from depthc.ir.program import Block, Program, Segment, Stack
from depthc.ir.text.functions import Function, derived_params
from depthc.ir.text.parse_body import BodyReader, read_declaration
from depthc.ir.text.parse_ops import OpReader
from depthc.ir.text.parse_signature import read_signature
from depthc.ir.text.syntax import HEADER, VERSION, fail, literal, read_type
from depthc.ir.text.trees import find_class
from depthc.ir.text.unfold import Scope, number, slot_name, string, unfold
from depthc.ir.types import Type
from depthc.ir.verify import verify

_KINDS = ("block", "segment", "glue")


def parse(text: str, weights: Mapping[str, Tensor] | None = None) -> Program:
    """Read what `str(program)` wrote.

    Args:
        text: a program as text.
        weights: its tensors by name, such as the state dict of the captured model; without them the program can be
            inspected and rewritten but not run. Parameters keep the order of the weights.

    Raises:
        ParseError: text that is not a program, with line and column.
        VerifyError: a program that breaks a rule of the IR.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> program = depthc.capture(model, (torch.ones(2, 5, 4),))
        >>> depthc.parse(str(program)) == program
        True
    """
    _check_header(text)
    try:
        module = ast.parse(text)
    except SyntaxError as error:
        where = f"line {error.lineno or 1}, column {error.offset or 1}"
        raise _not_python(where, error.msg) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise _not_python("line 1, column 1", str(error) or type(error).__name__) from None
    program = _Reader(module).program(weights or {})
    verify(program)
    return program


def _check_header(text: str) -> None:
    first = text.split("\n", 1)[0].strip()
    match = re.fullmatch(rf"{HEADER} (\d+)", first)
    if not match or int(match.group(1)) != VERSION:
        raise ParseError(
            "this is another version of the format" if match else "this is not a depth program",
            where="line 1, column 1",
            expected=f"{HEADER} {VERSION}",
            found=first[:80] or "an empty line",
            remedy="print the program again with this version" if match else "pass the text of str(program)",
        )


def _not_python(where: str, reason: str) -> ParseError:
    remedy = "correct the text there; it must be as the printer writes it"
    what = "the text is not Python syntax"
    return ParseError(what, where=where, expected="program text", found=reason, remedy=remedy)


class _Reader:
    def __init__(self, module: ast.Module) -> None:
        self.classes: dict[str, type] = {}
        self.functions: dict[str, Function] = {}
        self.explicit: dict[str, Param] = {}
        self.main: ast.FunctionDef | None = None
        for statement in module.body:
            self._top(statement)
        if self.main is None:
            fail(module, "the text has no program", expected="def ModelName(...):", found="functions only")

    def _top(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(
                targets=[ast.Name(id=alias)],
                value=ast.Call(func=ast.Name(id="registered"), args=[ast.Constant(value=str(text)) as node]),
            ):
                self.classes[alias] = find_class(text, node)
            case ast.FunctionDef() if self.main is None:
                if any(_mark(d)[0] in _KINDS for d in statement.decorator_list):
                    self._function(statement)
                else:
                    self.main = statement
            case _:
                fail(statement, "this cannot stand here", expected="a @block or @segment, and one program at the end")

    def _function(self, node: ast.FunctionDef) -> None:
        if node.name in self.functions or len(node.decorator_list) != 1:
            fail(node, f"function {node.name!r} is defined twice or has several marks", found=node.name)
        kind, mark = _mark(node.decorator_list[0])
        name, carries = node.name, 1
        for argument in mark.args if mark else []:
            name = string(argument, Scope())
        for word in mark.keywords if mark else []:
            carries = literal(word.value)
            if word.arg != "carries" or type(carries) is not int:
                fail(word.value, "this mark cannot be read", expected='@block("name", carries=2)')
        read = BodyReader(node)
        function = Function(node.name, kind, name, read.body, carries)  # type: ignore[arg-type]
        function.slots, function.kinds = tuple(read.slots), tuple(read.kinds)
        self.functions[node.name] = function

    def program(self, weights: Mapping[str, Tensor]) -> Program:
        """The whole program."""
        main = self.main
        assert main is not None
        body: list[Segment | Stack] = []
        ops = OpReader(self.functions)
        sizes: list[ast.Call] = []
        guards: list[ast.expr] = []
        result: ast.expr | None = None
        for statement, scope in unfold(main.body, Scope()):
            match statement:
                case _ if result is not None:
                    fail(statement, "nothing may follow return", expected="return as the last statement")
                case ast.Expr(value=ast.Call(func=ast.Name(id="sizes")) as call):
                    sizes.append(call)
                case ast.Assert(test=test, msg=None):
                    guards.append(test)
                case ast.AnnAssign():
                    self._param(statement, scope)
                case ast.Return(value=ast.expr() as value):
                    result = value
                case _:
                    body.append(ops.top(statement, scope))
        if result is None:
            fail(main, "the program does not return anything", expected="return output", found=main.name)
        signature = read_signature(main, self.classes, sizes, guards, result)
        unused = next((f for f in self.functions.values() if f.kind != "block" and not f.bindings), None)
        if unused:
            fail(main, f"function {unused.label!r} is never applied", expected="functions that the program uses")
        blocks = {f.name: Block(f.name, f.body, f.carries) for f in self.functions.values() if f.kind == "block"}
        derived = derived_params(self.functions.values())
        params = self.explicit | {n: p for n, p in derived.items() if n not in self.explicit}
        order = {name: i for i, name in enumerate(weights)}
        params = {n: params[n] for n in sorted(params, key=lambda n: order.get(n, len(order)))}
        return Program(main.name, signature, blocks, tuple(body), params, weights, _modes(main))

    def _param(self, statement: ast.AnnAssign, scope: Scope) -> None:
        name = slot_name(statement.target, "w", scope)
        if name is None:
            fail(statement, "this does not declare a parameter", expected="w.name: f32[4], possibly = expression")
        type, kind = read_declaration(statement.annotation)
        if not isinstance(type, Type):
            fail(statement.annotation, "a parameter is a tensor", expected="a type such as f32[4, 4]")
        expr = None if statement.value is None else _read_expr(statement.value, scope)
        self.explicit[name] = Param(type, kind, expr)  # type: ignore[arg-type]


def _mark(decorator: ast.expr) -> tuple[str, ast.Call | None]:
    match decorator:
        case ast.Name(id=name):
            return name, None
        case ast.Call(func=ast.Name(id=name)):
            return name, decorator
    return "", None


def _modes(main: ast.FunctionDef) -> tuple[bool, ...]:
    """The values of `training` that the program is for: `@training(False)`."""
    if not main.decorator_list:
        return (False, True)
    name, mark = _mark(main.decorator_list[0])
    modes = tuple(literal(a) for a in mark.args) if mark else ()
    if name != "training" or len(main.decorator_list) > 1 or not all(isinstance(m, bool) for m in modes):
        fail(main.decorator_list[0], "this mark of the program cannot be read", expected="@training(False)")
    return modes


def _read_expr(node: ast.expr, scope: Scope) -> Expr:
    """A parameter expression: ref, mean, svd_left, svd_right, init, shuffle, tile."""
    match node:
        case ast.Call(func=ast.Name(id="ref"), args=[name], keywords=[]):
            return Ref(string(name, scope))
        case ast.Call(func=ast.Name(id="mean"), args=terms, keywords=[]) if terms:
            return Mean(tuple(_read_expr(t, scope) for t in terms))
        case ast.Call(
            func=ast.Name(id="svd_left" | "svd_right" as side),
            args=[ast.BinOp(left=a, op=ast.Sub(), right=b), rank],
            keywords=[],
        ):
            left: bool = side == "svd_left"
            return Svd("left" if left else "right", _read_expr(a, scope), _read_expr(b, scope), _whole(rank, scope))
        case ast.Call(func=ast.Name(id="init"), args=[type_node, law], keywords=words):
            type = read_type(type_node)
            seeds = [_whole(word.value, scope) for word in words if word.arg == "seed"]
            if isinstance(type, Type) and len(seeds) == len(words) <= 1:
                return Init(type, string(law, scope), *seeds)
        case ast.Call(func=ast.Name(id="shuffle"), args=[term], keywords=words):
            seeds = [_whole(word.value, scope) for word in words if word.arg == "seed"]
            if len(seeds) == len(words) <= 1:
                return Shuffle(_read_expr(term, scope), *seeds)
        case ast.Call(func=ast.Name(id="tile"), args=[term, count], keywords=words):
            over = [_whole(word.value, scope) for word in words if word.arg == "over"]
            if len(over) == len(words) <= 1:
                return Tile(_read_expr(term, scope), _whole(count, scope), *over)
    expected = 'ref("a"), mean(...), svd_left(a - b, rank), init(...), shuffle(ref("a"), seed=1) or tile(ref("a"), 2)'
    fail(node, "this is not a parameter expression", expected=expected)


def _whole(node: ast.expr, scope: Scope) -> int:
    value = number(node, scope)
    if not isinstance(value, int):
        fail(node, "this is not an integer", expected="an integer")
    return value
