"""What all recipes that route tokens share: routers, choices, losses. recipes.md, section 4."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .rows import Row
from .sizes import WIDTH

Router = Mapping[str, Tensor]  # "weight" of a linear one, "up" and "down" of one with a hidden layer; no biases


def make_router(
    kind: str, generator: torch.Generator, outputs: int = 1, width: int = WIDTH, scale: float = 0.3
) -> dict[str, Tensor]:
    """`linear`, `mlp`, or the narrower `predictor` of Mixture-of-Depths."""
    hidden = {"linear": 0, "mlp": 2 * width, "predictor": width // 4}[kind]
    shapes = {"up": (hidden, width), "down": (outputs, hidden)} if hidden else {"weight": (outputs, width)}
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()
        for name, shape in shapes.items()
    }


def router_logits(router: Router, x: Tensor, temperature: float = 1.0) -> Tensor:
    """[outputs], of one token."""
    x = x / temperature
    return router["weight"] @ x if "weight" in router else router["down"] @ F.gelu(router["up"] @ x)


def warmed(capacity: float, step: int, warmup: int) -> float:
    """The capacity after `step` optimizer steps: it falls from 1 within `warmup` steps, along a cosine."""
    if not warmup:
        return capacity
    return capacity + (1 - capacity) * (1 + math.cos(math.pi * min(1, step / warmup))) / 2


def best(row: Row, per: str, capacity: float, logits: Mapping[int, Tensor]) -> list[int]:
    """The best candidates in order of position: a share of the real tokens of the row, or of each document."""
    chosen = []
    for group in row.groups(per):
        candidates = [t for t in group if t in logits]
        count = min(max(1, int(capacity * len(group))), len(candidates))
        chosen += sorted(candidates, key=lambda t: (-logits[t].item(), t))[:count]
    return sorted(chosen)


def passing(capacity: float, logits: Mapping[int, Tensor]) -> list[int]:
    """The candidates above zero, each judged by itself; where there is place for all, all."""
    return [t for t, logit in logits.items() if capacity == 1 or logit > 0]


def require_numbers(logits: Mapping[int, Tensor], where: str) -> None:
    if any(logit.isnan().any() for logit in logits.values()):
        raise ValueError(f"a router logit of {where} is not a number")


# what rows leave, together


@dataclass(frozen=True)
class Outcome:
    """Logits of padded tokens are finite and mean nothing. Losses are weighted, by name."""

    logits: Tensor
    losses: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        return torch.stack([*self.losses.values()]).sum()


def mean(values: Iterable[Tensor]) -> Tensor:
    """Zero where there is nothing."""
    values = list(values)
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def membership(logits: Sequence[Mapping[int, Tensor]], chosen: Sequence[Sequence[int]]) -> Tensor:
    """The mean over the candidates of all rows of the cross-entropy between a logit and the choice."""
    pairs = zip(logits, chosen, strict=True)
    return mean(-F.logsigmoid(z if t in there else -z) for row, there in pairs for t, z in row.items())


def squares(logits: Sequence[Mapping[int, Tensor]]) -> Tensor:
    """The z-loss: the mean of logsumexp squared."""
    return mean(z.reshape(-1).logsumexp(0) ** 2 for row in logits for z in row.values())


def marked(real: Tensor, chosen: Sequence[Sequence[int]]) -> Tensor:
    """[B, S]: true where a token was chosen."""
    mask = torch.zeros_like(real)
    for b, tokens in enumerate(chosen):
        mask[b, list(tokens)] = True
    return mask


def placed(real: Tensor, values: Sequence[Mapping[int, Tensor]], outputs: tuple[int, ...] = ()) -> Tensor:
    """[B, S, *outputs]: a value for each token, NaN where there is none."""
    table = torch.full((*real.shape, *outputs), torch.nan, dtype=torch.float64)
    for b, row in enumerate(values):
        for t, value in row.items():
            table[b, t] = value
    return table
