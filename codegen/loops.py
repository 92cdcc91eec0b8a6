"""Loops: the body of a loop as a function of its own, for drivers that decide themselves how often it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from depthc.ir.errors import InputError
from depthc.ir.evaluate import Evaluator
from depthc.ir.liveness import read_first, writes_of
from depthc.ir.names import closest
from depthc.ir.program import Loop, Op, Program, Stack
from depthc.ir.signature import device_of

State = dict[str, Any]


class LoopBody:
    """One loop of a program, iteration by iteration.

    Attributes:
        count: how often the program runs the body.
        carried: the names of the values that an iteration hands to the next.
        read: the names of what every iteration reads and none writes.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), *[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> x = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> compiled = depthc.compile(model, "tie", args=(x,), loops=2)
        >>> core = compiled.loop("r")
        >>> state, reads = core.enter(x)
        >>> for r in range(core.count):
        ...     state, past = core.step(state, reads, r)
        >>> bool((core.leave(state, reads) == compiled(x)).all())
        True
    """

    def __init__(self, program: Program, name: str, evaluator: Callable[[torch.device], Evaluator]) -> None:
        self.program, self._evaluator = program, evaluator
        loops = {op.index: (stack, op) for stack in program.stacks for op in stack.ops if isinstance(op, Loop)}
        if name not in loops:
            near = closest(name, loops)
            raise InputError(
                f"there is no loop {name!r}",
                expected=", ".join(loops) or "a program with loops",
                found=name,
                remedy=f"use {near!r}" if near else "compile with a recipe that makes one",
            )
        self._stack, self.op = loops[name]
        self.count = self.op.count
        reads, writes = read_first(self.op.body), set().union(*map(writes_of, self.op.body))
        self.carried = tuple(n for n in reads if n in writes)
        self.read = tuple(n for n in reads if n not in writes)

    def enter(self, *args: Any, **kwargs: Any) -> tuple[State, State]:
        """(state, reads) before the first iteration, from the model's own arguments."""
        tensors = self.program.signature.flatten(args, kwargs)
        values: State = dict(tensors)
        evaluator = self._evaluator(device_of(tensors))
        sizes = self.program.signature.size_values(tensors)
        evaluator.ops(self._around()[0], values, sizes)
        return {n: values[n] for n in self.carried}, {n: v for n, v in values.items() if n not in self.carried}

    def step(
        self, state: Mapping[str, Any], reads: Mapping[str, Any], r: int, past: Mapping[str, Any] | None = None
    ) -> tuple[State, State]:
        """(state, past) after iteration `r`.

        Args:
            state: the carried values: of `enter`, or of the step before.
            reads: what the body reads beside them.
            past: the key/value slots that earlier iterations filled.
        """
        values = {**reads, **state}
        evaluator = self._evaluator(next(v.device for v in state.values() if isinstance(v, torch.Tensor)))
        evaluator.slots = dict(past or {})
        evaluator.ops(self.op.body, values, {self.op.index: r})
        return {n: values[n] for n in self.carried}, evaluator.slots

    def leave(self, state: Mapping[str, Any], reads: Mapping[str, Any]) -> Any:
        """The model's output, from the state after the last iteration."""
        values = {**reads, **state}
        evaluator = self._evaluator(next(v.device for v in state.values() if isinstance(v, torch.Tensor)))
        evaluator.ops(self._around()[1], values, {})
        return self.program.signature.unflatten(values)

    def _around(self) -> tuple[list[Op], list[Op]]:
        """The ops before and behind the loop."""
        ops: list[Op] = []
        at = 0
        for item in self.program.body:
            if item is self._stack:
                at = len(ops) + self._stack.ops.index(self.op)
            ops.extend(item.ops if isinstance(item, Stack) else (item,))
        return ops[:at], ops[at + 1 :]
