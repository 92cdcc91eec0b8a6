"""The routed layer beside the same layers on as many tokens, and beside routing by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from routing_layers import Layers, applied, routed
from routing_plan import OURS, PLAIN, Row
from routing_race import BYTES, FLOPS, Race, judged
from routing_region import HALF, Region, by_depthc, ready, routed_by, stream_of
from routing_time import Place, Ready, Variants, captured, clock_of
from torch import Tensor

import depthc
from depthc.codegen.module import DepthModule
from depthc.ir.cost.flops import flops
from depthc.ir.program import Program

RECIPE = 'tie(loops=1, sharing="middle_cycle", keep=(1, 0)) | route(capacities=({share!r},), loss=0.0)'


def measure(row: Row, place: Place) -> dict[str, Any]:
    """One row of the kinds "layer" and "graph": a graph is a whole region as one CUDA graph."""
    began, graph = time.perf_counter(), row.kind == "graph"
    if graph and not place.cuda:
        return {"skipped": "CUDA graphs need CUDA"}
    stack, h = Layers(row.sizes, row.layers + 1).to(place.device, HALF), stream_of(row, place.device)
    dense = depthc.capture(stack, (h.expand(max(2, len(h)), -1, -1),))  # of one sequence it would take no more
    module = routed_by(RECIPE.format(share=share_of(row)), dense, row.training)
    clock = clock_of(row, place, began, flush=graph)
    race = Race(clock).run(variants_of(row, place, stack, module, h))
    work = least(row, operations(row, dense, module.program))
    others = {"dense + 25 us": race.median("dense") + 25e-6} if "dense" in race.times else {}
    return judged(race, row.asked, **work, choices=str(module.explain_kernels()), others=others)


def share_of(row: Row) -> float:
    """The capacity that lets in exactly as many tokens as the row says."""
    share = row.chosen / row.sizes.tokens
    assert int(share * row.sizes.tokens) == row.chosen, "a size that floats do not divide"
    return share


def variants_of(row: Row, place: Place, stack: Layers, module: DepthModule, h: Tensor) -> Variants:
    """How every variant is made."""
    layers, training, k = stack.layers[1:], row.training, row.chosen
    stream = Region(module, h).stream
    router = module.parameter_of("depth.r.0.router.weight").detach().clone().requires_grad_(training)
    cos, sin = stack.tables(stream)
    by_hand = partial(routed, layers, router, k, cos=cos, sin=sin)
    rows, tables = stream[:, :k].contiguous(), (cos[:k], sin[:k])
    weights = list(layers.parameters())
    doors = OURS if training else ("in place", *OURS)
    if row.layers == 1 and row.kind == "layer":
        doors = (*doors, *(f"{door}, {PLAIN}" for door in OURS))
    found: dict[str, Any] = {
        "dense": lambda: ready(place.compiled(lambda x: applied(layers, x, *tables)), rows, weights, training),
        "eager": lambda: ready(by_hand, stream, [*weights, router], training),
        "eager form, compiled": lambda: ready(
            place.compiled(lambda x: by_hand(x)), stream, [*weights, router], training
        ),
        **{door: partial(by_depthc, place, module, partial(Region, h=h), door, training) for door in doors},
    }
    return {name: partial(_as_graph, make) for name, make in found.items()} if row.kind == "graph" else found


def _as_graph(make: Callable[[], Ready]) -> Ready:
    return captured(make())


def flops_of_layer(row: Row, dense: Program, layers: int) -> float:
    """The operations of one layer on all tokens, of a program that has so many."""
    return float((flops(dense) / layers).subs({"b": row.sizes.batch, "s": row.sizes.tokens}))


def operations(row: Row, dense: Program, program: Program) -> float:
    """Those of the region by depthc's closed form: of all but the first layer, which is its own."""
    s = row.sizes
    whole = float(flops(program).subs({"b": s.batch, "s": s.tokens}))
    return whole - flops_of_layer(row, dense, row.layers + 1)


def least(row: Row, forward: float) -> dict[str, float]:
    """Operations, bytes and seconds that a region takes at least, of the operations of its forward.

    Products, and attention with them, run at the rate of products, and what routing moves besides at that of memory.
    """
    flops, bytes = forward * (3 if row.training else 1), moved(row)
    return {"flops": flops, "moved": bytes, "floor": flops / FLOPS + bytes / BYTES}


def moved(row: Row) -> float:
    """The bytes of routing that no product can hide: docs/kernels.md, Floors.

    Forward the router reads the stream, tokens are selected, and chosen rows are read, with what they become, and
    written. In training the combination writes a new stream; backward reads the gradient's rows, their values, and
    writes the rows' gradient; then the stream's gradient takes up those of the gathered rows and of the router, whose
    weight's gradient reads the stream once more.
    """
    s = row.sizes
    tokens, rows = s.batch * s.tokens, s.batch * row.chosen
    stream, part = tokens * s.width * HALF.itemsize, rows * s.width * HALF.itemsize
    chosen = stream + 9 * tokens + 9 * rows
    if not row.training:
        return chosen + 3 * part + 16 * rows
    return chosen + (2 * stream + part + 4 * tokens + 4 * rows) + 3 * part + (2 * stream + part) + stream
