"""The rules of the depth dialect: what makes a module of depth ops legal.

Every rule takes an op and returns what is wrong with it, "" if nothing is. They are those of `depthc.ir.verify`, on
what a module holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from depthc.ir import sizes
from depthc.ir.evaluate import indexed
from depthc.ir.mlir.types import ROW_DIMS, TensorType, fits, is_set, parts
from depthc.ir.names import closest
from depthc.ir.selection import read_rule

KINDS = ("parameter", "frozen", "buffer", "constant")
PLANS = ("fresh", "store", "read", "share", "update", "overlay")
_MOST_ITERATIONS = 256  # of a loop that are looked at
_UNREADABLE = (KeyError, ValueError, SyntaxError, ArithmeticError, IndexError)

Rule = Callable[[Any], str]


def verified(rule: Rule) -> Callable[[Any], bool]:
    """A rule as the `verify_invariants` of an op: what is wrong becomes an error at the op.

    Rules come before MLIR's own check of the fields, so an op may lack what a rule reads.
    """

    def verify_invariants(op: Any) -> bool:
        try:
            wrong = rule(op)
        except Exception as error:  # an exception here would not say which op it is about
            wrong = f"lacks a field, or has one of another kind: {error}"
        if wrong:
            op.location.emit_error(f"'{op.operation.name}' op {wrong}")
        return not wrong

    return staticmethod(verify_invariants)  # type: ignore[return-value]


# what an op can see


def module_of(op: Any) -> Any:
    """The module around an op."""
    found = op.operation
    while found.name != "builtin.module" and found.parent is not None:
        found = found.parent.operation
    return found


def symbols(op: Any, kind: str) -> dict[str, Any]:
    """The functions ("func.func") or parameters ("depth.param") of the module around an op, by name."""
    block = module_of(op).regions[0].blocks[0]
    return {o.attributes["sym_name"].value: o for o in block.operations if o.operation.name == kind}


def loops_around(op: Any) -> list[Any]:
    """The `depth.loop` ops around an op, the outermost first."""
    found, around = op.operation, list[Any]()
    while found.parent is not None:
        found = found.parent.operation
        if found.name == "depth.loop":
            around.insert(0, found)
    return around


def iterations(op: Any) -> Iterator[dict[str, int]]:
    """The loop indices under which an op runs; of a count that sizes decide, the first two."""

    def inner(loops: Sequence[Any], indices: dict[str, int]) -> Iterator[dict[str, int]]:
        if not loops:
            yield indices
            return
        try:
            count = sizes.evaluate(count_of(loops[0]), indices)
        except _UNREADABLE:
            count = 2
        for index in range(max(1, min(count, _MOST_ITERATIONS))):
            yield from inner(loops[1:], {**indices, loops[0].attributes["index"].value: index})

    return inner(loops_around(op), {})


def count_of(loop: Any) -> sizes.Size:
    """The count of a loop, as the program has it."""
    text = loop.attributes["count"].value
    return int(text) if text.isdecimal() else text


def texts(op: Any, name: str) -> list[str]:
    """An array of strings among the attributes of an op; empty where it is not there."""
    return [text.value for text in op.attributes[name]] if name in op.attributes else []


# types


def _all_fit(what: str, found: Sequence[Any], expected: Sequence[Any]) -> str:
    if len(found) != len(expected):
        return f"has {len(found)} {what}, expected {len(expected)}"
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not fits(a, b):
            return f"has the {what.removesuffix('s')} {number} of type {a}, expected {b}"
    return ""


def _types(values: Sequence[Any]) -> list[str]:
    """The types of values, of which several may travel as one."""
    return [part for value in values for part in parts(value.type)]


def maker(value: Any) -> Any:
    """The op that a value comes from; not the one that took it out of a tuple."""
    owner = value.owner
    unpacked = getattr(owner, "name", "") == "torch.prim.TupleUnpack"
    return maker(owner.operands[0]) if unpacked else owner


# the ops


def param(op: Any) -> str:
    """A parameter has a known kind and a type without unknown sizes; names are unique."""
    type = TensorType.read(op.attributes["type"].value)
    if type is None or None in type.shape:
        return f"has the type {op.attributes['type'].value}, expected a tensor of known sizes"
    if op.attributes["kind"].value not in KINDS:
        return f"has the kind {op.attributes['kind'].value!r}, expected one of {', '.join(KINDS)}"
    block = module_of(op).regions[0].blocks[0]
    if op.operation != block.operations[0].operation:
        return ""
    names = [o.attributes["sym_name"].value for o in block.operations if o.operation.name == "depth.param"]
    twice = next((name for name, same in itertools.groupby(sorted(names)) if len(list(same)) > 1), None)
    return f"declares {twice!r}, which is declared twice" if twice is not None else ""


def application(op: Any) -> str:
    """Operands, parameters, constants and results of a call or segment fit the function of its body."""
    functions, name = symbols(op, "func.func"), op.attributes["callee"].value
    if name not in functions:
        what = "block" if op.operation.name == "depth.call" else "body"
        return f"calls the unknown {what} @{name}; the nearest is @{closest(name, functions)}"
    type = functions[name].attributes["function_type"].value
    bound, consts = texts(op, "params"), len(op.attributes["consts"]) if "consts" in op.attributes else 0
    reads = len(type.inputs) - len(bound) - consts
    return (
        _all_fit("operands", _types(op.operands), type.inputs[: max(reads, 0)])
        or _bound(op, bound, type.inputs[reads : reads + len(bound)])
        or _all_fit("results", _types(op.results), type.results)
        or _plans(op)
        or _condition(op)
    )


def _bound(op: Any, names: Sequence[str], expected: Sequence[Any]) -> str:
    """Every parameter exists in every iteration, with the type of its slot."""
    if not names:
        return ""
    known = symbols(op, "depth.param")
    for indices in iterations(op):
        for text, type in zip(names, expected, strict=True):
            try:
                name = indexed(text, indices)
            except _UNREADABLE:
                return f"binds {text!r}, which cannot be read over the indices {', '.join(indices) or 'of no loop'}"
            if name not in known:
                return f"binds the unknown parameter {name!r}; the nearest is {closest(name, known)!r}"
            if str(known[name].attributes["type"].value) != str(type):
                return f"binds {name!r} of type {known[name].attributes['type'].value}, expected {type}"
    return ""


def _plans(op: Any) -> str:
    for plan in texts(op, "kv"):
        mode, _, slot = plan.partition(" ")
        if mode not in PLANS or (mode == "fresh") != (slot == ""):
            return f"has the key/value plan {plan!r}, expected fresh, or {', '.join(PLANS[1:])} and a slot"
        try:
            indexed(slot, next(iterations(op)))
        except _UNREADABLE:
            return f"has the key/value slot {slot!r}, which cannot be read"
    return ""


def _condition(op: Any) -> str:
    if "grad" not in op.attributes:
        return ""
    text = op.attributes["grad"].value
    try:
        sizes.evaluate(text, next(iterations(op)))
    except _UNREADABLE:
        return f"has the gradient condition {text!r}, which cannot be read"
    return ""


def stack(op: Any) -> str:
    """A stack hands out what its ops wrote."""
    return _yields(op, _types(op.results))


def loop(op: Any) -> str:
    """What is carried has one type before, in and after an iteration; index and count can be read."""
    index, count = op.attributes["index"].value, op.attributes["count"].value
    if not index.isidentifier() or index in [o.attributes["index"].value for o in loops_around(op)]:
        return f"has the index {index!r}, expected a new identifier"
    try:
        tree = sizes.read(count)
    except (ValueError, SyntaxError):
        return f"has the count {count!r}, expected integer arithmetic"
    if not sizes.names(tree) and sizes.evaluate(count_of(op), {}) < 0:
        return f"has the count {count}, expected 0 or more"
    carried = _types(op.operands)
    until = [TensorType.read(t) for t in _types(_yielded(op))[-1:]] if "until" in op.attributes else []
    if None in until:
        return "ends by a value that is no tensor"
    inside = _types(op.regions[0].blocks[0].arguments)
    results = _types(op.results)
    return (
        _all_fit("carried values", inside, carried)
        or _all_fit("carried results", results[: len(carried)], inside)
        or _yields(op, [*results, *until])
    )


def _yielded(op: Any) -> Sequence[Any]:
    return list(op.regions[0].blocks[0].operations)[-1].operands


def _yields(op: Any, expected: Sequence[Any]) -> str:
    last = list(op.regions[0].blocks[0].operations)[-1:]
    if not last or last[0].operation.name != "depth.yield":
        return "does not end in depth.yield"
    return _all_fit("yielded values", _types(last[0].operands), [str(t) for t in expected])


def select(op: Any) -> str:
    """The rules exist, their numbers are legal in every iteration, and they have the score that they need."""
    score, judge, among, of = op.score, op.judge, op.among, op.of
    for text in (op.attributes[name].value for name in ("rule", "inference") if name in op.attributes):
        for indices in iterations(op):
            wrong = _rule(text, indices, score is not None, among is not None)
            if wrong:
                return wrong
    if judge is not None and "inference" not in op.attributes:
        return "has a judge, which only a rule for inference reads"
    for what, value in (("candidates", among), ("counted set", of), ("result", op.out)):
        if value is not None and not is_set(value.type):
            return f"has the {what} {value.type}, expected a token set: a mask [batch, tokens] of i1"
    for what, value in (("score", score), ("judge", judge), ("within", op.within)):
        type = TensorType.read(value.type) if value is not None else TensorType((None, None), "")
        if type is None or len(type.shape) < 2:
            return f"has the {what} {value.type}, expected a tensor [batch, tokens]"
    return ""


def _rule(text: str, indices: Mapping[str, int], scored: bool, among: bool) -> str:
    try:
        name, number = read_rule(text, indices)
    except _UNREADABLE:
        return f"has the rule {text!r}, expected all, stride(q), topk(c), threshold(x) or atleast(r)"
    if name == "topk" and not (math.isfinite(number) and 0 < number <= 1):
        return f"has the capacity {number}, expected 0 < capacity <= 1"
    if name == "stride" and not (math.isfinite(number) and number >= 1 and number == int(number)):
        return f"has the stride {number}, expected an integer of at least 1"
    if not scored and (not among or name in ("topk", "threshold", "atleast")):
        return f"has the rule {text!r} and no score"
    return ""


def on(op: Any) -> str:
    """A region sees its reads alone, lies in no other region, and hands out what it yields."""
    tokens, *others = op.operands
    reads, block = _types(others), op.regions[0].blocks[0]
    if not is_set(tokens.type):
        return f"runs on {tokens.type}, expected a token set: a mask [batch, tokens] of i1"
    if len(op.attributes["gathered"]) != len(reads):
        return f"says of {len(op.attributes['gathered'])} reads whether they are gathered, expected {len(reads)}"
    outer = _outer(op)
    if outer is not None:
        return f"uses a value that it does not read: {outer}"
    return _all_fit("region arguments", _types(block.arguments), reads) or _yields(op, _types(op.results))


def _outer(op: Any) -> str | None:
    """What a region reads from outside, or the region inside it."""
    inside: set[Any] = set()
    for block in (b for region in op.regions for b in region.blocks):
        stack = [block]
        while stack:
            here = stack.pop()
            inside.update(here.arguments)
            for inner in here.operations:
                inside.update(inner.results)
                if inner.operation.name == "depth.on":
                    return "an inner depth.on"
                stack.extend(b for region in inner.regions for b in region.blocks)
    return next((str(v.type) for v in _read_below(op) if v not in inside), None)


def _read_below(op: Any) -> Iterator[Any]:
    for block in (b for region in op.regions for b in region.blocks):
        for inner in block.operations:
            yield from inner.operands
            yield from _read_below(inner)


def merge(op: Any) -> str:
    """The rows are those that a region over the same set wrote, and fit the stream and the combine function."""
    stream, rows, tokens, *others = op.operands
    region, extra = maker(rows), _types(others)
    if getattr(region, "name", "") != "depth.on" or region.operands[0] != tokens:
        return "merges rows that no depth.on over the same token set wrote"
    if "combine" not in op.attributes:
        if extra or texts(op, "params"):
            return "reads values or parameters without a combine function"
        return _all_fit("results", _types(op.results), [stream.type])
    functions, name = symbols(op, "func.func"), op.attributes["combine"].value
    if name not in functions:
        return f"calls the unknown function @{name}; the nearest is @{closest(name, functions)}"
    inputs, bound = functions[name].attributes["function_type"].value.inputs, texts(op, "params")
    count, rows_of = 2 + len(extra), [_rows(type) for type in (stream.type, *extra)]
    if len(inputs) != count + len(bound):
        return f"has {count} values and {len(bound)} parameters, expected {len(inputs)} in all for @{name}"
    return (
        _all_fit("operands", [rows_of[0], rows.type, *rows_of[1:]], inputs[:count])
        or _bound(op, bound, inputs[count:])
        or _all_fit("results", _types(op.results), [stream.type])
    )


def _rows(type: Any) -> Any:
    """The type of some rows of a stream."""
    found = TensorType.read(type)
    return found.loosened(ROW_DIMS) if found else type


def tap(op: Any) -> str:
    """The name can be read."""
    try:
        indexed(op.attributes["label"].value, next(iterations(op)))
    except _UNREADABLE:
        return f"has the name {op.attributes['label'].value!r}, which cannot be read"
    return ""


def yields(op: Any) -> str:
    """It ends a region of the dialect."""
    parent = op.operation.parent
    known = ("depth.stack", "depth.loop", "depth.on")
    return "" if parent is not None and parent.operation.name in known else f"stands outside of {', '.join(known)}"
