"""Evaluate: what a program means. Plain torch, op by op; every other lowering is compared with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from depthc.ir import sizes
from depthc.ir.body import Body, interpret
from depthc.ir.errors import InputError
from depthc.ir.params import STEP, value_of
from depthc.ir.program import Call, Loop, Merge, On, Op, Program, Segment, Select, Stack, Tap
from depthc.ir.rows.run import run_rows
from depthc.ir.selection import select
from depthc.ir.signature import device_of
from depthc.ir.tokens import TokenSet


def run(
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    training: bool = False,
    step: int | None = None,
) -> Any:
    """Evaluate a program on the arguments of its model; see `Program.run`.

    Args:
        training: whether the rules of training select tokens, and dropout drops.
        step: the optimizer steps taken so far, where capacities warm up; None: they have.

    Raises:
        InputError: arguments that were not captured (structure, shape, dtype), or a mode that was not.
        StateDictError: a weight that the program needs is missing.
    """
    if training not in program.modes:
        raise InputError(
            f"the program was captured in {'eval' if training else 'train'} mode only",
            expected="train and eval mode that agree up to dropout",
            remedy="capture again in the mode that you run",
        )
    tensors = program.signature.flatten(args, kwargs)
    param: Callable[[str], Tensor] = WeightParams(program)
    if step is not None:
        param = partial(_at_step, param, torch.tensor(step))
    evaluator = Evaluator(program, param, device_of(tensors), training, step=step)
    values = evaluator.run(program.body, dict(tensors), program.signature.size_values(tensors))
    return program.signature.unflatten(values)


def _at_step(param: Callable[[str], Tensor], step: Tensor, name: str) -> Tensor:
    return step if name == STEP else param(name)


class WeightParams:
    """A program's parameters, evaluated from its weights, each once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._made: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self._made:
            self._made[name] = value_of(name, self.program.params[name], self.program.weights)
        return self._made[name]


class Evaluator:
    """Walks ops over an environment of named values.

    Args:
        program: whose blocks are called.
        param: the parameter of a name.
        device: what `device` means in the bodies.
        training: what `training` means in the bodies.
        run_body: runs a body on its inputs; node by node unless a lowering has something faster.
        selection: which rule of `Select` counts outside of training: the one for "inference", or that of "training".
        step: the optimizer steps taken so far, where capacities warm up; None: they have.
    """

    def __init__(
        self,
        program: Program,
        param: Callable[[str], Tensor],
        device: torch.device,
        training: bool = False,
        run_body: Callable[[Body, Sequence[Any]], Sequence[Any]] = interpret,
        selection: str = "inference",
        step: int | None = None,
    ) -> None:
        self.program, self.param, self.device, self.training, self.run_body = program, param, device, training, run_body
        self.selection, self.step = "training" if training else selection, step
        self.run_rows: Callable[..., Any] = run_rows
        self.taps: dict[str, Any] = {}
        self.slots: dict[str, Any] = {}

    def run(
        self, body: Sequence[Segment | Stack], values: dict[str, Any], sizes: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """Run a program's body; `values` is extended and returned. `sizes` are what loop counts may read."""
        for item in body:
            self.ops(item.ops if isinstance(item, Stack) else (item,), values, sizes or {})
        return values

    def ops(self, ops: Sequence[Op], values: dict[str, Any], indices: Mapping[str, int]) -> None:
        """Run ops in order under the given loop indices."""
        for op in ops:
            match op:
                case Segment() | Call():
                    self.apply(op, values, indices)
                case Loop():
                    self.loop(op, values, indices)
                case Select():
                    values[op.write] = self.select(op, values, indices)
                case On():
                    self.on(op, values, indices)
                case Merge():
                    self.merge(op, values, indices)
                case Tap(name=name, read=read):
                    self.taps[indexed(name, indices)] = values[read]

    def loop(self, op: Loop, values: dict[str, Any], indices: Mapping[str, int]) -> None:
        """Run a loop; ends early when all of `until` is true, outside training."""
        for index in range(sizes.evaluate(op.count, indices)):
            self.ops(op.body, values, {**indices, op.index: index})
            if op.until and not self.training and bool(values[op.until].all()):
                return

    def select(self, op: Select, values: Mapping[str, Any], indices: Mapping[str, int]) -> TokenSet:
        """A token set of scores."""
        rule, judged = self.rule(op)
        score, among, of, within = (values[name] if name else None for name in (judged, op.among, op.of, op.within))
        return select(rule, score, among, of, indices, self.step, within)

    def rule(self, op: Select) -> tuple[str, str | None]:
        """The rule that counts now, and the name of the score that it judges."""
        if op.inference and self.selection == "inference":
            return op.inference, op.judge or op.score
        return op.rule, op.score

    def on(self, op: On, values: dict[str, Any], indices: Mapping[str, int]) -> None:
        """Run a region on the tokens of a set; see `depthc.ir.regions`."""
        from depthc.ir.regions import Region

        region = Region(self, op, values[op.tokens])
        inner = region.enter(values)
        region.ops(op.body, inner, indices)
        values.update({name: inner[name] for name in op.writes})

    def merge(self, op: Merge, values: dict[str, Any], indices: Mapping[str, int]) -> None:
        """Write rows back into a stream."""
        combine = partial(self.combined, op, indices) if op.combine is not None else None
        extra = [values[name] for name in op.extra]
        over = values[op.over] if op.over is not None else None
        values[op.write] = values[op.tokens].merge(values[op.read], values[op.value], combine, extra, over)

    def combined(self, op: Merge, indices: Mapping[str, int], *rows: Tensor) -> Tensor:
        assert op.combine is not None
        params = [self.param(indexed(name, indices)) for name in op.params]
        (new,) = self.run_body(op.combine, op.combine.arrange(rows, params, training=self.training, device=self.device))
        return new  # type: ignore[no-any-return]

    def apply(self, op: Segment | Call, values: dict[str, Any], indices: Mapping[str, int]) -> None:
        """Run a segment or one application of a block."""
        if isinstance(op, Call) and op.kv:
            self.apply_planned(op, values, indices)
            return
        body = op.body if isinstance(op, Segment) else self.program.blocks[op.block].body
        consts = op.consts if isinstance(op, Call) else ()
        params = [self.param(indexed(name, indices)) for name in op.params]
        reads = [as_data(values[r]) for r in op.reads]
        inputs = body.arrange(reads, params, consts, training=self.training, device=self.device)
        with gradients(op, indices), precision(op, self.device):
            values.update(zip(op.writes, self.run_body(body, inputs), strict=True))

    def apply_planned(self, op: Call, values: dict[str, Any], indices: Mapping[str, int]) -> None:
        """One application on all tokens whose keys and values follow a plan."""
        from depthc.ir.regions import run_planned

        block = self.program.blocks[op.block]
        carries = [values[name] for name in op.reads[: block.carries]]
        sides = [values[name] for name in op.reads[block.carries :]]
        run_planned(self, op, carries, sides, values, indices)


def gradients(op: Op, indices: Mapping[str, int]) -> AbstractContextManager[Any]:
    """What an application runs in: without gradients where its condition does not hold."""
    held = not isinstance(op, Call) or op.grad is None or bool(sizes.evaluate(op.grad, indices))
    return torch.set_grad_enabled(held and torch.is_grad_enabled())


def precision(op: Op, device: torch.device) -> AbstractContextManager[Any]:
    """What a precise segment runs in: no autocast."""
    if isinstance(op, Segment) and op.precise and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def as_data(value: Any) -> Any:
    """A value as a body reads it: a token set is its mask."""
    return value.mask if isinstance(value, TokenSet) else value


def indexed(name: str, indices: Mapping[str, int]) -> str:
    """A name with every `{expression}` replaced by its value.

    Example:
        >>> indexed("layers.{2*r + 1}.weight", {"r": 3})
        'layers.7.weight'
    """
    head, brace, rest = name.partition("{")
    if not brace:
        return name
    expression, _, tail = rest.partition("}")
    return f"{head}{sizes.evaluate(expression, indices)}{indexed(tail, indices)}"
