"""Taps of passes that route: the choices of every place, and the losses that it adds; `codegen/aux.py` reads them."""

from __future__ import annotations

from collections.abc import Iterator

from depthc.ir.body import Body
from depthc.ir.names import Names
from depthc.ir.program import Op, Segment, Tap


def route_taps(at: str, candidates: str, chosen: str, logit: str | None = None) -> Iterator[Tap]:
    """What a place chose: `at` is the loop and the recursion, or the pass and the layer."""
    values = {"logit": logit, "candidates": candidates, "chosen": chosen}
    yield from (Tap(f"route.{at}.{what}", value) for what, value in values.items() if value is not None)


def loss_taps(at: str, name: str, body: Body, reads: tuple[str, ...], names: Names) -> Iterator[Op]:
    """A loss term, computed by glue."""
    write = names.new("loss")
    yield Segment(f"{name}_loss", body, reads, (write,))
    yield Tap(f"loss.{at}.{name}", write)
