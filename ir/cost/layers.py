"""Layers: which weights every application of a block reads, loops written out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from depthc.ir.evaluate import indexed
from depthc.ir.params import Ref
from depthc.ir.program import Call, Loop, On, Op, Program


@dataclass(frozen=True)
class Layer:
    """One application of a block.

    Attributes:
        call: the op that applies it.
        indices: of the loops around it.
        weights: names of the weights that it reads; applications that share all of them have equal ones.
    """

    call: Call
    indices: Mapping[str, int]
    weights: tuple[str, ...]


def layers_of(program: Program) -> tuple[Layer, ...]:
    """The applications of blocks in the order of execution; a loop that the data end counts once.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> compiled = depthc.compile(model, "tie", args=(torch.ones(2, 5, 4),), loops=2)
        >>> [layer.weights[0] for layer in layers_of(compiled.program)]
        ['0.weight', '1.weight', '0.weight', '1.weight']
    """
    return tuple(layer for stack in program.stacks for layer in _layers(program, stack.ops, {}))


def _layers(program: Program, ops: Sequence[Op], indices: Mapping[str, int]) -> Iterator[Layer]:
    for op in ops:
        match op:
            case Call():
                names = (indexed(name, indices) for name in op.params)
                yield Layer(op, indices, tuple(owner_of(program, name) for name in names))
            case On():
                yield from _layers(program, op.body, indices)
            case Loop():
                for index in range(op.count if isinstance(op.count, int) else 1):
                    yield from _layers(program, op.body, {**indices, op.index: index})


def owner_of(program: Program, name: str) -> str:
    """The name of the weight that a parameter is; its own where it is made of others, or new."""
    expr = program.params[name].expr
    return expr.name if isinstance(expr, Ref) else name
