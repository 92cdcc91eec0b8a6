"""What a forward gives beside the model's output: tapped values, losses, routes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOSS, ROUTE = "loss.", "route."


@dataclass(frozen=True)
class Route:
    """What one recursion of a routed loop chose, or one layer that chooses tokens by itself.

    Attributes:
        loop, recursion: the loop's index and its value; of such layers "mod" or "keep", and the layer's number.
        logit: [batch, tokens], of the router that decides in inference; None where none decides token by token.
        candidates, chosen: bool[batch, tokens].
    """

    loop: str
    recursion: int
    logit: Tensor | None
    candidates: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class Aux:
    """The values that a program taps, by name.

    Example:
        >>> Aux({"loss.r.0.router": torch.tensor(0.25), "loss.r.1.router": torch.tensor(0.5)}).loss
        tensor(0.7500)
    """

    taps: Mapping[str, Any]

    @property
    def losses(self) -> dict[str, Tensor]:
        """Every auxiliary loss, weighted, by name."""
        return {name.removeprefix(LOSS): value for name, value in self.taps.items() if name.startswith(LOSS)}

    @property
    def loss(self) -> Tensor | None:
        """The sum of the losses; None if the program has none."""
        losses = list(self.losses.values())
        return torch.stack(losses).sum() if losses else None

    @property
    def routes(self) -> tuple[Route, ...]:
        """The choices of every recursion of every routed loop, and of every layer that chooses, in order."""
        return tuple(self._routes())

    def _routes(self) -> Iterator[Route]:
        names = [n.removeprefix(ROUTE).rsplit(".", 1)[0] for n in self.taps if n.startswith(ROUTE)]
        for name in dict.fromkeys(names):
            loop, number = name.rsplit(".", 1)
            sets = (self.taps[f"{ROUTE}{name}.{what}"].mask for what in ("candidates", "chosen"))
            yield Route(loop, int(number), self.taps.get(f"{ROUTE}{name}.logit"), *sets)
