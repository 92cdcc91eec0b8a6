"""loop: equal applications in a row become a loop over one of them."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import ClassVar

from depthc.ir.names import Names
from depthc.ir.program import Call, Op, Program, Segment, calls
from depthc.ir.program import Loop as LoopOp
from depthc.passes.base import Pass
from depthc.passes.glue import Glue
from depthc.passes.layers import names_in, stack_of, unrolled, with_stack


@dataclass(frozen=True)
class Loop(Pass):
    """Roll what a stack repeats with the same parameters into loops: the program computes the same and is shorter.

    Options:
        stack: name or number; the last one by default.
        name: of the loops' index.
    """

    preserves_numerics: ClassVar[bool] = True

    stack: int | str | None = None
    name: str = "r"

    def apply(self, program: Program) -> Program:
        """The program with loops in it."""
        stack = stack_of(self, program, self.stack)
        return with_stack(program, stack, shortest(program, stack.ops, self.name))


def shortest(program: Program, ops: Sequence[Op], wish: str, period: int = 0) -> tuple[Op, ...]:
    """`rolled`; where fewer layers are left to write if the first reads under the name that it writes, it does."""
    trained = {name for name, p in program.params.items() if p.kind == "parameter"}
    plain = tuple(unrolled(ops))
    ways = [ops, entered(program, plain)] if all(isinstance(op, Call | Segment) for op in plain) else [ops]
    done = [rolled(way, Names(names_in(program)), trained, wish, period) for way in ways]
    return min(done, key=lambda way: sum(1 for _ in calls(way)))


def entered(program: Program, ops: Sequence[Op]) -> Sequence[Op]:
    """The ops with what the first layer gets bound to the names that layers write, so that it reads as the others do.

    A model whose layers take its argument as it is has `y = layer(x)`, then `y = layer(y)`: no two equal ops.
    """
    at = next((i for i, op in enumerate(ops) if isinstance(op, Call)), None)
    if at is None:
        return ops
    first: Call = ops[at]  # type: ignore[assignment]
    block = program.blocks[first.block]
    inside, sides = first.writes[: block.carries], first.reads[block.carries :]
    outside = first.reads[: block.carries]
    if inside == outside or not set(inside).isdisjoint((*outside, *sides)):
        return ops
    g = Glue()
    types = [node.meta["input"].type for node in block.body.placeholders_of("value")]
    body = g.body(*(g.value(name, type) for name, type in zip(inside, types, strict=False)))
    enter = Segment("enter", body, outside, inside)
    return (*ops[:at], enter, replace(first, reads=(*inside, *sides)), *ops[at + 1 :])


def rolled(ops: Sequence[Op], names: Names, trained: Set[str], wish: str = "r", period: int = 0) -> tuple[Op, ...]:
    """Ops with repeats as loops: at each place the repeat that covers most ops, the shortest period first.

    A repeat applies the same `trained` parameters again, though not all of them need be the same. `period` asks for
    repeats of that length alone.
    """
    done: list[Op] = []
    at = 0
    while at < len(ops):
        length, count = _best(ops, at, period, trained)
        if count > 1:
            index = names.new(wish)
            rows = [ops[at + k * length : at + (k + 1) * length] for k in range(count)]
            body = tuple(_merged(column, index) or column[0] for column in zip(*rows, strict=True))
            done.append(LoopOp(index, count, body))
        else:
            done.append(ops[at])
        at += length * count
    return tuple(done)


def _best(ops: Sequence[Op], at: int, period: int, trained: Set[str]) -> tuple[int, int]:
    """(period, count) of the repeat that starts at a place; (1, 1) if none does."""
    best = (1, 1)
    for length in (period,) if period else range(1, (len(ops) - at) // 2 + 1):
        count = 1
        while _repeats(ops, at, length, count + 1, trained):
            count += 1
        if count > 1 and length * count > best[0] * best[1]:
            best = (length, count)
    return best


def _repeats(ops: Sequence[Op], at: int, length: int, count: int, trained: Set[str]) -> bool:
    """Whether `count` periods from a place on are iterations of one loop."""
    if at + length * count > len(ops):
        return False
    columns = [[ops[at + k * length + i] for k in range(count)] for i in range(length)]
    shared = {p for column in columns for p in set.intersection(*(set(getattr(op, "params", ())) for op in column))}
    return not shared.isdisjoint(trained) and all(_merged(column, "r") is not None for column in columns)


def _merged(column: Sequence[Op], index: str) -> Op | None:
    """One op that is each of these in its iteration, with what grows in parameter names written over the index."""
    first = column[0]
    if not isinstance(first, Call | Segment):
        return first if all(op == first for op in column) else None
    if any(not isinstance(op, type(first)) or replace(op, params=first.params) != first for op in column):
        return None
    params = [_over(names, index) for names in zip(*(op.params for op in column), strict=True)]  # type: ignore[union-attr]
    if any(p is None for p in params):
        return None
    return replace(first, params=tuple(params), **({"layer": ""} if isinstance(first, Call) else {}))  # type: ignore[arg-type]


def _over(names: Sequence[str], index: str) -> str | None:
    """A name over the index that is each of these in its iteration; None if there is none.

    Example:
        >>> _over(["a.1.w", "a.3.w"], "r")
        'a.{2 * r + 1}.w'
    """
    if len(set(names)) == 1:
        return names[0]
    parts = [re.split(r"(\d+)", name) for name in names]
    if any(len(p) != len(parts[0]) or p[::2] != parts[0][::2] for p in parts):
        return None
    columns = list(zip(*parts, strict=True))
    texts = [_linear([int(n) for n in column], index) if i % 2 else column[0] for i, column in enumerate(columns)]
    return None if None in texts else "".join(map(str, texts))


def _linear(numbers: Sequence[int], index: str) -> str | None:
    start, step = numbers[0], numbers[1] - numbers[0]
    if any(n != start + k * step for k, n in enumerate(numbers)):
        return None
    if not step:
        return str(start)
    term = index if step == 1 else f"{step} * {index}"
    return f"{{{term}}}" if not start else f"{{{term} + {start}}}"
