"""Tables that are computed once: rotary ones, which every layer reads at the tokens that come to it.

Where the whole is one graph, a compiler computes the cosine of an angle again for every number that it is multiplied
with, since it takes arithmetic to be cheaper than memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from depthc.ir.axes.analysis import analyse
from depthc.ir.program import Block, Call, On, Program
from depthc.ir.text.functions import walk


def tables_of(program: Program) -> set[str]:
    """The names of what layers on some of the tokens read beside their streams: a row a token, for all sequences.

    Example:
        >>> tables_of(depthc.compile(model, "mor").program)  # doctest: +SKIP
        {'cos', 'sin'}
    """
    ops = [op for op, _ in walk(program.stacks)]
    if not any(isinstance(op, On) for op in ops):
        return set()
    calls = [op for op in ops if isinstance(op, Call)]
    return {op.reads[number] for op in calls for number in _tables(program.blocks[op.block])}


def _tables(block: Block) -> Iterator[int]:
    """The numbers of such values among a block's."""
    axes = analyse(block)
    for number, node in enumerate(block.body.placeholders_of("value")):
        atoms = [atom for dim in axes.labels.get(node) or () for atom in dim]  # type: ignore[union-attr]
        rows = [atom for atom in atoms if atom.kind in ("token", "key")]
        if number >= block.carries and len(rows) == 1 and axes.batch not in atoms:
            yield number


@torch.library.custom_op("depthc::computed_once", mutates_args=())
def computed_once(table: Tensor) -> Tensor:
    """A copy, which a compiler takes as it is.

    Example:
        >>> computed_once(torch.ones(2))
        tensor([1., 1.])
    """
    return table.clone(memory_format=torch.contiguous_format)


@computed_once.register_fake
def _(table: Tensor) -> Tensor:
    return torch.empty(table.shape, dtype=table.dtype, device=table.device)


computed_once.register_autograd(lambda _, grad: grad)
