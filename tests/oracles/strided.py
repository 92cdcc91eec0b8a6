"""Sequence-AltUp, layers on every q-th token: recipes.md, section 6.

Parameters: the scalars `a1.{l}`, `a2.{l}` and `b.{l}` of every layer l but the first and the last, which are ordinary.
Anchors are counted in real tokens: of a document, the first, and every q-th from there; a padded token stays as it is.
The layer reads an anchor as it was, or with `compute_on="predicted"` as predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Key
from .rows import Inputs, LayerMath, Row, rows_of

Parameters = Mapping[str, Tensor]
States = dict[int, Tensor]


@dataclass(frozen=True)
class Settings:
    stride: int = 4
    compute_on: str = "old"  # predicted

    def __post_init__(self) -> None:
        if self.stride < 1 or self.compute_on not in ("old", "predicted"):
            raise ValueError(f"{self}")

    def anchors(self, row: Row) -> dict[int, int]:
        """The anchor of every real token."""
        groups = row.groups("document")
        return {t: group[k - k % self.stride] for group in groups for k, t in enumerate(group)}


def make_parameters(math_: LayerMath, noise: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """As they start, and some noise on everything."""
    generator = torch.Generator().manual_seed(seed)
    start = {"a1": 1.0, "a2": 0.0, "b": 1.0}
    return {
        f"{name}.{layer}": (value + noise * torch.randn((), generator=generator, dtype=torch.float64)).requires_grad_()
        for layer in range(1, len(math_.layers) - 1)
        for name, value in start.items()
    }


def predict(parameters: Parameters, layer: int, x: Tensor, anchor: Tensor) -> Tensor:
    return parameters[f"a1.{layer}"] * x + parameters[f"a2.{layer}"] * anchor


def run_row(row: Row, settings: Settings, parameters: Parameters, states: States) -> States:
    """All tokens, layer by layer."""
    anchors = settings.anchors(row)
    for depth, layer in enumerate(row.math.layers):
        if depth in (0, len(row.math.layers) - 1):
            states = row.run(layer, depth, states)
            continue
        predicted = {t: predict(parameters, depth, states[t], states[a]) for t, a in anchors.items()}
        read = states if settings.compute_on == "old" else predicted
        done = row.run(layer, depth, {a: read[a] for a in sorted(set(anchors.values()))})
        news = {a: parameters[f"b.{depth}"] * (y - predicted[a]) for a, y in done.items()}
        states = states | {t: predicted[t] + news[a] for t, a in anchors.items()}
    return states


def step_row(row: Row, settings: Settings, parameters: Parameters, states: States) -> States:
    """Token by token. Where it is no anchor, a layer does not run and keeps nothing."""
    if not row.math.causal:
        raise ValueError("an encoder goes through all tokens at once")
    anchors, found = settings.anchors(row), {}
    keys: list[dict[int, Key]] = [{} for _ in row.math.layers]
    kept: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in row.math.layers]  # of anchors: the state, the news
    for t, x in states.items():
        for depth, layer in enumerate(row.math.layers):
            if depth in (0, len(row.math.layers) - 1):
                x = row.step(layer, depth, x, t, keys[depth])
            elif t in anchors:
                predicted = predict(parameters, depth, x, x if anchors[t] == t else kept[depth][anchors[t]][0])
                if anchors[t] == t:
                    read = x if settings.compute_on == "old" else predicted
                    y = row.step(layer, depth, read, t, keys[depth])
                    kept[depth][t] = x, y - predicted
                x = predicted + parameters[f"b.{depth}"] * kept[depth][anchors[t]][1]
        found[t] = x
    return found


def stride(
    math_: LayerMath,
    settings: Settings,
    parameters: Parameters,
    inputs: Inputs,
    real: Tensor,
    documents: Tensor | None = None,
    *,
    steps: bool = False,
) -> Tensor:
    """Logits [B, S, V], of all tokens at once or step by step."""
    run, found = step_row if steps else run_row, []
    for b, row in enumerate(rows_of(math_, real, documents)):
        found.append(row.logits(run(row, settings, parameters, dict(enumerate(math_.embed(inputs, b))))))
    return torch.stack(found)
