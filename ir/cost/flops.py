"""FLOPs: the floating-point operations of a program's forward, as a closed form in its sizes."""

from __future__ import annotations

import sympy

from depthc.ir.cost.walk import as_written, walk_of
from depthc.ir.program import Program


def flops(program: Program, *, masked: bool = True) -> sympy.Expr:
    """The operations of one forward: those of its products, over the size names of its inputs.

    A routed region counts for the rows that run, as many as the training rule of its `select` chooses; a set whose
    size only the data decide is a symbol of its own in every iteration ("active_0"). A training step takes three times
    as many, since backward has two products for each.

    Args:
        masked: whether attention counts the pairs of tokens that its mask allows, as kernels compute them (causal:
            half of all); if not, it counts all pairs. Padding and documents take nothing away. The rows of a region
            are taken to be spread evenly where a window, or keys of all tokens, makes it matter.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> cost = flops(depthc.capture(model, (torch.ones(2, 5, 4),)))
        >>> cost, cost.subs({"b": 2, "s": 5})
        (96*b*s, 960)
    """
    return as_written(sympy.Add(*walk_of(program, masked).terms))
