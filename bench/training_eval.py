"""What a trained model of the experiment is worth: bits a byte on held-out text, and what its routers do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from training_model import loss_of
from training_plan import VARIANTS, Settings

from depthc.codegen.aux import Aux
from depthc.codegen.module import DepthModule
from depthc.runtime.telemetry import combine, depth_of, report


def windows(text: Tensor, settings: Settings) -> Tensor:
    """Rows of a text that do not overlap, spread evenly: uint8[rows, context]."""
    rows = text[: len(text) // settings.context * settings.context].view(-1, settings.context)
    return rows[:: -(-len(rows) // settings.windows)]


def judged(module: DepthModule, variant: str, text: Tensor, settings: Settings) -> dict[str, Any]:
    """The results with the causal rule of inference, and with top-k where training selects by that.

    Top-k sees the whole window, later bytes too: its loss is none that a model of language can have.
    """
    rules = {"causal": "inference"} | ({"topk": "training"} if VARIANTS[variant].topk else {})
    return {name: _under(module, rule, windows(text, settings), settings) for name, rule in rules.items()}


@torch.no_grad()
def _under(module: DepthModule, rule: str, rows: Tensor, settings: Settings) -> dict[str, Any]:
    """Bits a byte with the standard error of the mean over windows, and routing."""
    module.eval()
    module.selection = rule
    losses, routing = [], Routing()
    with torch.compiler.set_stance("force_eager"):  # to compile for inference takes longer than this
        for batch in rows.split(settings.batch):
            _, each, aux = loss_of(module, batch.long(), rows.device.type)
            losses.append(each.double())
            routing.add(aux)
    module.selection = "inference"
    bits = torch.cat(losses) / math.log(2)
    found = {"bits": bits.mean().item(), "error": (bits.std() / math.sqrt(len(bits))).item(), "windows": len(bits)}
    return found | routing.numbers()


class Routing:
    """What routers chose on many batches."""

    def __init__(self) -> None:
        self._taps: list[Aux] = []
        self._layers: dict[int, Tensor] = {}  # of Mixture-of-Depths: candidates, chosen, foretold
        self._depths: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._reports: list[Any] = []

    def add(self, aux: Aux) -> None:
        """Count a batch."""
        routes = aux.routes
        if not routes:
            return
        self._depths.append(depth_of(aux).flatten().bincount(minlength=len(routes) + 1))
        self._positions.append(torch.stack([route.chosen.sum(0) for route in routes]))
        if routes[0].loop == "mod":  # not nested: `report` is about recursions
            for route in routes:
                right = ((route.logit > 0) == route.chosen) & route.candidates  # type: ignore[operator]
                counts = torch.stack([route.candidates.sum(), route.chosen.sum(), right.sum()])
                self._layers[route.recursion] = self._layers.get(route.recursion, 0) + counts
        else:
            self._reports.append(report(aux))

    def numbers(self) -> dict[str, Any]:
        """Shares and means; empty where nothing routes.

        `dead_positions` is the share of positions in a window that no window chose for the last recursion, or for any
        layer: what the code published with Mixture-of-Recursions calls dead, but for what it counts over.
        """
        if not self._depths:
            return {}
        depths = torch.stack(self._depths).sum(0)
        positions = torch.stack(self._positions).sum(0)
        shares = (depths / depths.sum()).tolist()
        if self._layers:
            candidates, chosen, right = torch.stack([self._layers[n] for n in sorted(self._layers)]).unbind(1)
            return {
                "depths": shares,
                "dead": shares[0],
                "dead_positions": (positions.sum(0) == 0).double().mean().item(),
                "chosen": (chosen / candidates).tolist(),
                "accuracy": (right / candidates).tolist(),
            }
        found = combine(self._reports)
        return {
            "depths": shares,
            "dead": found.dead,
            "dead_positions": (positions[-1] == 0).double().mean().item(),
            "chosen": [chosen / found.tokens for chosen in found.chosen],
            "accuracy": [None if math.isnan(share) else share for share in found.accuracy],
            "entropy": [None if math.isnan(share) else share for share in found.entropy],
        }
