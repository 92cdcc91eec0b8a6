"""Token-choice Mixture-of-Recursions: recipes.md, section 4.

Each token says at the start how deep it goes, by itself: later tokens change nothing, in training too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .recursions import Recursions, require_tied
from .routers import Outcome, Router, make_router, mean, placed, require_numbers, router_logits, squares
from .rows import Inputs, LayerMath, rows_of
from .tying import Tied, tie


@dataclass(frozen=True)
class Settings:
    """The options of `mor_token`. In the first `bal_warmup` steps of training everyone goes through all recursions."""

    loops: int = 3
    sharing: str = "middle_cycle"
    init: str = "stepwise"
    gate: str = "softmax"  # sigmoid
    alpha: float | None = None  # 1, or 0.1 with sigmoid
    combine: str = "weighted"  # additive, delta, off
    kv: str = "recursion"  # share_first, update
    router: str = "linear"  # mlp
    temperature: float = 1.0
    balance: float = 0.1  # 0 where a bias balances
    z: float = 0.0
    bal_warmup: int = 0

    def __post_init__(self) -> None:
        if self.alpha is None:
            object.__setattr__(self, "alpha", {"softmax": 1.0, "sigmoid": 0.1}[self.gate])
        require_tied(self.sharing, self.kv)


@dataclass(frozen=True)
class Result(Outcome):
    """Of padded tokens the depth is -1 and the logits are NaN."""

    depths: Tensor  # [B, S]: the last recursion of a token
    router_logits: Tensor  # [B, S, N]
    counts: Tensor  # [N]: the real tokens of each depth

    @property
    def selected(self) -> list[Tensor]:
        """[B, S] for each recursion: who is active."""
        return [self.depths >= r for r in range(len(self.counts))]


def make_router_of(settings: Settings, seed: int = 0) -> dict[str, Tensor]:
    """The router, of all depths."""
    return make_router(settings.router, torch.Generator().manual_seed(seed), settings.loops)


def shares(settings: Settings, logits: Tensor) -> Tensor:
    """What a token gives each depth, [N]."""
    return settings.alpha * (logits.softmax(0) if settings.gate == "softmax" else torch.sigmoid(logits))


def deepest(settings: Settings, given: Tensor, bias: Tensor | None, step: int) -> int:
    """The depth of a token: the largest share, bias counted in; among equal ones the least depth."""
    if step < settings.bal_warmup:
        return settings.loops - 1
    ranked = (given if bias is None else given + bias).tolist()
    return ranked.index(max(ranked))


def combine(settings: Settings, x: Tensor, block: Tensor, share: Tensor) -> Tensor:
    """The state of a token that leaves: `x` as it came in, `block` behind its last recursion."""
    new = {"weighted": x + share * block, "additive": x + block, "delta": x + share * (block - x), "off": block}
    return new[settings.combine]


def route_row(
    recursions: Recursions,
    settings: Settings,
    given: Mapping[int, Tensor],
    depths: Mapping[int, int],
    states: dict[int, Tensor],
) -> dict[int, Tensor]:
    """The recursions of a row. No gate in between; a token is combined with its first state as it leaves."""
    inside = {t: states[t] for t in depths}
    for r in range(settings.loops):
        inside = recursions.run(r, {t: x for t, x in inside.items() if depths[t] >= r})
        states = states | {t: combine(settings, states[t], x, given[t][r]) for t, x in inside.items() if depths[t] == r}
    return states


def route(
    math_: LayerMath,
    settings: Settings,
    router: Router,
    inputs: Inputs,
    real: Tensor,
    documents: Tensor | None = None,
    tied: Tied | None = None,
    bias: Tensor | None = None,
    step: int = 0,
) -> Result:
    """The routed model, one row after another, after `step` optimizer steps; `bias` [N] counts for the choice alone."""
    tied = tied or tie(math_, settings.sharing, settings.loops, settings.init)
    logits, given, depths, out = [], [], [], []
    for b, row in enumerate(rows_of(math_, real, documents)):
        recursions = Recursions(row, tied, settings.sharing, settings.loops, settings.kv)
        states = recursions.before(dict(enumerate(math_.embed(inputs, b))))
        logits.append({t: router_logits(router, states[t], settings.temperature) for t in states if row.real[t]})
        require_numbers(logits[-1], f"row {b}")
        given.append({t: shares(settings, z) for t, z in logits[-1].items()})
        depths.append({t: deepest(settings, share, bias, step) for t, share in given[-1].items()})
        out.append(row.logits(recursions.after(route_row(recursions, settings, given[-1], depths[-1], states))))
    chosen = [d for row in depths for d in row.values()]
    counts = torch.tensor([chosen.count(i) for i in range(settings.loops)])
    losses = {
        "balance": settings.balance * balance(counts, [share for row in given for share in row.values()]),
        "z": settings.z * squares(logits),
    }
    table = torch.full(real.shape, -1)
    for b, row in enumerate(depths):
        for t, d in row.items():
            table[b, t] = d
    return Result(torch.stack(out), losses, table, placed(real, logits, (settings.loops,)), counts)


def balance(counts: Tensor, given: list[Tensor]) -> Tensor:
    """N sum_i f_i P_i: the fraction of the tokens at each depth, times the mean of what all tokens give it."""
    fractions = [count / max(len(given), 1) for count in counts.tolist()]
    return len(counts) * sum(f * mean(share[i] for share in given) for i, f in enumerate(fractions))


def moved(settings: Settings, bias: Tensor, counts: Tensor, step: int, rate: float = 1e-3) -> Tensor:
    """The bias after step number `step`, by the counts of all ranks: up where fewer tokens than the mean went.

    Counts are compared as integers, so that at the mean nothing moves. While depths are imposed nothing moves either.
    """
    if step < settings.bal_warmup:
        return bias
    return bias + rate * torch.sign(counts.sum() - len(counts) * counts)
