"""One op by itself, several inputs one after the other in one CUDA graph."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from routing_ops import OPS, Function, Inputs, Op, by_position, flex, inputs_of
from routing_plan import Row
from routing_race import BYTES, FLOPS, Race, judged
from routing_time import Place, Ready, Variants, captured, clock_of, require_cuda
from torch import Tensor

from depthc.codegen.kernels.common import runs_on

ROTATED, MOST = 512 << 20, 8  # bytes that the inputs of a sample hold in all, so that none is in L2; and their number


def measure(row: Row, place: Place) -> dict[str, Any]:
    """One row of the kind "op"."""
    began, op, first = time.perf_counter(), OPS[row.op], inputs_of(row.sizes, row.chosen, place.device, 0)
    flops, moved = op.least(first, row.training)
    count = max(2, min(MOST, math.ceil(ROTATED / moved))) if place.cuda else 2
    sets = [first, *(inputs_of(row.sizes, row.chosen, place.device, seed) for seed in range(1, count))]
    race = Race(clock_of(row, place, began, each=count)).run(variants_of(row, op, sets, place))
    missing = runs_on(first.stream)
    choices = f"kernel: {f'torch, since {missing}' if missing else 'Triton'}"
    floor = max(flops / FLOPS, moved / BYTES)
    found = judged(race, row.asked, flops=flops, moved=moved, floor=floor, choices=choices)
    return found | {"l2": f"{count} inputs in turn, {count * moved / 1e6:.1f} MB in all"}


def variants_of(row: Row, op: Op, sets: list[Inputs], place: Place) -> Variants:
    """The kernel and plain torch, both also compiled, and whatever else there is."""

    def made(function: Function, compile: bool = True) -> Callable[[], Ready]:
        def make() -> Ready:
            if function is flex:
                return _ready(row, op, _flex(row, place), sets, place)
            return _ready(row, op, place.compiled(function) if compile else function, sets, place)

        return make

    found = {"kernel": made(op.kernel, False), "kernel, compiled": made(op.kernel)}
    found |= {"eager": made(op.plain, False), "eager form, compiled": made(op.plain)}
    return found | {name: made(function) for name, function in op.others}


def _flex(row: Row, place: Place) -> Function:
    """FlexAttention; its mask is a graph of its own: in one, Inductor of torch 2.11 fails where no gradient is."""
    if row.training:
        require_cuda(place, "the backward of FlexAttention")
    mask, attend = place.compiled(lambda p, size: by_position(p, size)), place.compiled(lambda x, m: flex(x, m))
    return lambda x: attend(x, mask(x.positions, x.k.shape[2]))


def _ready(row: Row, op: Op, function: Function, sets: list[Inputs], place: Place) -> Ready:
    own = [x._replace(stream=x.stream.clone()) for x in sets] if op.writes else sets

    def run() -> Tensor:
        made = [_differentiated(op, function, x) if row.training else function(x)[0] for x in own]
        return made[0]

    def reset() -> None:
        for mine, given in zip(own, sets, strict=True):
            mine.stream.copy_(given.stream)

    one = Ready(run, reset) if op.writes else Ready(run)
    return captured(one) if place.cuda else one


def _differentiated(op: Op, function: Function, x: Inputs) -> Tensor:
    """The first gradient of a forward and backward."""
    wanted = [getattr(x, name).detach().requires_grad_() for name in op.wanted]
    outs = function(x._replace(**dict(zip(op.wanted, wanted, strict=True))))
    given = [x.grad if out.shape == x.grad.shape else x.rows if out.shape == x.rows.shape else x.q for out in outs]
    return torch.autograd.grad(outs, wanted, given)[0]
