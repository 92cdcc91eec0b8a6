"""Attention of one token, written out. (Norms, linears and MLPs are the model's own modules, called on one token.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Key = tuple[Tensor, Tensor]  # the key and the value of a token: [heads, head size] each
Visible = Sequence[tuple[int, Key]]  # with original positions


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first features of each head, as many as the table has."""
    turned, kept = x[:, : cos.shape[-1]], x[:, cos.shape[-1] :]
    left, right = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-right, left], -1) * sin, kept], -1)


def scores_of(q: Tensor, visible: Visible, scale: float) -> Tensor:
    """[heads, visible]; a key's head may serve several query heads."""
    keys = torch.stack([k for _, (k, _) in visible], 1)
    return (q[:, None] * keys.repeat_interleave(len(q) // len(keys), 0)).sum(-1) * scale


def mix(weights: Tensor, visible: Visible) -> Tensor:
    """The weighted sum of the values, heads side by side."""
    values = torch.stack([v for _, (_, v) in visible], 1)
    return (weights[..., None] * values.repeat_interleave(len(weights) // len(values), 0)).sum(1).flatten()


def attend(q: Tensor, visible: Visible, scale: float, bias: Callable[[int], Tensor] | None = None) -> Tensor:
    """Attention of one token; `bias` gives what a position adds to the scores, [heads]. Zero where nothing is seen."""
    if not visible:
        return torch.zeros_like(q).flatten()
    scores = scores_of(q, visible, scale)
    if bias is not None:
        scores = scores + torch.stack([bias(j) for j, _ in visible], -1)
    return mix(scores.softmax(-1), visible)
