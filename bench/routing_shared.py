"""A recursion that reads the keys of the first one, beside forms that compute all tokens or mask by position."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from routing_layer import flops_of_layer, least, share_of
from routing_layers import Keys, Layers, applied, at, best, combined, scored
from routing_ops import by_position
from routing_plan import OURS, Row
from routing_race import Race, judged
from routing_region import HALF, Region, by_depthc, ready, routed_by, stream_of
from routing_time import Place, Ready, Variants, clock_of, require_cuda
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import depthc
from depthc.ir.cost.flops import flops

RECIPE = (
    'tie(loops=2, sharing="middle_cycle", keep=(1, 0)) | route(capacities=(1.0, {share!r}), kv="share_first", loss=0.0)'
)


def measure(row: Row, place: Place) -> dict[str, Any]:
    """One row of the kind "shared": the second recursion alone."""
    began = time.perf_counter()
    stack, h = Layers(row.sizes, 2 * row.layers + 1).to(place.device, HALF), stream_of(row, place.device)
    dense = depthc.capture(stack, (h,))
    module = routed_by(RECIPE.format(share=share_of(row)), dense, row.training)
    shared = Shared(row, place, stack, Region(module, h, 1))
    doors = {
        door: partial(by_depthc, place, module, partial(Region, h=h, recursion=1), door, row.training) for door in OURS
    }
    race = Race(clock_of(row, place, began)).run(shared.variants() | doors)
    layer = flops_of_layer(row, dense, 2 * row.layers + 1)
    own = float(flops(module.program).subs({"b": row.sizes.batch, "s": row.sizes.tokens})) - (1 + row.layers) * layer
    share = own / (row.layers * layer)
    others = {"closed form": race.median("dense") * share} if "dense" in race.times else {}
    text = str(module.explain_kernels())
    found = judged(race, row.asked, **least(row, own), choices=text, reference="all tokens", others=others)
    return found | {"share": share}


class Shared:
    """The recursion by hand; its keys are those that depthc stored."""

    def __init__(self, row: Row, place: Place, stack: Layers, region: Region) -> None:
        self.row, self.place, self.layers, self.stream = row, place, stack.layers[1 : row.layers + 1], region.stream
        stored = region.cached() if row.training else [tensor.detach() for tensor in region.cached()]
        self.keys: list[Keys] = list(zip(stored[::2], stored[1::2], strict=True))
        router = region.module.parameter_of("depth.r.1.router.weight")
        self.router = router.detach().clone().requires_grad_()
        self.cos, self.sin = stack.tables(region.stream)

    def variants(self) -> Variants:
        """Compiled layers on all tokens, of which the closed form takes its share; and forms of the recursion.

        Published code runs it on all tokens; FlexAttention masks by position.
        """
        training, read = self.row.training, [self.router, *(t for pair in self.keys for t in pair)]
        weights = list(self.layers.parameters())
        used = [p for n, p in self.layers.named_parameters() if n.split(".")[1] not in ("k", "v")]
        dense, compiled = (lambda x: applied(self.layers, x, self.cos, self.sin)), self.place.compiled
        return {
            "dense": lambda: ready(compiled(dense), self.stream, weights, training),
            "all tokens": lambda: ready(self.all_tokens, self.stream, [*used, *read], training),
            "all tokens, compiled": lambda: ready(
                compiled(lambda x: self.all_tokens(x)), self.stream, [*used, *read], training
            ),
            "FlexAttention": lambda: self._flex([*used, *read]),
        }

    def _flex(self, given: Sequence[Tensor]) -> Ready:
        if self.row.training:
            require_cuda(self.place, "the backward of FlexAttention")
        choose, run = self.place.compiled(lambda h: self.choice(h)), self.place.compiled(lambda *x: self.flex(*x))
        mask = self.place.compiled(lambda p, size: by_position(p, size))  # by itself: `routing_op._flex`

        def forward(h: Tensor) -> Tensor:
            logit, positions = choose(h)
            return run(h, logit, positions, mask(positions, h.shape[1]))  # type: ignore[no-any-return]

        return ready(forward, self.stream, given, self.row.training)

    def choice(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The logit of every token, and the positions of those that are chosen."""
        logit = scored(h, self.router)
        return logit, best(logit, self.row.chosen)

    def all_tokens(self, h: Tensor) -> Tensor:
        """Every token runs, and the rows of the chosen ones are taken of the result."""
        (logit, positions), y = self.choice(h), h
        for layer, keys in zip(self.layers, self.keys, strict=True):
            y = layer(y, self.cos, self.sin, keys)
        return combined(h, y.gather(1, at(positions, h)), logit, positions)

    def flex(self, h: Tensor, logit: Tensor, positions: Tensor, mask: BlockMask) -> Tensor:
        """The chosen tokens run, with a mask by their positions."""
        attend = partial(flex_attention, block_mask=mask, enable_gqa=True)
        y, cos, sin = h.gather(1, at(positions, h)), self.cos[positions][:, None], self.sin[positions][:, None]
        for layer, keys in zip(self.layers, self.keys, strict=True):
            y = layer(y, cos, sin, keys, attend)
        return combined(h, y, logit, positions)
