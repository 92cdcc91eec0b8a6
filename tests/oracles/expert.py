"""Expert-choice Mixture-of-Recursions: recipes.md, section 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import Key
from .kinds import WIDTH
from .rows import Inputs, LayerMath, Row, rows_of
from .tying import Tied, tie, unique_layers


@dataclass(frozen=True)
class Settings:
    """The options of `mor`, expert-choice. `causal`: tokens pass a threshold instead of being ranked."""

    loops: int = 3
    sharing: str = "middle_cycle"
    init: str = "stepwise"
    capacities: tuple[float, ...] = ()  # empty: (N - r) / N
    alpha: float = 0.1
    gate: str = "sigmoid"  # tanh, none
    combine: str = "weighted"  # additive, delta, off
    kv: str = "recursion"  # share_first
    router: str = "linear"  # mlp
    loss: float = 0.001
    causal: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        default = tuple((self.loops - r) / self.loops for r in range(self.loops))
        object.__setattr__(self, "capacities", self.capacities or default)
        falling = all(a >= b for a, b in zip(self.capacities, self.capacities[1:], strict=False))
        if len(self.capacities) != self.loops or not falling or not all(0 < c <= 1 for c in self.capacities):
            raise ValueError(f"capacities {self.capacities} for {self.loops} loops")
        if self.kv == "share_first" and self.capacities[0] != 1:
            raise ValueError("share_first needs every token in recursion 0")
        if self.sharing not in ("cycle", "middle_cycle") or self.kv not in ("recursion", "share_first"):
            raise ValueError(f"routing over {self.sharing} with keys of {self.kv}")


@dataclass(frozen=True)
class Result:
    """`selected` and `router_logits` have a [B, S] for each recursion; a logit is NaN where there was no candidate.

    Logits of padded tokens are finite and mean nothing.
    """

    logits: Tensor
    selected: list[Tensor]
    router_logits: list[Tensor]
    losses: dict[str, Tensor]  # weighted, by name

    @property
    def loss(self) -> Tensor:
        return torch.stack([*self.losses.values()]).sum()


def make_routers(settings: Settings, width: int = WIDTH, seed: int = 0, scale: float = 0.3) -> list[dict[str, Tensor]]:
    shapes = {"linear": {"weight": (1, width)}, "mlp": {"up": (2 * width, width), "down": (1, 2 * width)}}
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()

    return [{name: draw(s) for name, s in shapes[settings.router].items()} for _ in range(settings.loops)]


def router_logit(router: Mapping[str, Tensor], x: Tensor, settings: Settings) -> Tensor:
    x = x / settings.temperature
    if settings.router == "linear":
        return (router["weight"] @ x)[0]
    return (router["down"] @ F.gelu(router["up"] @ x))[0]


def choose(settings: Settings, r: int, logits: Mapping[int, Tensor], tokens: int) -> list[int]:
    """The active tokens among the candidates, in order of position; `tokens` counts the real ones of the row."""
    if any(logit.isnan() for logit in logits.values()):
        raise ValueError(f"a router logit of recursion {r} is not a number")
    capacity = settings.capacities[r]
    if settings.causal:
        return [t for t, logit in logits.items() if capacity == 1 or logit > 0]
    count = min(max(1, int(capacity * tokens)), len(logits)) if tokens else 0
    ranked = sorted(logits, key=lambda t: (-logits[t].item(), t))
    return sorted(ranked[:count])


def combine(settings: Settings, x: Tensor, block: Tensor, logit: Tensor) -> Tensor:
    """The new state of an active token; `block` is the output of the tied layers, which contains x."""
    alpha = settings.alpha
    s = {"sigmoid": alpha * torch.sigmoid(logit), "tanh": alpha * torch.tanh(logit), "none": logit}[settings.gate]
    new = {"weighted": x + s * block, "additive": x + block, "delta": x + s * (block - x), "off": block}
    return new[settings.combine]


@dataclass(frozen=True)
class Routed:
    """What a row leaves: its last states, and for each recursion the candidates' logits and the active tokens."""

    states: dict[int, Tensor]
    logits: list[dict[int, Tensor]]
    active: list[list[int]]


def route_row(row: Row, tied: Tied, settings: Settings, routers: Sequence, states: dict[int, Tensor]) -> Routed:
    unique = unique_layers(settings.sharing, len(tied.order), settings.loops)
    ends = int(settings.sharing == "middle_cycle")
    if ends:
        states = row.run(tied.slots[0], 0, states)
    logits, active = [], [[t for t in states if row.real[t]]]
    first: dict[int, dict[int, Key]] = {}  # the keys and values of recursion 0, by slot
    for r in range(settings.loops):
        logits.append({t: router_logit(routers[r], states[t], settings) for t in active[-1]})
        active.append(choose(settings, r, logits[r], sum(row.real)))
        block = {t: states[t] for t in active[-1]}
        for depth in range(ends + r * unique, ends + (r + 1) * unique):
            slot, keys = tied.order[depth], None
            if settings.kv == "share_first":
                keys = first[slot] if r else first.setdefault(slot, row.keys(tied.slots[slot], block))
            block = row.run(tied.slots[slot], depth, block, keys)
        states = states | {t: combine(settings, states[t], block[t], logits[r][t]) for t in block}
    if ends:
        states = row.run(tied.slots[-1], len(tied.order) - 1, states)
    return Routed(states, logits, active[1:])


def route(
    math_: LayerMath,
    settings: Settings,
    routers: Sequence[Mapping[str, Tensor]],
    inputs: Inputs,
    real: Tensor,
    documents: Tensor | None = None,
    tied: Tied | None = None,
) -> Result:
    """The routed model, one row after another; `tied`, where given, has the slots instead of the model's layers."""
    tied = tied or tie(math_, settings.sharing, settings.loops, settings.init)
    rows = rows_of(math_, real, documents)
    done = [
        route_row(row, tied, settings, routers, dict(enumerate(math_.embed(inputs, b)))) for b, row in enumerate(rows)
    ]
    selected = [torch.zeros_like(real) for _ in routers]
    router_logits = [torch.full(real.shape, torch.nan, dtype=torch.float64) for _ in routers]
    membership = torch.zeros((), dtype=torch.float64)
    for r in range(settings.loops):
        losses = []
        for b, routed in enumerate(done):
            selected[r][b, routed.active[r]] = True
            for t, logit in routed.logits[r].items():
                router_logits[r][b, t] = logit
                losses.append(-F.logsigmoid(logit if t in routed.active[r] else -logit))
        if losses:
            membership = membership + settings.loss * sum(losses) / len(losses)
    logits = torch.stack([row.logits(routed.states) for row, routed in zip(rows, done, strict=True)])
    return Result(logits, selected, router_logits, {"membership": membership})
