"""One row through layers, token by token, and what a model must be for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .attention import Key, Visible

Inputs = Mapping[str, Tensor]


class LayerMath(Protocol):
    """A model, token by token. A layer's weights are in `layer`; its constants, such as its window, are of `depth`."""

    layers: Sequence[nn.Module]

    def embed(self, inputs: Inputs, row: int) -> list[Tensor]:
        """Begin a row of the batch: the state of every token before the first layer."""

    def key(self, layer: nn.Module, x: Tensor, t: int) -> Key:
        """What token `t` shows to the others."""

    def apply(self, layer: nn.Module, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        """The whole layer for token `t`."""

    def finish(self, x: Tensor) -> Tensor:
        """Logits."""


@dataclass(frozen=True)
class Row:
    """Who sees whom: real tokens, no later ones, of the same document. A padded token sees too, but is not seen."""

    math: LayerMath
    real: list[bool]
    documents: list[int]

    def keys(self, layer: nn.Module, states: Mapping[int, Tensor]) -> dict[int, Key]:
        return {t: self.math.key(layer, x, t) for t, x in states.items() if self.real[t]}

    def run(self, layer: Any, depth: int, states: Mapping[int, Tensor], keys: Any = None) -> dict[int, Tensor]:
        """A layer for the tokens given, which see each other, or `keys` where those are given."""
        keys = self.keys(layer, states) if keys is None else keys
        return {
            t: self.math.apply(layer, depth, x, t, [(j, key) for j, key in keys.items() if self.sees(t, j)])
            for t, x in states.items()
        }

    def sees(self, t: int, j: int) -> bool:
        return j <= t and self.documents[t] == self.documents[j]

    def logits(self, states: Mapping[int, Tensor]) -> Tensor:
        return torch.stack([self.math.finish(states[t]) for t in range(len(self.real))])


def rows_of(math_: LayerMath, real: Tensor, documents: Tensor | None) -> list[Row]:
    documents = torch.zeros_like(real, dtype=torch.long) if documents is None else documents
    return [Row(math_, *lists) for lists in zip(real.tolist(), documents.tolist(), strict=True)]
