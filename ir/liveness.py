"""Liveness: a program without what only its taps read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from depthc.ir.program import Call, Loop, Merge, On, Op, Program, Segment, Select, Stack, Tap


def without_taps(program: Program) -> Program:
    """The program without taps, and without ops that only they need (losses)."""
    body, _ = live_body(program.body, {output for output in program.signature.outputs if isinstance(output, str)})
    return replace(program, body=body)


def live_body(items: Sequence[Segment | Stack], live: set[str]) -> tuple[tuple[Segment | Stack, ...], set[str]]:
    """The segments, and of stacks the ops that values `live` at the end need; and what must be there before."""
    body: list[Segment | Stack] = []
    for item in reversed(items):
        if isinstance(item, Stack):
            ops, live = _live(item.ops, live)
            body.append(replace(item, ops=ops))
        else:
            body.append(item)
            live = live - {*item.writes} | {*item.reads}
    return tuple(reversed(body)), live


def _live(ops: Sequence[Op], after: set[str]) -> tuple[tuple[Op, ...], set[str]]:
    """The ops that values read afterwards need, and what must be there before them."""
    kept: list[Op] = []
    for op in reversed(ops):
        reads, writes = reads_of(op), writes_of(op)
        if isinstance(op, Tap) or not writes & after:
            continue
        if isinstance(op, Loop):
            op, inner = _live_loop(op, after)
            after = after | inner  # it may run no iteration
        elif isinstance(op, On):
            body, inner = _live(op.body, writes & after)
            op = replace(op, body=body, writes=tuple(w for w in op.writes if w in after))
            after = after - writes | {op.tokens} | (reads & inner)
            op = replace(op, reads=tuple(r for r in op.reads if r in inner))
        else:
            after = after - writes | reads
        kept.append(op)
    return tuple(reversed(kept)), after


def _live_loop(op: Loop, after: set[str]) -> tuple[Loop, set[str]]:
    """What an iteration hands to the next is read as well."""
    needed = after | ({op.until} if op.until else set())
    while True:
        body, before = _live(op.body, needed)
        if before <= needed:
            return replace(op, body=body), before
        needed = needed | before


def read_first(ops: Sequence[Op]) -> tuple[str, ...]:
    """The names that ops read before they write them."""
    read: dict[str, None] = {}
    written: set[str] = set()
    for op in ops:
        read.update(dict.fromkeys(sorted(reads_of(op) - written)))
        written |= writes_of(op)
    return tuple(read)


def reads_of(op: Op) -> set[str]:
    """The names that an op reads, at its outside."""
    match op:
        case Call() | Segment():
            return set(op.reads)
        case On():
            return {op.tokens, *op.reads}
        case Select():
            return set(op.reads)
        case Merge():
            return {op.read, op.value, op.tokens, *op.extra, *filter(None, (op.over,))}
        case Tap():
            return {op.read}
    until = {op.until} if op.until else set()
    return {*read_first(op.body), *(until - set().union(*map(writes_of, op.body)))}


def writes_of(op: Op) -> set[str]:
    """The names that an op writes, at its outside."""
    match op:
        case Call() | Segment() | On():
            return set(op.writes)
        case Select() | Merge():
            return {op.write}
        case Loop():
            return set().union(*map(writes_of, op.body))
    return set()
