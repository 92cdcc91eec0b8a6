"""The statements of a program's text as depth ops."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from depthc.ir.program import Call, Kv, Loop, Merge, On, Op, Segment, Select, Stack, Tap
from depthc.ir.text.functions import Function, bound_name
from depthc.ir.text.syntax import fail, read_size
from depthc.ir.text.unfold import Scope, number, string, unfold, value_name

_MODES = ("fresh", "store", "read", "share", "update", "overlay")


class OpReader:
    """Reads ops; `functions` are the blocks, segments and glues that the text defines."""

    def __init__(self, functions: Mapping[str, Function]) -> None:
        self.functions = functions
        self._statements: dict[str, Callable[[ast.Call, tuple[str, ...], Scope], Op]] = {
            "select": self._select,
            "merge": self._merge,
            "tap": self._tap,
        }

    def top(self, statement: ast.stmt, scope: Scope) -> Segment | Stack:
        """A statement of the program itself: a stack or a segment."""
        match statement:
            case ast.With(items=[ast.withitem(context_expr=call, optional_vars=None)], body=body):
                args = _arguments(call, "stack", ["name"])
                return Stack(string(args["name"], scope), self._region(body, scope))
        op = self._op(statement, scope)
        if not isinstance(op, Segment):
            fail(statement, "this op is outside of a stack", expected='a segment, or with stack("name"):')
        return op

    def _region(self, statements: Sequence[ast.stmt], scope: Scope) -> tuple[Op, ...]:
        return tuple(self._op(statement, inner) for statement, inner in unfold(statements, scope))

    def _op(self, statement: ast.stmt, scope: Scope) -> Op:
        match statement:
            case ast.For(target=ast.Name(id=index), iter=call, body=body, orelse=[]):
                args = _arguments(call, "loop", ["count"], ["until"])
                until = value_name(args["until"], scope) if "until" in args else None
                count = read_size(args["count"])
                return Loop(index, count, self._region(body, scope.inside(index, count)), until)
            case ast.With(items=[ast.withitem(context_expr=call, optional_vars=None)], body=body):
                args = _arguments(call, "on", ["tokens"], ["reads", "writes"])
                reads, writes = (_values(args.get(k), scope) for k in ("reads", "writes"))
                return On(value_name(args["tokens"], scope), reads, writes, self._region(body, scope))
            case ast.Assign(targets=[target], value=ast.Call() as call):
                targets = target.elts if isinstance(target, ast.Tuple) else [target]
                return self._apply(call, tuple(value_name(t, scope) for t in targets), scope)
            case ast.Expr(value=ast.Call() as call):
                return self._apply(call, (), scope)
        fail(statement, "this is not an op", expected="an application, a for over loop(n), or a with on(tokens, ...)")

    def _apply(self, call: ast.Call, writes: tuple[str, ...], scope: Scope) -> Op:
        label = call.func.id if isinstance(call.func, ast.Name) else ""
        if label in self._statements:
            return self._statements[label](call, writes, scope)
        function = self.functions.get(label)
        if function is None or function.kind == "glue":
            label = label or ast.unparse(call.func)
            fail(call, f"there is no block or segment {label!r}", expected=_known(self.functions))
        reads = tuple(value_name(a, scope) for a in call.args)
        if function.kind == "segment":
            words = _words(call, ["w", "name", "precise"])
            params, _ = _weights(words.get("w"), function, scope)
            name = string(words["name"], scope) if "name" in words else function.name
            return Segment(name, function.body, reads, writes, params, _true(words.get("precise")))
        words = _words(call, ["w", "c", "kv", "grad", "layer"])
        params, prefix = _weights(words.get("w"), function, scope)
        return Call(
            function.name,
            reads,
            writes,
            params,
            tuple(number(c, scope) for c in _items(words.get("c"))),
            tuple(_kv(plan, scope) for plan in _items(words.get("kv"))),
            string(words["grad"], scope) if "grad" in words else None,
            string(words["layer"], scope) if "layer" in words else prefix,
        )

    def _select(self, call: ast.Call, writes: tuple[str, ...], scope: Scope) -> Select:
        args = _arguments(call, "select", ["rule"], ["score", "among", "of", "inference", "judge", "within"])
        names = ("score", "among", "of", "judge", "within")
        score, among, of, judge, within = (value_name(args[k], scope) if k in args else None for k in names)
        inference = string(args["inference"], scope) if "inference" in args else None
        return Select(_single(call, writes), string(args["rule"], scope), score, among, of, inference, judge, within)

    def _merge(self, call: ast.Call, writes: tuple[str, ...], scope: Scope) -> Merge:
        args = _arguments(call, "merge", ["read", "value", "tokens"], ["combine", "extra", "w", "over"])
        read, value, tokens = (value_name(args[k], scope) for k in ("read", "value", "tokens"))
        over = value_name(args["over"], scope) if "over" in args else None
        if "combine" not in args:
            if "extra" in args or "w" in args:
                fail(call, "merge takes extra and w only together with combine", expected="combine=function")
            return Merge(_single(call, writes), read, value, tokens, over=over)
        label = args["combine"]
        function = self.functions.get(label.id) if isinstance(label, ast.Name) else None
        if function is None or function.kind != "glue":
            fail(label, "this is not a glue function", expected=_known(self.functions, "glue"))
        params, _ = _weights(args.get("w"), function, scope)
        extra = _values(args.get("extra"), scope)
        return Merge(_single(call, writes), read, value, tokens, function.body, extra, params, over)

    def _tap(self, call: ast.Call, writes: tuple[str, ...], scope: Scope) -> Tap:
        args = _arguments(call, "tap", ["name", "read"])
        if writes:
            fail(call, "tap has no result", expected='tap("name", value)')
        return Tap(string(args["name"], scope), value_name(args["read"], scope))


def _known(functions: Mapping[str, Function], kind: str = "") -> str:
    labels = [f.label for f in functions.values() if f.kind == kind or not kind]
    return "one of " + ", ".join(labels) if labels else "a function that the text defines above"


def _words(call: ast.Call, allowed: Sequence[str]) -> dict[str, ast.expr]:
    """The keyword arguments of an application."""
    for word in call.keywords:
        if word.arg not in allowed:
            fail(word.value, f"there is no option {word.arg!r} here", expected=", ".join(allowed))
    return {str(word.arg): word.value for word in call.keywords}


def _arguments(
    call: ast.expr, function: str, positional: Sequence[str], keywords: Sequence[str] = ()
) -> dict[str, ast.expr]:
    """The arguments of `function(...)` by name."""
    shape = f"{function}({', '.join([*positional, *(f'{k}=' for k in keywords)])})"
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != function:
        fail(call, "this is another statement than expected", expected=shape)
    if len(call.args) != len(positional):
        fail(call, f"{function} has {len(call.args)} positional arguments", expected=shape)
    return {**dict(zip(positional, call.args, strict=True)), **_words(call, keywords)}


def _items(node: ast.expr | None) -> list[ast.expr]:
    if node is None:
        return []
    if not isinstance(node, ast.Tuple):
        fail(node, "this is not a tuple", expected="(a, b), or (a,) for a single item")
    return node.elts


def _values(node: ast.expr | None, scope: Scope) -> tuple[str, ...]:
    return tuple(value_name(item, scope) for item in _items(node))


def _single(call: ast.Call, writes: tuple[str, ...]) -> str:
    if len(writes) != 1:
        fail(call, "this op has one result", expected=f"name = {ast.unparse(call.func)}(...)")
    return writes[0]


def _weights(node: ast.expr | None, function: Function, scope: Scope) -> tuple[tuple[str, ...], str]:
    """(parameter names in slot order, prefix) of `w=`; records them for the declarations of the slots."""
    prefix, others = "", {}
    match node:
        case None:
            pass
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Dict() as right):
            prefix, others = string(left, scope), _entries(right, function, scope)
        case ast.Dict():
            others = _entries(node, function, scope)
        case _:
            prefix = string(node, scope)
    params = tuple(others.get(slot, bound_name(prefix, slot)) for slot in function.slots)
    function.bindings.append((params, scope.loops))
    return params, prefix


def _entries(node: ast.Dict, function: Function, scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in zip(node.keys, node.values, strict=True):
        slot = string(key, scope) if key is not None else ""
        if slot not in function.slots:
            fail(key or value, f"{function.label} has no slot {slot!r}", expected=", ".join(function.slots))
        found[slot] = string(value, scope)
    return found


def _true(node: ast.expr | None) -> bool:
    """A switch, which is written only where it is on."""
    if node is not None and not (isinstance(node, ast.Constant) and node.value is True):
        fail(node, "this is not a switch", expected="True, or leave it out")
    return node is not None


def _kv(node: ast.expr, scope: Scope) -> Any:
    """`fresh`, `store("s")`, `read("s")`, `share("s")`, `update("s")`, `overlay("s")`."""
    match node:
        case ast.Name(id="fresh"):
            return Kv()
        case ast.Call(func=ast.Name(id=mode), args=[slot], keywords=[]) if mode in _MODES:
            return Kv(mode, string(slot, scope))  # type: ignore[arg-type]
    fail(node, "this is not a key/value plan", expected=f'fresh, or {", ".join(_MODES[1:])} with ("s")')
