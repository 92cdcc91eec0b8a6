"""Layers: which weights every application of a block reads, loops written out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

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
    """The applications of blocks in the order of execution.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> compiled = depthc.compile(model, "tie", args=(torch.ones(2, 5, 4),), loops=2)
        >>> [layer.weights[0] for layer in layers_of(compiled.program)]
        ['0.weight', '1.weight', '0.weight', '1.weight']
    """
    found = []
    for call, indices in (pair for stack in program.stacks for pair in applications(stack.ops)):
        names = (indexed(name, indices) for name in call.params)
        found.append(Layer(call, indices, tuple(owner_of(program, name) for name in names)))
    return tuple(found)


def stored_layers(program: Program) -> int:
    """How many layers a program holds: two that have more than half of their numbers in common count once."""
    sizes = {owner_of(program, name): prod(param.type.sizes({})) for name, param in program.params.items()}
    kept: list[set[str]] = []
    for weights in dict.fromkeys(layer.weights for layer in layers_of(program)):
        own = set(weights)
        whole = sum(sizes[name] for name in own)
        if not any(2 * sum(sizes[name] for name in own & other) > whole for other in kept):
            kept.append(own)
    return len(kept)


def applications(
    ops: Sequence[Op], indices: Mapping[str, int] | None = None
) -> Iterator[tuple[Call, Mapping[str, int]]]:
    """Every application of a block in order, with the indices of the loops around it; a loop whose number of passes is
    not known counts once."""
    for op in ops:
        match op:
            case Call():
                yield op, indices or {}
            case On():
                yield from applications(op.body, indices)
            case Loop():
                for index in range(op.count if isinstance(op.count, int) else 1):
                    yield from applications(op.body, {**(indices or {}), op.index: index})


def owner_of(program: Program, name: str) -> str:
    """The name of the weight that a parameter is; its own where it is made of others, or new."""
    expr = program.params[name].expr
    return expr.name if isinstance(expr, Ref) else name
