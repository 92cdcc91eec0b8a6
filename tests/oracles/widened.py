"""AltUp: recipes.md, section 6. Sequence-AltUp is the module `strided`.

A token has M blocks of the model's width, of which every layer reads and computes one. Parameters, for each layer l:

- `predict.{l}` [M, M] and `correct.{l}` [M], the P and g of scalar coefficients;
- `router.{l}.norm` [D], `router.{l}.mix` [M, D], `router.{l}.predict` [M M, M] and `router.{l}.correct` [M, M], of a
  router: the weight of its RMS norm, and W_r, W_p, W_c;

and of a wide embedding `table` [V, M D] and, where the model's head is not tied to it, `head` [V, M D], block i in
columns i D to (i + 1) D. All else is the model's own. What recipes.md leaves open is read so:

- the layer sees of other tokens what it reads of the token itself: block j* as it was, or as predicted;
- blocks end as their mean, unless they are summed (`recycled`) or each has its part of the head (`wide`);
- what comes behind the table (a scale, learned positions) is done to each block; the final norm is one for all blocks,
  and a cap acts on the sum of their logits;
- the router reads block 0 for its predictions, as written (`reads=None`: the active block, as gemma3n does), through a
  norm with a weight, and no coefficient is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .attention import Key
from .rows import Inputs, LayerMath, Row, rows_of

Parameters = Mapping[str, Tensor]
Blocks = Sequence[Tensor]  # of one token: M times [D]


class WideMath(LayerMath, Protocol):
    """A model whose embedding and head may be wider than its layers."""

    def tables(self) -> tuple[Tensor, Tensor]:
        """Of the embedding and of the head; one and the same where they are tied."""

    def embed(self, inputs: Inputs, row: int, table: Tensor | None = None) -> list[Tensor]:
        """With another table, where one is given."""

    def final_norm(self, x: Tensor) -> Tensor: ...

    def head(self, x: Tensor, weight: Tensor) -> Tensor:
        """Logits of a normed state, before what is done to their sum."""

    def cap(self, logits: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Settings:
    """The options of `widen`. `active`: the block of every layer; none: blocks in turn."""

    blocks: int = 2
    active: int | None = None
    compute_on: str = "old"  # predicted
    coefficients: str = "scalars"  # router
    embedding: str = "replicated"  # recycled, wide
    reads: int | None = 0  # the block that a router predicts from; none: the active one
    eps: float = 1e-6  # of the router's norm

    def __post_init__(self) -> None:
        known = (
            self.compute_on in ("old", "predicted")
            and self.coefficients in ("scalars", "router")
            and self.embedding in ("replicated", "recycled", "wide")
        )
        if not known or not all(0 <= i < self.blocks for i in (self.active or 0, self.reads or 0)):
            raise ValueError(f"{self}")

    def block_of(self, depth: int) -> int:
        return depth % self.blocks if self.active is None else self.active


def make_parameters(math_: WideMath, settings: Settings, noise: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """As they start, with the identity for coefficients, and some noise on everything."""
    generator = torch.Generator().manual_seed(seed)
    table, head = math_.tables()
    count, found = settings.blocks, {}
    for layer in range(len(math_.layers)):
        make = routed_coefficients if settings.coefficients == "router" else scalar_coefficients
        found |= make(layer, count, table.shape[1], generator)
    if settings.embedding == "wide":
        found |= {"table": table.detach().repeat(1, count)}
        found |= {} if head is table else {"head": head.detach().repeat(1, count) / count}
    return {
        name: (value + noise * torch.randn(value.shape, generator=generator, dtype=value.dtype)).requires_grad_()
        for name, value in found.items()
    }


def scalar_coefficients(layer: int, count: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    eye = torch.eye(count, dtype=torch.float64)
    return {f"predict.{layer}": eye, f"correct.{layer}": torch.ones_like(eye[0])}


def routed_coefficients(layer: int, count: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    mix = torch.randn(count, width, generator=generator, dtype=torch.float64)
    predict, correct = mix.new_zeros(count * count, count), mix.new_zeros(count, count)
    made = {"norm": torch.ones_like(mix[0]), "mix": mix, "predict": predict, "correct": correct}
    return {f"router.{layer}.{name}": value for name, value in made.items()}


# one token at one layer


def modalities(settings: Settings, parameters: Parameters, layer: int, x: Tensor) -> Tensor:
    """What a router makes of a state, [M]."""
    normed = x * torch.rsqrt(x.square().mean() + settings.eps) * parameters[f"router.{layer}.norm"]
    return torch.tanh(parameters[f"router.{layer}.mix"] @ (normed / len(x)))


def mixed(table: Tensor, blocks: Blocks) -> Blocks:
    """For each row of [M, M], the sum of its numbers times the blocks."""
    return [sum(c * x for c, x in zip(row, blocks, strict=True)) for row in table]


def predict(settings: Settings, parameters: Parameters, layer: int, blocks: Blocks) -> Blocks:
    """What each block will be."""
    if settings.coefficients == "scalars":
        return mixed(parameters[f"predict.{layer}"], blocks)
    shown = blocks[settings.block_of(layer) if settings.reads is None else settings.reads]
    given = parameters[f"router.{layer}.predict"] @ modalities(settings, parameters, layer, shown)
    changes = mixed(given.view(settings.blocks, settings.blocks), blocks)
    return [x + change for x, change in zip(blocks, changes, strict=True)]


def correct(settings: Settings, parameters: Parameters, layer: int, predicted: Blocks, y: Tensor) -> Blocks:
    """The blocks, now that the layer has computed the active one."""
    if settings.coefficients == "scalars":
        gains = parameters[f"correct.{layer}"]
    else:
        gains = 1 + parameters[f"router.{layer}.correct"] @ modalities(settings, parameters, layer, y)
    news = y - predicted[settings.block_of(layer)]
    return [x + g * news for x, g in zip(predicted, gains, strict=True)]


def read(settings: Settings, layer: int, old: Blocks, predicted: Blocks) -> Tensor:
    """What the layer reads."""
    return (old if settings.compute_on == "old" else predicted)[settings.block_of(layer)]


# rows


def begin(math_: WideMath, settings: Settings, parameters: Parameters, inputs: Inputs, row: int) -> dict[int, Blocks]:
    """The blocks of every token of a row, before the first layer."""
    if settings.embedding == "wide":
        parts = [math_.embed(inputs, row, table) for table in parameters["table"].chunk(settings.blocks, 1)]
        return dict(enumerate(zip(*parts, strict=True)))
    return {t: [x] * settings.blocks for t, x in enumerate(math_.embed(inputs, row))}


def finish(math_: WideMath, settings: Settings, parameters: Parameters, blocks: Blocks) -> Tensor:
    """The logits of a token."""
    if settings.embedding == "wide":
        head = parameters["head"] if "head" in parameters else parameters["table"] / settings.blocks
        parts = zip(blocks, head.chunk(settings.blocks, 1), strict=True)
        return math_.cap(sum(math_.head(math_.final_norm(x), weight) for x, weight in parts))
    collapsed = torch.stack(list(blocks)).sum(0)
    return math_.finish(collapsed if settings.embedding == "recycled" else collapsed / settings.blocks)


def run_row(row: Row, settings: Settings, parameters: Parameters, blocks: Mapping[int, Blocks]) -> dict[int, Blocks]:
    """All tokens, layer by layer."""
    for depth, layer in enumerate(row.math.layers):
        predicted = {t: predict(settings, parameters, depth, old) for t, old in blocks.items()}
        done = row.run(layer, depth, {t: read(settings, depth, blocks[t], predicted[t]) for t in blocks})
        blocks = {t: correct(settings, parameters, depth, predicted[t], y) for t, y in done.items()}
    return dict(blocks)


def step_row(row: Row, settings: Settings, parameters: Parameters, blocks: Mapping[int, Blocks]) -> dict[int, Blocks]:
    """Token by token, with the keys of those before."""
    if not row.math.causal:
        raise ValueError("an encoder goes through all tokens at once")
    past: list[dict[int, Key]] = [{} for _ in row.math.layers]
    found = {}
    for t, states in blocks.items():
        for depth, (layer, keys) in enumerate(zip(row.math.layers, past, strict=True)):
            predicted = predict(settings, parameters, depth, states)
            y = row.step(layer, depth, read(settings, depth, states, predicted), t, keys)
            states = correct(settings, parameters, depth, predicted, y)
        found[t] = states
    return found


def widen(
    math_: WideMath,
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
        done = run(row, settings, parameters, begin(math_, settings, parameters, inputs, b))
        found.append(torch.stack([finish(math_, settings, parameters, done[t]) for t in range(len(row.real))]))
    return torch.stack(found)
