"""Verify: the rules of the IR, which hold after capture and after every pass.

One rule an op class, in `_RULES`. Regions are walked as they run: loops iteration by iteration, so that names and
slots over their indices are checked as they will be; `on` regions with nothing but their reads in sight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch

from depthc.ir import sizes
from depthc.ir.body import Body
from depthc.ir.errors import VerifyError
from depthc.ir.evaluate import indexed
from depthc.ir.params import Expr, Init, Mean, Ref, Shuffle, Svd
from depthc.ir.program import Call, Kv, Loop, Merge, On, Op, Program, Segment, Select, Stack, Tap
from depthc.ir.selection import read_rule
from depthc.ir.signature import Leaf, Signature
from depthc.ir.text.functions import walk
from depthc.ir.text.syntax import is_identifier
from depthc.ir.types import Type
from depthc.ir.verify_body import check_body

_MOST_ITERATIONS = 256  # of a loop that are looked at
_UNKNOWN_COUNT = 2  # where the count is not static
_KINDS = ("parameter", "frozen", "buffer", "constant")


def verify(program: Program) -> None:
    """Check every rule of the IR.

    Raises:
        VerifyError: the first rule that is broken, and where.
    """
    _check_signature(program.signature)
    _check_params(program)
    _check_names(program)
    for block in program.blocks.values():
        carries, values, results = block.carries, block.body.inputs_of("value"), block.body.results
        check_body(block.body, f"block {block.name!r}")
        if not 0 <= carries <= min(len(values), len(results)):
            found = f"{carries} carries, {len(values)} values, {len(results)} results"
            _fail(f"block {block.name!r}", "a block has more carries than values or results", found=found)
    place = _Place(program, {leaf.name: _PLAIN for leaf in program.signature.inputs if leaf.type is not None})
    for item in program.body:
        _region(item.ops, place.below(f"stack {item.name!r}")) if isinstance(item, Stack) else _region([item], place)
    for output in program.signature.outputs:
        if isinstance(output, str):
            place.below("the outputs").plain(output)
    for name in program.blocks.keys() - {op.block for op, _ in walk(program.body) if isinstance(op, Call)}:
        _fail(f"block {name!r}", "the block is never called", expected="a call of it", remedy="remove the block")


def _fail(where: str, what: str, *, expected: str = "", found: str = "", remedy: str = "") -> NoReturn:
    remedy = remedy or "correct the pass or the text that made this"
    raise VerifyError(what, where=where, expected=expected, found=found, remedy=remedy)


# the frame: signature, parameters, names


def _check_signature(signature: Signature) -> None:
    where = "the signature"
    leaves = ((signature.inputs, signature.in_spec, "inputs"), (signature.outputs, signature.out_spec, "outputs"))
    for items, spec, what in leaves:
        if len(items) != spec.num_leaves:
            expected, found = f"{spec.num_leaves} leaves", str(len(items))
            _fail(where, f"the {what} do not fit their tree", expected=expected, found=found)
    order = [p.strip("*=") for p in signature.parameters]
    captured = list(signature.in_spec.context) if signature.in_spec.type is dict else None
    if captured is None or captured != [p for p in order if p in captured]:
        expected = "a dict of arguments in the order of the parameters " + ", ".join(order)
        _fail(where, "the arguments are not in the order of the parameters", expected=expected, found=str(captured))
    _unique(where, "input", (leaf.name for leaf in signature.inputs))
    known = {n for leaf in signature.inputs if leaf.type for n in leaf.type.size_names()} | signature.ranges.keys()
    for guard in signature.guards:
        _expression(where, "guard", guard, known)
    for size, (low, high) in signature.ranges.items():
        if not is_identifier(size) or low < 0 or (high is not None and high < low):
            _fail(where, f"the range of size {size!r} is empty", expected="0 <= low <= high", found=f"{low} to {high}")
    for leaf in signature.outputs:
        if isinstance(leaf, Leaf) and leaf.type is not None:
            _fail(where, "an output leaf has a type", expected="the name of a value, or a fixed value", found=str(leaf))


def _check_params(program: Program) -> None:
    for name, param in program.params.items():
        where = f"parameter {name!r}"
        if param.kind not in _KINDS:
            _fail(where, "unknown kind of parameter", expected=", ".join(_KINDS), found=param.kind)
        if not isinstance(param.type, Type) or param.type.size_names():
            _fail(where, "a parameter has a size that is not a number", expected="integers", found=str(param.type))
        for expr in _inner(param.expr):
            if isinstance(expr, Ref) and program.weights and expr.name not in program.weights:
                _fail(where, f"there is no weight {expr.name!r}", expected="a name among the weights", found=expr.name)
            if isinstance(expr, Mean) and not expr.terms:
                _fail(where, "the mean of nothing", expected="at least one term", found="mean()")
            if isinstance(expr, Svd) and (expr.rank < 1 or expr.side not in ("left", "right")):
                found = f"{expr.side} {expr.rank}"
                _fail(where, "this is no SVD factor", expected="left or right, rank >= 1", found=found)
            if isinstance(expr, Init) and not _is_law(expr.law):
                _fail(where, "unknown law", expected="zeros, ones, eye, last or normal(std)", found=expr.law)


def _inner(expr: Expr | None) -> Iterable[Expr]:
    if expr is None:
        return
    yield expr
    inner = (expr.a, expr.b) if isinstance(expr, Svd) else (expr.term,) if isinstance(expr, Shuffle) else ()
    for term in (*getattr(expr, "terms", ()), *inner):
        yield from _inner(term)


def _is_law(law: str) -> bool:
    return law in ("zeros", "ones", "eye", "last") or _number(law.removeprefix("normal(").removesuffix(")")) is not None


def _check_names(program: Program) -> None:
    if not is_identifier(program.name):
        _fail("the program", "its name is not an identifier", expected="the name of a class", found=program.name)
    _unique("the program", "segment or stack", (item.name for item in program.body))
    _unique("the program", "tap", (op.name for op, _ in walk(program.body) if isinstance(op, Tap)))
    for key, block in program.blocks.items():
        if key != block.name:
            _fail(f"block {key!r}", "the block has another name than its key", expected=key, found=block.name)
    if not program.modes or len(set(program.modes)) != len(program.modes):
        found = str(program.modes)
        _fail("the program", "it is for no mode, or for one twice", expected="False, True or both", found=found)


def _unique(where: str, what: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        _fail(where, f"two of the same name: {what} {twice[0]!r}", expected="unique names", found=twice[0])


def _expression(where: str, what: str, text: str, known: Iterable[str]) -> None:
    """Check that a size expression can be read and reads only known names."""
    known = set(known)
    try:
        unknown = sizes.names(sizes.read(text)) - known
    except (ValueError, SyntaxError):
        _fail(where, f"this {what} cannot be read", expected="integer arithmetic", found=text)
    if unknown:
        _fail(where, f"this {what} reads an unknown name", expected=", ".join(sorted(known)) or "integers", found=text)


# regions


@dataclass(frozen=True)
class _Tokens:
    """What a name holds that is a token set; `made` tells sets of one name apart."""

    made: int


@dataclass(frozen=True)
class _Rows:
    """What a name holds that came out of an `on` region: one row a token of the set."""

    tokens: _Tokens


_PLAIN = "a tensor"


@dataclass(frozen=True)
class _Place:
    """Where an op stands: what it can read, the loop indices around it, the key/value slots that are filled."""

    program: Program
    names: dict[str, Any]
    where: str = "the program"
    indices: Mapping[str, int] = field(default_factory=dict)
    slots: set[str] = field(default_factory=set)
    made: list[None] = field(default_factory=list)

    def below(self, where: str) -> _Place:
        """The same place, named more closely."""
        return replace(self, where=where if self.where == "the program" else f"{self.where}, {where}")

    def fail(self, what: str, *, expected: str = "", found: str = "", remedy: str = "") -> NoReturn:
        """Raise the error of this place."""
        _fail(self.where, what, expected=expected, found=found, remedy=remedy)

    def read(self, name: str) -> Any:
        """What a name holds."""
        if name not in self.names:
            expected = "one of " + ", ".join(sorted(self.names)[:20])
            self.fail(f"{name!r} is read before it is written, or is not visible here", expected=expected, found=name)
        return self.names[name]

    def plain(self, name: str) -> None:
        """Check that a name holds a tensor with all its tokens."""
        held = self.read(name)
        if held != _PLAIN:
            found = "a token set" if isinstance(held, _Tokens) else "the rows that an `on` region wrote"
            self.fail(f"{name!r} is read as a tensor with all tokens", expected=_PLAIN, found=found)

    def mask(self, name: str, type: Any) -> None:
        """Check that what a segment reads as a token set is a mask."""
        if not isinstance(type, Type) or type.dtype is not torch.bool or len(type.shape) != 2:
            self.fail(
                f"the token set {name!r} is read as another type", expected="bool[batch, tokens]", found=str(type)
            )

    def tokens(self, name: str) -> _Tokens:
        """The token set that a name holds."""
        held = self.read(name)
        if not isinstance(held, _Tokens):
            self.fail(f"{name!r} is read as a token set", expected="the result of select", found="a tensor")
        return held

    def count(self, what: str, expected: int, found: int) -> None:
        """Check a number of names."""
        if expected != found:
            self.fail(f"the number of {what} does not fit the body", expected=str(expected), found=str(found))


def _region(ops: Sequence[Op], place: _Place) -> None:
    for number, op in enumerate(ops):
        rule = _RULES.get(type(op))
        label = getattr(op, "layer", "") or getattr(op, "block", "") or getattr(op, "name", "")
        inner = place.below(f"op {number} ({type(op).__name__.lower()}{f' {label}' if label else ''})")
        if rule is None:
            inner.fail("this is not an op", expected=", ".join(c.__name__ for c in _RULES), found=type(op).__name__)
        rule(op, inner)


def _bind(body: Body, op: Segment | Call, place: _Place) -> None:
    """Reads, writes and parameters of an application against its body."""
    place.count("reads", len(body.inputs_of("value")), len(op.reads))
    place.count("writes", len(body.results), len(op.writes))
    for name, node in zip(op.reads, body.placeholders_of("value"), strict=True):
        if isinstance(op, Segment) and isinstance(place.read(name), _Tokens):
            place.mask(name, node.meta["input"].type)
        else:
            place.plain(name)
    _params(body, op.params, place)
    _unique(place.where, "write", op.writes)
    place.names.update(dict.fromkeys(op.writes, _PLAIN))


def _params(body: Body, names: Sequence[str], place: _Place) -> None:
    slots = body.inputs_of("param")
    place.count("parameters", len(slots), len(names))
    for slot, text in zip(slots, names, strict=True):
        name = _indexed(text, place)
        param = place.program.params.get(name)
        if param is None:
            place.fail(f"slot {slot.name!r} is bound to an unknown parameter", expected="a name of params", found=name)
        if param.type != slot.type:
            found = f"{param.type} ({name})"
            place.fail(f"slot {slot.name!r} is bound to another type", expected=str(slot.type), found=found)


def _indexed(text: str, place: _Place) -> str:
    """A name over loop indices as it is in this iteration."""
    try:
        return indexed(text, place.indices)
    except (KeyError, ValueError, SyntaxError, ArithmeticError):
        known = ", ".join(place.indices) or "no index here"
        place.fail("this name cannot be read", expected=f"expressions in braces over {known}", found=text)


def _segment(op: Segment, place: _Place) -> None:
    check_body(op.body, place.where)
    _bind(op.body, op, place)


def _call(op: Call, place: _Place) -> None:
    block = place.program.blocks.get(op.block)
    if block is None:
        place.fail("unknown block", expected=", ".join(place.program.blocks), found=op.block)
    place.count("constants", len(block.body.inputs_of("const")), len(op.consts))
    _bind(block.body, op, place)
    if op.grad is not None:
        _expression(place.where, "gradient condition", op.grad, place.indices)
    for plan in op.kv:
        _kv(plan, place)


def _kv(plan: Kv, place: _Place) -> None:
    known = plan.mode in ("fresh", "store", "read", "share", "update", "overlay")
    if not known or (plan.mode == "fresh") != (plan.slot == ""):
        expected = "fresh without a slot, or store, read, share, update, overlay with one"
        place.fail("this is not a key/value plan", expected=expected, found=f"{plan.mode} {plan.slot!r}")
    slot = _indexed(plan.slot, place)
    if plan.mode in ("read", "update") and slot not in place.slots:
        filled = ", ".join(sorted(place.slots)) or "no slot is filled here"
        place.fail(f"key/value slot {slot!r} is read before it is stored", expected=filled, found=f"{plan.mode} {slot}")
    if plan.mode in ("store", "share", "overlay"):
        place.slots.add(slot)


def _loop(op: Loop, place: _Place) -> None:
    if op.index in place.indices or not is_identifier(op.index):
        place.fail("a loop index is no new identifier", expected="another name", found=op.index)
    signature = place.program.signature
    known = {n for leaf in signature.inputs if leaf.type for n in leaf.type.size_names()} | signature.ranges.keys()
    _expression(place.where, "loop count", str(op.count), known | place.indices.keys())
    try:
        count = sizes.evaluate(op.count, place.indices)
    except KeyError:
        count = _UNKNOWN_COUNT
    if count < 0:
        place.fail("a loop count is negative", expected="0 or more", found=str(op.count))
    for index in range(max(1, min(count, _MOST_ITERATIONS))):
        inner = replace(place.below(f"{op.index} = {index}"), indices={**place.indices, op.index: index})
        _region(op.body, inner)
    if op.until is not None:
        place.plain(op.until)


def _select(op: Select, place: _Place) -> None:
    for text in (op.rule, op.inference):
        if text is not None:
            _rule(text, op, place)
    if op.judge is not None and op.inference is None:
        place.fail("only a rule for inference has a judge", expected='inference="threshold(0)"', found=op.judge)
    for value in filter(None, (op.score, op.judge, op.within)):
        place.plain(value)
    for tokens in filter(None, (op.among, op.of)):
        place.tokens(tokens)
    place.made.append(None)
    place.names[op.write] = _Tokens(len(place.made))


def _rule(text: str, op: Select, place: _Place) -> None:
    try:
        name, number = read_rule(text, place.indices)
    except KeyError as error:
        known = ", ".join(place.indices) or "numbers alone"
        place.fail(f"a rule reads an unknown name {error}", expected=known, found=text)
    except (ValueError, SyntaxError, IndexError):
        name, number = "", 0.0
    legal = {"stride": number >= 1 and number == int(number), "topk": 0 < number <= 1} if math.isfinite(number) else {}
    if not name or not legal.get(name, name not in ("stride", "topk")):
        expected = "all, stride(q), topk(c) with 0 < c <= 1, threshold(x) or atleast(r)"
        place.fail("this is not a selection rule", expected=expected, found=text)
    if op.score is None and (op.among is None or name in ("topk", "threshold", "atleast")):
        place.fail("this rule needs a score, if only for its shape", expected="score=value", found=text)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _on(op: On, place: _Place) -> None:
    tokens = place.tokens(op.tokens)
    for name in op.reads:
        if isinstance(place.read(name), _Tokens):
            place.fail(f"a region reads the token set {name!r}", expected="tensors", found=name)
    if any(isinstance(inner, On) for inner, _ in walk(op.body)):
        expected = "regions side by side, with sets selected among each other"
        place.fail("a region lies inside another one", expected=expected, found="on")
    _unique(place.where, "write", op.writes)
    visible = {name: place.names[name] for name in op.reads}
    inner = replace(place, names=visible)
    _region(op.body, inner)
    for name in op.writes:
        inner.plain(name)
        place.names[name] = _Rows(tokens)


def _merge(op: Merge, place: _Place) -> None:
    tokens = place.tokens(op.tokens)
    place.plain(op.read)
    if place.read(op.value) != _Rows(tokens):
        expected = f"a value that an `on` region over {op.tokens!r} wrote"
        place.fail(f"{op.value!r} does not hold the rows of {op.tokens!r}", expected=expected, found=op.value)
    for name in op.extra:
        place.plain(name)
    if op.combine is not None:
        check_body(op.combine, place.where)
        place.count("values", len(op.combine.inputs_of("value")), 2 + len(op.extra))
        place.count("results", len(op.combine.results), 1)
        _params(op.combine, op.params, place)
    elif op.extra or op.params:
        place.fail("a merge without a body reads values or parameters", expected="neither", found=str(op.extra))
    place.names[op.write] = _PLAIN


def _tap(op: Tap, place: _Place) -> None:
    place.read(op.read)
    _indexed(op.name, place)


_RULES: dict[type, Callable[[Any, _Place], None]] = {
    Call: _call,
    Segment: _segment,
    Loop: _loop,
    Select: _select,
    On: _on,
    Merge: _merge,
    Tap: _tap,
}
