"""The bodies of a program as functions of its text, and how its ops bind their slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from types import MappingProxyType
from typing import Any, Literal

from depthc.ir.body import Body
from depthc.ir.evaluate import indexed
from depthc.ir.names import Names
from depthc.ir.params import Param
from depthc.ir.program import Block, Call, Loop, Merge, On, Op, Program, Segment, Stack
from depthc.ir.sizes import Size
from depthc.ir.text.syntax import unique

FunctionKind = Literal["block", "segment", "glue"]

_MOST_ITERATIONS = 4096
_NO_LOOPS: Mapping[str, Size] = MappingProxyType({})


@dataclass
class Function:
    """A body under a name: a block, the body of equal segments, or the glue of a merge.

    Attributes:
        label: the name of the function in the text.
        name: the block's or segment's own name.
        slots: names of its parameter slots.
        kinds: the usual kind of the parameters bound to each slot ("parameter", "buffer", ...).
        results: what its first use calls its results.
        bindings: the parameter names of every use, and the counts of the loops around it by index.
    """

    label: str
    kind: FunctionKind
    name: str
    body: Body
    carries: int = 1
    results: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    bindings: list[tuple[tuple[str, ...], Mapping[str, Size]]] = field(default_factory=list)

    def derived(self) -> Iterator[tuple[str, Param]]:
        """Parameters as its slots declare them, for every bound name."""
        types = [i.type for i in self.body.inputs_of("param")]
        for names, loops in self.bindings:
            for text, type, kind in zip(names, types, self.kinds, strict=False):
                for name in _iterations(text, loops):
                    yield name, Param(type, kind)  # type: ignore[arg-type]


def _iterations(text: str, loops: Mapping[str, Size]) -> Iterator[str]:
    """A name over loop indices as it is in every iteration; nothing where that is not static."""
    counts = [count for count in loops.values() if isinstance(count, int)]
    if "{" not in text:
        yield text
    elif len(counts) == len(loops) and prod(counts) <= _MOST_ITERATIONS:
        for indices in product(*map(range, counts)):
            yield indexed(text, dict(zip(loops, indices, strict=True)))


def derived_params(functions: Iterable[Function]) -> dict[str, Param]:
    """All parameters that the functions' slots declare; the first use of a name decides."""
    found: dict[str, Param] = {}
    for function in functions:
        for name, param in function.derived():
            found.setdefault(name, param)
    return found


def collect(program: Program, taken: Iterable[str]) -> dict[tuple[str, Any], Function]:
    """The functions of a program in the order of their first use, by ("block", name) or (kind, body)."""
    functions: dict[tuple[str, Any], Function] = {}
    names = Names(taken)
    for op, loops in walk(program.body):
        use = _use(op, program.blocks)
        if use is None:
            continue
        kind, name, body, carries, results = use
        key = function_key(op)
        if key not in functions:
            functions[key] = Function(names.new(name), kind, name, body, carries, results)
        functions[key].bindings.append((op.params, loops))  # type: ignore[union-attr]
    for function in functions.values():
        function.slots = _slots(function)
        function.kinds = _kinds(function, program.params)
    return functions


def walk(items: Sequence[Op | Stack], loops: Mapping[str, Size] = _NO_LOOPS) -> Iterator[tuple[Op, Mapping[str, Size]]]:
    """Every op below some ops or stacks, outer ones first, with the counts of the loops around it by index."""
    for item in items:
        if isinstance(item, Stack):
            yield from walk(item.ops, loops)
            continue
        yield item, loops
        if isinstance(item, Loop):
            yield from walk(item.body, {**loops, item.index: item.count})
        elif isinstance(item, On):
            yield from walk(item.body, loops)


def function_key(op: Any) -> tuple[str, Any]:
    """Which function an op applies."""
    if isinstance(op, Call):
        return "block", op.block
    return ("segment", op.body) if isinstance(op, Segment) else ("glue", op.combine)


def _use(op: Op, blocks: Mapping[str, Block]) -> tuple[FunctionKind, str, Body, int, tuple[str, ...]] | None:
    match op:
        case Call(block=name) if name in blocks:
            return "block", name, blocks[name].body, blocks[name].carries, ()
        case Segment(name=name, body=body, writes=writes):
            return "segment", name, body, 1, writes
        case Merge(combine=Body() as body, write=write):
            return "glue", "combine", body, 1, (write,)
    return None


def _slots(function: Function) -> tuple[str, ...]:
    """Slot names. A segment's are the parameters themselves where all its uses bind the same ones."""
    names = [i.name for i in function.body.inputs_of("param")]
    uses = list(dict.fromkeys(params for params, _ in function.bindings))
    if function.kind != "block":
        varies = len(uses) > 1 or any("{" in name for name in uses[0])
        names = (_relative(uses[0], uses[-1]) or names) if varies else list(uses[0])
    return tuple(unique(names))


def _relative(first: Sequence[str], second: Sequence[str]) -> list[str] | None:
    """What follows the part in which two bindings differ, or in which there is a loop index."""
    slots = []
    for a, b in zip(first, second, strict=False):
        left, right = a.split("."), b.split(".")
        apart = [i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y][:1]
        differ = max([i for i, x in enumerate(left) if "{" in x] + apart, default=-1)
        slots.append(".".join(left[differ + 1 :]))
    return slots if all(slots) and len(set(slots)) == len(slots) else None


def _kinds(function: Function, params: Mapping[str, Param]) -> tuple[str, ...]:
    """The kind that most parameters of every slot have."""
    kinds = []
    for bound in zip(*(params for params, _ in function.bindings), strict=False):
        found = Counter(params[name].kind for name in bound if name in params)
        kinds.append(found.most_common(1)[0][0] if found else "parameter")
    return tuple(kinds)


def prefix_of(slots: Sequence[str], params: Sequence[str]) -> str | None:
    """The prefix under which most slots find their parameter: "" for the slot's own name, None if there is none."""
    found: Counter[str] = Counter()
    for slot, name in zip(slots, params, strict=False):
        if name == slot:
            found[""] += 1
        elif name.endswith(f".{slot}"):
            found[name.removesuffix(f".{slot}")] += 1
    return found.most_common(1)[0][0] if found else None


def bound_name(prefix: str, slot: str) -> str:
    """The parameter of a slot under a prefix."""
    return f"{prefix}.{slot}" if prefix else slot
