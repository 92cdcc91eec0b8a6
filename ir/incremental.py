"""Incremental evaluation: a prompt, then further tokens, with caches derived from the attention ports.

How the values of a program behave is in `depthc.ir.plans`; the evaluation of some new tokens in `depthc.ir.steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from depthc.ir.continuation import extended
from depthc.ir.errors import IncrementalError, InputError
from depthc.ir.plans import plan_of
from depthc.ir.program import Program, Segment, Stack
from depthc.ir.signature import bind, unbind
from depthc.ir.steps import Kept, Steps


@dataclass(frozen=True, eq=False)
class Past:
    """What later tokens need of earlier ones. Immutable: a step returns a new one, so a past can be forked.

    Attributes:
        length: tokens so far.
        arguments: the model's arguments so far, by parameter name, at full length.
        fixed: values that no later token changes.
        caches: what the attention ports of every application keep, by call site and loop indices, or by the name of
            a key/value slot.
        stream: the first layer's input so far; later tokens must not change it.
        recurrent: whether the last stack alone has run since the prompt (see `depthc.ir.recurrent`).
    """

    length: int
    arguments: Mapping[str, Any]
    fixed: Mapping[str, Any]
    caches: Mapping[str, Kept]
    stream: Tensor | None = None
    recurrent: bool = False

    @property
    def cache_bytes(self) -> int:
        """Bytes that the attention ports keep."""
        tensors = [t for kept in self.caches.values() for cache in kept.caches for t in cache or ()]
        return sum(t.numel() * t.element_size() for t in tensors)


def start(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Past]:
    """Evaluate a prompt: the outputs at all its tokens, and the past.

    Raises:
        IncrementalError: later tokens would change earlier ones (not causal), or a block has a state that is not an
            attention cache; says which and where.
        InputError: arguments that were not captured.
    """
    plan_of(program)
    return advance(program, Past(0, bind(program.signature.parameters, args, kwargs), {}, {}))


def step(program: Program, past: Past, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Past]:
    """Evaluate further tokens: the outputs at these tokens, and the new past.

    Args:
        past: of `start` or an earlier step.
        args, kwargs: the arguments that grow with the tokens (token ids, masks), for the new tokens only. A mask over
            queries and keys has a row a new token and a column a token so far.

    Raises:
        IncrementalError: an argument that grows is missing, or one that does not was given.
    """
    return advance(program, continued(program, past, args, kwargs))


def continued(
    program: Program, past: Past, args: Sequence[Any], kwargs: Mapping[str, Any], recurrent: bool = False
) -> Past:
    """A past with the arguments of further tokens, which are still to be evaluated; see `step`.

    Args:
        recurrent: whether the last stack alone will evaluate them.
    """
    if past.recurrent and not recurrent:
        raise IncrementalError(
            "the last stack alone has run since the prompt",
            expected="a past of all stacks",
            found="one of a recurrent step, which lacks what the others make",
            remedy="go on with recurrent steps, or start again",
        )
    plan = plan_of(program)
    given = bind(program.signature.parameters, args, kwargs)
    arguments = dict(past.arguments)
    for name in plan.growing:
        if name in arguments and given.get(name) is None:
            raise IncrementalError(
                f"argument {name!r} grows with the tokens and is missing",
                expected=", ".join(n for n in plan.growing if n in arguments),
                found=", ".join(given),
                remedy=f"pass the part of {name!r} that belongs to the new tokens",
            )
    for name, value in given.items():
        if name not in plan.growing:
            raise IncrementalError(
                f"argument {name!r} does not grow with the tokens",
                expected=", ".join(plan.growing),
                found=name,
                remedy="pass it to start() alone",
            )
        arguments[name] = extended(arguments[name], value, plan.growing[name])
    return replace(past, arguments=arguments)


def advance(program: Program, past: Past, steps: Callable[..., Steps] = Steps) -> tuple[Any, Past]:
    """Evaluate the tokens that a past has arguments of, but not yet more: the outputs, and the new past.

    Args:
        steps: evaluates them: `Steps`, or a class like it.
    """
    values, after = advanced(program, past, plan_of(program).body, steps)
    return program.signature.unflatten(values), after


def advanced(
    program: Program, past: Past, body: Sequence[Segment | Stack], steps: Callable[..., Steps] = Steps
) -> tuple[dict[str, Any], Past]:
    """Evaluate a part of the program's body as `advance` does: all values by name, and the new past."""
    if False not in program.modes:
        raise InputError("the program was captured in train mode only", remedy="capture the model again in eval mode")
    tensors = program.signature.flatten(*unbind(program.signature.parameters, past.arguments))
    plan = plan_of(program)
    length = program.signature.size_values(tensors)[plan.token]
    run = steps(program, plan, past, tensors, length)
    for item in body:
        run.ops(item.ops if isinstance(item, Stack) else (item,), item.name, {})
    fixed = {name: value for name, value in run.values.items() if plan.kinds.get(name) == "fixed"}
    return run.values, Past(length, past.arguments, fixed, run.caches, run.stream)
