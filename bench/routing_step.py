"""A training step of an expert-choice module as one CUDA graph, optimizer included: nothing waits for the device."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from routing_layers import Layers
from routing_plan import Row
from routing_race import FLOPS, Race, judged
from routing_region import HALF, routed_by, stream_of
from routing_time import Place, Ready, Variants, captured, clock_of
from routing_whole import RECIPE
from torch import Tensor

import depthc
from depthc.ir.cost.flops import flops


def measure(row: Row, place: Place) -> dict[str, Any]:
    """One row of the kind "step": a training step of an expert-choice module, optimizer included, as one CUDA graph."""
    if not place.cuda:
        return {"skipped": "CUDA graphs need CUDA"}
    began, stack, h = (
        time.perf_counter(),
        Layers(row.sizes, row.layers).to(place.device, HALF),
        stream_of(row, place.device),
    )
    module = routed_by(RECIPE, depthc.capture(stack, (h,)), training=True)

    def made(compile: bool) -> Ready:
        own = copy.deepcopy(module)
        if compile:
            place.compile(own)
        optimizer = torch.optim.AdamW(own.parameters(), 0.0, fused=True, capturable=True)

        def run() -> Tensor:
            out, aux = own.forward_with_aux(h)
            loss = out.float().square().mean() + aux.loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Ready(run)

    variants: Variants = {
        "eager": lambda: made(False),
        "bodies": lambda: made(True),
        "eager, graph": lambda: captured(made(False)),
        "bodies, graph": lambda: captured(made(True)),
    }
    race = Race(clock_of(row, place, began)).run(variants)
    work = 3 * float(flops(module.program).subs({"b": row.sizes.batch, "s": row.sizes.tokens}))
    text = str(module.explain_kernels())
    return judged(race, row.asked, flops=work, moved=0.0, floor=work / FLOPS, choices=text)
