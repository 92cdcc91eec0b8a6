"""The layers of a stack as passes see them: its applications of blocks in order, with loops written out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from depthc.ir.evaluate import indexed
from depthc.ir.program import Call, Loop, On, Op, Program, Segment, Stack
from depthc.passes.base import Pass


def stack_of(one: Pass, program: Program, which: int | str | None) -> Stack:
    """The stack that a pass works on: by name or number; None is the last one, an encoder-decoder's decoder."""
    stacks = program.stacks
    found = [s for i, s in enumerate(stacks) if which in (s.name, i) or (which is None and i == len(stacks) - 1)]
    if not found:
        names = ", ".join(f"{i} ({s.name!r})" for i, s in enumerate(stacks))
        raise one.refuse(
            "there is no such stack",
            expected=names,
            found=repr(which),
            remedy="name one of these" if stacks else "capture a model with repeated layers",
        )
    return found[0]


def with_stack(program: Program, old: Stack, ops: Sequence[Op]) -> Program:
    """The program with other ops in one of its stacks."""
    body = tuple(replace(old, ops=tuple(ops)) if item is old else item for item in program.body)
    return replace(program, body=body)


def unrolled(ops: Sequence[Op], indices: Mapping[str, int] | None = None) -> Iterator[Op]:
    """Ops with every loop of a static count written out."""
    for op in ops:
        if isinstance(op, Loop) and isinstance(op.count, int) and op.until is None:
            for index in range(op.count):
                yield from unrolled(op.body, {**(indices or {}), op.index: index})
        elif isinstance(op, Call | Segment) and indices:
            yield replace(op, params=tuple(indexed(p, indices) for p in op.params))
        else:
            yield op


def layers_of(one: Pass, stack: Stack) -> tuple[list[Op], list[int]]:
    """The ops of a stack with loops written out, and the places of its layers among them."""
    ops = list(unrolled(stack.ops))
    for op in ops:
        if not isinstance(op, Call | Segment):
            raise one.refuse(
                f"the stack {stack.name!r} has been rewritten before",
                expected="layers alone",
                found=f"{type(op).__name__.lower()} in it",
                remedy=_remedy(one, stack),
            )
    return ops, [i for i, op in enumerate(ops) if isinstance(op, Call)]


def _remedy(one: Pass, stack: Stack) -> str:
    """What to do about a stack in which tokens are chosen."""
    if one.chooses:
        return f"leave out {one.title}, or what chose tokens before it: a stack chooses its tokens once"
    looped = any(isinstance(op, Loop) for op in stack.ops)
    again = "; if that leaves no loop to route, use mod(), which needs none" if looped else ""
    return f"put {one.title} earlier in the recipe{again}"


def require_one_stream(one: Pass, program: Program, ops: Sequence[Op], layers: Sequence[Call], remedy: str) -> None:
    """Refuse layers between which more flows than one state of [batch, tokens, features]; `remedy` says what to do."""
    runs = streams_of(one, program, ops, layers, remedy)
    if len(runs) > 1:
        raise one.refuse(
            f"the layers form {len(runs)} staggered stacks, each with a state of its own",
            where=runs[1][0].layer or runs[1][0].block,
            expected="one state that goes through all layers",
            found=", ".join(run[0].writes[0] for run in runs),
            remedy=f"put {one.title} earlier in the recipe, and once",
        )


def streams_of(one: Pass, program: Program, ops: Sequence[Op], layers: Sequence[Call], remedy: str) -> list[list[Call]]:
    """Layers by the state of [batch, tokens, features] that they pass on; of staggered stacks a list each.

    A later list begins with a layer that takes the state of the list before as a memory, which it hands on as it is.

    Raises:
        RecipeError: more flows between the layers, or there are other ops; `remedy` says what to do.
    """
    if between := segments_between(ops):
        again = f"put {one.title} earlier in the recipe, and once"
        what = f"there are other ops between the layers: {between[0].name}"
        raise one.refuse(what, expected="layers alone", found=between[0].name, remedy=again)
    runs: list[list[Call]] = []
    for call in layers:
        before = runs[-1][-1] if runs else None
        goes_on = before is not None and (call.reads[0], call.writes[0]) == (before.writes[0],) * 2
        begins = before is None or before.writes[0] in call.writes[1:]
        if not _passes_one_stream(program, call) or not (goes_on or begins):
            raise one.refuse(
                "a layer does more than pass one stream on",
                where=call.layer or call.block,
                expected="one state of [batch, tokens, features], which the next layer alone reads",
                found=f"reads {', '.join(call.reads)}, writes {', '.join(call.writes)}",
                remedy=remedy,
            )
        runs = [*runs[:-1], [*runs[-1], call]] if goes_on else [*runs, [call]]
    return runs


def segments_between(ops: Sequence[Op]) -> list[Segment]:
    """The segments between the first and the last layer."""
    places = [i for i, op in enumerate(ops) if isinstance(op, Call)]
    return [op for op in ops[places[0] : places[-1]] if isinstance(op, Segment)] if places else []


def _passes_one_stream(program: Program, call: Call) -> bool:
    """Whether a layer computes one state of rank 3, and hands others on as they are."""
    block = program.blocks[call.block]
    values, count = block.body.placeholders_of("value"), len(call.writes)
    rank = len(values[0].meta["input"].type.shape)
    handed_on = call.writes[1:] == call.reads[1:count] and list(block.body.results[1:]) == list(values[1:count])
    return not call.kv and rank == 3 and block.carries == count and handed_on


def names_in(program: Program) -> set[str]:
    """Every name of a value, an index or a tap, which a pass must not take for something else."""

    def walk(ops: Sequence[Op | Segment | Stack]) -> Iterator[str]:
        for op in ops:
            for name in ("reads", "writes", "extra"):
                yield from getattr(op, name, ())
            for name in ("write", "read", "value", "tokens", "over", "index", "name"):
                yield from filter(None, (getattr(op, name, None),))
            yield from walk(getattr(op, "body", ()) if isinstance(op, Loop | On) else getattr(op, "ops", ()))

    return {*walk(program.body), *(leaf.name for leaf in program.signature.inputs)}


def without_unused_params(program: Program, kept: set[str]) -> Program:
    """The program without the parameters that no op reads any more; `kept` were read by none before."""
    used = kept | used_params(program)
    return replace(program, params={n: p for n, p in program.params.items() if n in used})


def used_params(program: Program) -> set[str]:
    """The parameters that ops read, in any iteration of the loops around them."""

    def walk(ops: Sequence[Op | Segment | Stack], indices: Mapping[str, int]) -> Iterator[str]:
        for op in ops:
            yield from (indexed(p, indices) for p in getattr(op, "params", ()))
            if isinstance(op, Loop):
                for index in range(op.count if isinstance(op.count, int) else 1):
                    yield from walk(op.body, {**indices, op.index: index})
            elif isinstance(op, On | Stack):
                yield from walk(op.body if isinstance(op, On) else op.ops, indices)

    return set(walk(program.body, {}))
