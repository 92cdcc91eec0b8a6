"""Sizes: legal ones, for figures to be shown at."""

from __future__ import annotations

from depthc.ir import sizes
from depthc.ir.errors import IncrementalError
from depthc.ir.plans import token_dim
from depthc.ir.program import Program, calls

_TRIES = 512  # lengths below a wanted one that are tried, where guards forbid it


def sizes_of(program: Program, length: int) -> dict[str, int]:
    """Legal sizes with every token axis as near to a length as it may be, from below, and all others at their least.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> sizes_of(depthc.capture(model, (torch.ones(2, 5, 4),)), 2048)
        {'b': 1, 's': 2048}
    """
    tokens, ranges = _token_sizes(program), program.signature.ranges
    least = {name: _within(1, span) for name, span in ranges.items()}
    for tried in range(length, max(0, length - _TRIES), -1):
        found = {name: _within(tried, span) if name in tokens else least[name] for name, span in ranges.items()}
        if all(sizes.met(guard, found) for guard in program.signature.guards):
            return found
    return least


def _within(size: int, span: tuple[int, int | None]) -> int:
    least, most = span
    return max(least, size if most is None else min(size, most))


def _token_sizes(program: Program) -> set[str]:
    """The size names that the lengths of the stacks are made of."""
    found: set[str] = set()
    for name in dict.fromkeys(call.block for stack in program.stacks for call, _ in calls(stack.ops)):
        block = program.blocks[name]
        try:
            size = block.body.inputs_of("value")[0].type.shape[token_dim(block)]  # type: ignore[union-attr]
        except IncrementalError:  # what flows through it has no token axis
            continue
        found |= sizes.names(sizes.read(size)) if isinstance(size, str) else set()
    return found
