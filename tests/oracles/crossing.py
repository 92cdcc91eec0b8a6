"""A layer with a cross-attention to what other layers have made: recipes.md, section 5.

Its parameters have plain names: `norm` (where the layer norms its own attention's input), `q`, `k`, `v`, `o`, and
`q_norm`, `k_norm` where the layer has such; each with `.weight`, and with `.bias` where the layer has one. A fused
projection is three, `q.weight` [heads x head size, width].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .attention import Key, Visible
from .rows import LayerMath, named


class CrossMath(LayerMath, Protocol):
    """A decoder whose layers take a cross-attention in. Halves are for layers that take it in between."""

    cross_first: bool  # in front of the whole layer instead, where attention and MLP are side by side

    def first_half(self, layer: nn.Module, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        """All attention that the layer has."""

    def second_half(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The MLP."""

    def attend(self, layer: nn.Module, q: Tensor, t: int, visible: Visible) -> Tensor:
        """The layer's kind of attention (scale, cap, relative bias), without a window."""

    def turn(self, x: Tensor, t: int) -> Tensor:
        """Rotary positions on heads, where the model has them."""

    def norms(self, layer: nn.Module) -> dict[str, nn.Module]:
        """The norms of the layer's own attention: of its input, `norm`, of heads, `q_norm` and `k_norm`."""

    def projections(self, layer: nn.Module) -> dict[str, Tensor]:
        """Weights and biases of the layer's own q, k, v, o."""

    def head_size(self, layer: nn.Module) -> int: ...


def copied(math: CrossMath, layer: nn.Module) -> dict[str, Tensor]:
    """The parameters that a cross-attention starts with: the layer's own, and an output of zero."""
    own = math.projections(layer) | named(**math.norms(layer))
    return {n: torch.zeros_like(p) if n.startswith("o.") else p.detach().clone() for n, p in own.items()}


@dataclass(frozen=True)
class Crossing:
    """A layer for one token at a time; what the token sees of others, `seen`, are keys made by `memory_key`."""

    math: CrossMath
    layer: Any
    depth: int
    parameters: Mapping[str, Tensor]

    def enter(self, x: Tensor, t: int, seen: Visible) -> Tensor:
        """The state that the layer itself begins with, and makes its keys of."""
        return x + self.cross(x, t, seen) if self.math.cross_first else x

    def apply(self, x: Tensor, t: int, visible: Visible, seen: Visible) -> Tensor:
        """The layer for a state that has entered."""
        if self.math.cross_first:
            return self.math.apply(self.layer, self.depth, x, t, visible)
        x = self.math.first_half(self.layer, self.depth, x, t, visible)
        return self.math.second_half(self.layer, x + self.cross(x, t, seen))

    def cross(self, x: Tensor, t: int, seen: Visible) -> Tensor:
        """Zero where nothing is seen, without the bias of the output too."""
        if not seen:
            return torch.zeros_like(x)
        q = self.math.turn(self.normed("q_norm", self.heads("q", self.normed("norm", x))), t)
        return self.linear("o", self.math.attend(self.layer, q, t, seen))

    def memory_key(self, m: Tensor, j: int) -> Key:
        """The key and the value of a row of memory, which is not normed."""
        return self.math.turn(self.normed("k_norm", self.heads("k", m)), j), self.heads("v", m)

    def heads(self, name: str, x: Tensor) -> Tensor:
        return self.linear(name, x).view(-1, self.math.head_size(self.layer))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias"))

    def normed(self, name: str, x: Tensor) -> Tensor:
        norm = self.math.norms(self.layer).get(name)
        if norm is None:
            return x
        return functional_call(norm, {n: self.parameters[f"{name}.{n}"] for n, _ in norm.named_parameters()}, (x,))
