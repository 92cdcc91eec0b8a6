"""One row through layers, token by token, and what a model must be for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .attention import Key, Visible

Inputs = Mapping[str, Tensor]


def lookup(embedding: nn.Module, ids: Tensor, table: Tensor | None = None) -> Tensor:
    """What an embedding gives, or would give with another table."""
    return embedding(ids) if table is None else functional_call(embedding, {"weight": table}, (ids,))


def named(**modules: nn.Module) -> dict[str, Tensor]:
    """The parameters of several modules, in one table."""
    return {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}


class LayerMath(Protocol):
    """A model, token by token. A layer's weights are in `layer`; its constants, such as its window, are of `depth`."""

    layers: Sequence[nn.Module]
    causal: bool  # tokens do not see later ones

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
    """Who sees whom: real tokens of the same document, in a decoder no later ones. Padding sees, but is not seen."""

    math: LayerMath
    real: list[bool]
    documents: list[int]

    def keys(self, layer: nn.Module, states: Mapping[int, Tensor]) -> dict[int, Key]:
        return {t: self.math.key(layer, x, t) for t, x in states.items() if self.real[t]}

    def run(self, layer: Any, depth: int, states: Mapping[int, Tensor], keys: Any = None) -> dict[int, Tensor]:
        """A layer for the tokens given, which see each other, or `keys` where those are given."""
        keys = self.keys(layer, states) if keys is None else keys
        return {t: self.math.apply(layer, depth, x, t, self.visible(keys, t)) for t, x in states.items()}

    def step(self, layer: Any, depth: int, x: Tensor, t: int, keys: dict[int, Key]) -> Tensor:
        """A layer for one token, with the keys of those before; its own key is added to them."""
        keys |= self.keys(layer, {t: x})
        return self.math.apply(layer, depth, x, t, self.visible(keys, t))

    def visible(self, keys: Mapping[int, Key], t: int) -> Visible:
        return [(j, key) for j, key in keys.items() if self.sees(t, j)]

    def sees(self, t: int, j: int) -> bool:
        return (j <= t or not self.math.causal) and self.documents[t] == self.documents[j]

    def groups(self, per: str) -> list[list[int]]:
        """The real tokens that compete with each other: all of the row, or of one document."""
        real = [t for t, is_real in enumerate(self.real) if is_real]
        if per == "row":
            return [real] if real else []
        return [[t for t in real if self.documents[t] == d] for d in sorted({self.documents[t] for t in real})]

    def logits(self, states: Mapping[int, Tensor]) -> Tensor:
        return torch.stack([self.math.finish(states[t]) for t in range(len(self.real))])


def rows_of(math_: LayerMath, real: Tensor, documents: Tensor | None) -> list[Row]:
    documents = torch.zeros_like(real, dtype=torch.long) if documents is None else documents
    return [Row(math_, *lists) for lists in zip(real.tolist(), documents.tolist(), strict=True)]
