"""Mixture-of-Depths, and layers that keep a given share of the tokens: recipes.md, section 4.

A routed layer is a layer for its tokens alone: the others do not change, and are not seen there. Layers choose apart
from each other, so that a token may be left out by one and taken by the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .routers import (
    Outcome,
    Router,
    best,
    make_router,
    marked,
    membership,
    passing,
    placed,
    require_numbers,
    router_logits,
    squares,
    warmed,
)
from .rows import Inputs, LayerMath, Row, rows_of

# What ranks the tokens of a layer: a router that is trained, a number for each token [B, S], a function of its state.
Scorer = Router | Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """The options of `mod`. `causal`: tokens pass a threshold instead of being ranked."""

    capacities: tuple[float | None, ...]  # one a layer; None: an ordinary layer
    f: str = "delta"  # x + score f, where f is Block(x) - x; block: Block(x); off: Block(x) instead, without a score
    per: str = "row"  # document
    loss: float = 0.001
    z: float = 0.0
    warmup: int = 0
    nested: bool = False  # only tokens that the routed layer before took
    causal: bool = False
    predictor: bool = False  # of the choice, for causal use

    def __post_init__(self) -> None:
        if not self.routed or not all(0 < self.capacities[layer] <= 1 for layer in self.routed):
            raise ValueError(f"capacities {self.capacities}")
        if self.f not in ("delta", "block", "off") or self.per not in ("row", "document"):
            raise ValueError(f"f {self.f} chosen per {self.per}")

    @property
    def routed(self) -> list[int]:
        return [layer for layer, capacity in enumerate(self.capacities) if capacity is not None]


def odd(depth: int, capacity: float = 0.125) -> tuple[float | None, ...]:
    """The capacities of Mixture-of-Depths: every other layer is routed."""
    return tuple(capacity if layer % 2 else None for layer in range(depth))


@dataclass(frozen=True)
class Result(Outcome):
    """`selected` and `router_logits` have a [B, S] for each routed layer; NaN where there was no candidate."""

    selected: list[Tensor]
    router_logits: list[Tensor]


def make_routers(settings: Settings, kind: str = "linear", seed: int = 0) -> list[dict[str, Tensor]]:
    """One a routed layer; `kind` may be "predictor"."""
    generator = torch.Generator().manual_seed(seed)
    return [make_router(kind, generator) for _ in settings.routed]


@dataclass(frozen=True)
class Routed:
    """What a row leaves: its last states, and for each routed layer the candidates' logits and the active tokens."""

    states: dict[int, Tensor]
    scores: list[dict[int, Tensor]] = field(default_factory=list)
    predicted: list[dict[int, Tensor]] = field(default_factory=list)
    active: list[list[int]] = field(default_factory=list)


def score(scorer: Scorer, b: int, t: int, x: Tensor) -> Tensor:
    if isinstance(scorer, Tensor):
        return scorer[b, t]
    return router_logits(scorer, x)[0] if isinstance(scorer, Mapping) else scorer(x)


def choose(settings: Settings, row: Row, layer: int, step: int, scores: Mapping, predicted: Mapping) -> list[int]:
    require_numbers(scores, f"layer {layer}")
    capacity = settings.capacities[layer]
    if settings.causal:
        return passing(capacity, predicted if settings.predictor else scores)
    return best(row, settings.per, warmed(capacity, step, settings.warmup), scores)


def combine(settings: Settings, x: Tensor, block: Tensor, s: Tensor) -> Tensor:
    """The new state of an active token; `block` is the output of the layer, which contains x."""
    return {"delta": x + s * (block - x), "block": x + s * block, "off": block}[settings.f]


def route_row(
    row: Row, b: int, settings: Settings, scorers: Sequence, predictors: Sequence, step: int, states: dict[int, Tensor]
) -> Routed:
    found, real = Routed(states), [t for t in states if row.real[t]]
    for depth, layer in enumerate(row.math.layers):
        if settings.capacities[depth] is None:
            states = row.run(layer, depth, states)
            continue
        at = len(found.active)
        candidates = found.active[-1] if settings.nested and at else real
        scores = {t: score(scorers[at], b, t, states[t]) for t in candidates}
        predicted = {t: router_logits(predictors[at], states[t].detach())[0] for t in candidates if settings.predictor}
        active = choose(settings, row, depth, step, scores, predicted)
        block = row.run(layer, depth, {t: states[t] for t in active})
        states = states | {t: combine(settings, states[t], block[t], scores[t]) for t in active}
        for kept, value in zip((found.scores, found.predicted, found.active), (scores, predicted, active), strict=True):
            kept.append(value)
    return Routed(states, found.scores, found.predicted, found.active)


def route(
    math_: LayerMath,
    settings: Settings,
    scorers: Sequence[Scorer],
    inputs: Inputs,
    real: Tensor,
    documents: Tensor | None = None,
    predictors: Sequence[Router] = (),
    step: int = 0,
) -> Result:
    """The routed model, one row after another; scorers and predictors, one a routed layer."""
    rows = rows_of(math_, real, documents)
    done = [
        route_row(row, b, settings, scorers, predictors, step, dict(enumerate(math_.embed(inputs, b))))
        for b, row in enumerate(rows)
    ]
    losses = {name: torch.zeros((), dtype=torch.float64) for name in ("membership", "predictor", "z")}
    selected, tables = [], []
    for at, scorer in enumerate(scorers):
        scores, predicted = [routed.scores[at] for routed in done], [routed.predicted[at] for routed in done]
        active = [routed.active[at] for routed in done]
        selected.append(marked(real, active))
        tables.append(placed(real, scores))
        losses["predictor"] = losses["predictor"] + membership(predicted, active)
        if isinstance(scorer, Mapping):  # what is given is not trained
            losses["membership"] = losses["membership"] + settings.loss * membership(scores, active)
            losses["z"] = losses["z"] + settings.z * squares(scores)
    logits = torch.stack([row.logits(routed.states) for row, routed in zip(rows, done, strict=True)])
    return Result(logits, losses, selected, tables)
