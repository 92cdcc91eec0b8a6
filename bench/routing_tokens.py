"""Token choice with random depths, beside compiled layers on the same numbers of tokens, and beside packing by hand."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any

import torch
from routing_layers import Layers, applied
from routing_plan import PLAIN, Row
from routing_race import FLOPS, Race, judged
from routing_region import HALF, ready, routed_by
from routing_time import Place, Ready, clock_of, require_cuda
from torch import Tensor

import depthc
from depthc.codegen.module import DepthModule
from depthc.ir.cost.flops import flops

LOOPS, VOCABULARY = 3, 512
ROUTER = "depth.r.router.weight"
RECIPE = f"tie(loops={LOOPS}) | tokenchoice(balance=0.0)"


def measure(row: Row, place: Place) -> dict[str, Any]:
    """One row of the kind "tokens": a whole forward, from the embedding on."""
    began, s = time.perf_counter(), row.sizes
    stack = Layers(s, LOOPS * row.layers, VOCABULARY).to(place.device, HALF)
    generator = torch.Generator(place.device).manual_seed(0)
    ids = torch.randint(VOCABULARY, (s.batch, s.tokens), generator=generator, device=place.device)
    module = routed_by(RECIPE, depthc.capture(stack, (ids,)), row.training)
    with torch.no_grad():
        routes = module.forward_with_aux(ids)[1].routes
        sizes = torch.stack([route.chosen.sum(1) for route in routes])  # [recursion, row]
    choice = Choice(row, place, stack, module, ids)
    variants = {
        "dense": partial(choice.dense, (sizes.sum(1) / s.batch).round().long().tolist()),
        "eager": partial(choice.depthc, False, False),
        "packed by hand": choice.by_hand,
        "bodies": partial(choice.depthc, True, True),
        "whole": choice.whole,
        f"bodies, {PLAIN}": partial(choice.depthc, True, False),
    }
    race = Race(clock_of(row, place, began)).run(variants)
    one = flops(module.program).subs({"b": 1, "s": s.tokens})
    each = [one.subs({f"chosen_{r}": size for r, size in enumerate(own)}) for own in sizes.T.tolist()]
    work = float(sum(each)) * (3 if row.training else 1)
    text = str(module.explain_kernels())
    found = judged(race, row.asked, flops=work, moved=0.0, floor=work / FLOPS, choices=text)
    return found | {"shares": (sizes.sum(1) / (s.batch * s.tokens)).tolist()}


class Choice:
    """Ways to run every token as deep as it chose."""

    def __init__(self, row: Row, place: Place, stack: Layers, module: DepthModule, ids: Tensor) -> None:
        self.row, self.place, self.stack, self.module, self.ids = row, place, stack, module, ids
        self.layers = stack.layers[: row.layers]
        self.router = module.parameter_of(ROUTER).detach().clone().requires_grad_()
        with torch.no_grad():
            self.cos, self.sin = stack.tables(stack.embed(ids))

    def depthc(self, compiled: bool, kernels: bool) -> Ready:
        """The module itself. Only the data say how many rows there are, and the host waits for them."""
        module = copy.deepcopy(self.module)
        if not kernels:
            module.kernels = ()
        if compiled:
            self.place.compile(module, dynamic=None)  # the data decide how many rows there are
        given = [module.parameter_of(ROUTER), *(p for _, p in module.named_parameters() if p.requires_grad)]
        return ready(module, self.ids, given, self.row.training)

    def whole(self) -> Ready:
        """One graph of the module: rows are packed at the size of all tokens, and nothing waits for their number."""
        module = copy.deepcopy(self.module)
        module.bounded = True
        module(self.ids)  # rows are traced before the whole is
        given = [module.parameter_of(ROUTER), *(p for _, p in module.named_parameters() if p.requires_grad)]
        return ready(self.place.compiled(lambda ids: module(ids)), self.ids, given, self.row.training)

    def dense(self, counts: list[int]) -> Ready:
        """The layers on as many tokens, one recursion after the other."""
        run = self.place.compiled(lambda h, cos, sin: applied(self.layers, h, cos, sin))

        def forward(ids: Tensor) -> Tensor:
            h = self.stack.embed(ids)
            for count in counts:
                h = run(h[:, :count], self.cos[:count], self.sin[:count])
            return h

        return ready(forward, self.ids, list(self.layers.parameters()), self.row.training)

    def by_hand(self) -> Ready:
        """Packed rows, torch's attention for sequences of unequal length, layers compiled for any number of rows."""
        require_cuda(self.place, "varlen_attn")
        run = torch.compile(_packed, backend=self.place.backend, fullgraph=True, dynamic=True)
        given = [self.router, *self.layers.parameters()]
        return ready(partial(self._by_hand, run), self.ids, given, self.row.training)

    def _by_hand(self, run: Any, ids: Tensor) -> Tensor:
        start = self.stack.embed(ids)
        share, depth = (start.float() @ self.router.T).softmax(-1).max(-1)
        flat, share, depth = start.flatten(0, 1), share.flatten(), depth.flatten()
        places = torch.arange(len(flat), device=ids.device)
        rows, out = flat, flat
        for r in range(LOOPS):
            counts = torch.bincount(places // ids.shape[1], minlength=ids.shape[0])
            ends = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
            at = places % ids.shape[1]
            rows = run(self.layers, rows, self.cos[at], self.sin[at], ends, int(counts.max()))
            leaving = depth[places] == r
            gone = places[leaving]
            left = (flat[gone].float() + share[gone, None] * rows[leaving].float()).to(flat.dtype)
            out = out.index_put((gone,), left)
            rows, places = rows[~leaving], places[~leaving]
        return out.view_as(start)


def _packed(layers: Any, rows: Tensor, cos: Tensor, sin: Tensor, ends: Tensor, most: int) -> Tensor:
    """Layers on packed rows [members, features]."""
    from torch.nn.attention.varlen import varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[1]
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        out = varlen_attn(q, k, v, ends, ends, most, most, window_size=(-1, 0))
        return out.transpose(0, 1)[None]  # type: ignore[union-attr]

    h = rows[None]
    for layer in layers:
        h = layer(h, cos, sin, attend=attend)
    return h[0]
