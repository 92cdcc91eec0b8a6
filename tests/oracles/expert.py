"""Expert-choice Mixture-of-Recursions: recipes.md, section 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .recursions import Recursions, require_tied
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
from .tying import Tied, tie


@dataclass(frozen=True)
class Settings:
    """The options of `mor`, expert-choice. `causal`: tokens pass a threshold instead of being ranked.

    Warm-up is of the ranking alone: in causal use a recursion has the capacity that is written here.
    """

    loops: int = 3
    sharing: str = "middle_cycle"
    init: str = "stepwise"
    capacities: tuple[float, ...] = ()  # empty: (N - r) / N
    alpha: float = 0.1
    gate: str = "sigmoid"  # tanh, none
    combine: str = "weighted"  # additive, delta, off
    kv: str = "recursion"  # share_first, update
    router: str = "linear"  # mlp
    loss: float = 0.001
    causal: bool = False
    temperature: float = 1.0
    per: str = "row"  # document
    aux: bool = False  # a second router, which learns the choice and decides in causal use
    z: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        default = tuple((self.loops - r) / self.loops for r in range(self.loops))
        object.__setattr__(self, "capacities", self.capacities or default)
        falling = all(a >= b for a, b in zip(self.capacities, self.capacities[1:], strict=False))
        if len(self.capacities) != self.loops or not falling or not all(0 < c <= 1 for c in self.capacities):
            raise ValueError(f"capacities {self.capacities} for {self.loops} loops")
        if self.kv != "recursion" and self.capacities[0] != 1:
            raise ValueError(f"{self.kv} needs every token in recursion 0")
        if self.per not in ("row", "document"):
            raise ValueError(f"the best per {self.per}")
        require_tied(self.sharing, self.kv)


@dataclass(frozen=True)
class Result(Outcome):
    """`selected` and the logits of routers have a [B, S] for each recursion; NaN where there was no candidate."""

    selected: list[Tensor]
    router_logits: list[Tensor]
    aux_logits: list[Tensor]  # empty without an auxiliary router


def make_routers(settings: Settings, seed: int = 0) -> list[dict[str, Tensor]]:
    """One a recursion; auxiliary ones are of the same kind."""
    generator = torch.Generator().manual_seed(seed)
    return [make_router(settings.router, generator) for _ in range(settings.loops)]


def choose(settings: Settings, row: Row, r: int, step: int, logits: Mapping, judged: Mapping) -> list[int]:
    """The active tokens among the candidates, in order of position; `judged` are the auxiliary logits."""
    require_numbers(logits, f"recursion {r}")
    if settings.causal:
        return passing(settings.capacities[r], judged if settings.aux else logits)
    return best(row, settings.per, warmed(settings.capacities[r], step, settings.warmup), logits)


def combine(settings: Settings, x: Tensor, block: Tensor, logit: Tensor) -> Tensor:
    """The new state of an active token; `block` is the output of the tied layers, which contains x."""
    alpha = settings.alpha
    s = {"sigmoid": alpha * torch.sigmoid(logit), "tanh": alpha * torch.tanh(logit), "none": logit}[settings.gate]
    new = {"weighted": x + s * block, "additive": x + block, "delta": x + s * (block - x), "off": block}
    return new[settings.combine]


def logits_at(router: Router, states: Mapping, candidates: Sequence[int], settings: Settings) -> dict[int, Tensor]:
    return {t: router_logits(router, states[t], settings.temperature)[0] for t in candidates}


@dataclass
class Routed:
    """What a row leaves: its last states, and for each recursion the candidates' logits and the active tokens."""

    states: dict[int, Tensor]
    logits: list[dict[int, Tensor]] = field(default_factory=list)
    judged: list[dict[int, Tensor]] = field(default_factory=list)
    active: list[list[int]] = field(default_factory=list)


def route_row(
    recursions: Recursions, settings: Settings, routers: Sequence, aux: Sequence, step: int, states: dict[int, Tensor]
) -> Routed:
    row = recursions.row
    found = Routed(recursions.before(states))
    candidates = [t for t in states if row.real[t]]
    for r in range(settings.loops):
        logits = logits_at(routers[r], found.states, candidates, settings)
        detached = {t: x.detach() for t, x in found.states.items()}
        judged = logits_at(aux[r], detached, candidates, settings) if settings.aux else {}
        candidates = choose(settings, row, r, step, logits, judged)
        block = recursions.run(r, {t: found.states[t] for t in candidates})
        found.states |= {t: combine(settings, found.states[t], block[t], logits[t]) for t in candidates}
        found.logits.append(logits)
        found.judged.append(judged)
        found.active.append(candidates)
    found.states = recursions.after(found.states)
    return found


def route(
    math_: LayerMath,
    settings: Settings,
    routers: Sequence[Router],
    inputs: Inputs,
    real: Tensor,
    documents: Tensor | None = None,
    tied: Tied | None = None,
    aux: Sequence[Router] = (),
    step: int = 0,
) -> Result:
    """The routed model, one row after another, after `step` optimizer steps.

    `tied`, where given, has the slots instead of the model's layers; `aux` are the auxiliary routers.
    """
    tied = tied or tie(math_, settings.sharing, settings.loops, settings.init)
    rows, done = rows_of(math_, real, documents), []
    for b, row in enumerate(rows):
        recursions = Recursions(row, tied, settings.sharing, settings.loops, settings.kv)
        done.append(route_row(recursions, settings, routers, aux, step, dict(enumerate(math_.embed(inputs, b)))))
    losses = {name: torch.zeros((), dtype=torch.float64) for name in ("membership", "aux", "z")}
    selected, tables, judged_tables = [], [], []
    for r in range(settings.loops):
        logits, judged = [routed.logits[r] for routed in done], [routed.judged[r] for routed in done]
        active = [routed.active[r] for routed in done]
        losses["membership"] = losses["membership"] + settings.loss * membership(logits, active)
        losses["aux"] = losses["aux"] + membership(judged, active)
        losses["z"] = losses["z"] + settings.z * squares(logits)
        selected.append(marked(real, active))
        tables.append(placed(real, logits))
        judged_tables += [placed(real, judged)] if settings.aux else []
    out = torch.stack([row.logits(routed.states) for row, routed in zip(rows, done, strict=True)])
    return Result(out, losses, selected, tables, judged_tables)
