"""Regions: ops on the tokens of a set only, and applications whose keys and values follow a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from depthc.ir.evaluate import Evaluator, indexed
from depthc.ir.program import Call, On, Segment
from depthc.ir.rows.run import run_rows
from depthc.ir.text.functions import walk
from depthc.ir.tokens import TokenSet


class Region(Evaluator):
    """Evaluates the body of `on`: what blocks carry is rows of the set, what else they read stays at full length.

    Whether a value is read as rows is derived: it is if a block of the region reads it as a carry, or if the region
    writes it.
    """

    def __init__(self, outer: Evaluator, op: On, tokens: TokenSet) -> None:
        super().__init__(outer.program, outer.param, outer.device, outer.training, outer.run_body)
        self.outer, self.op, self.tokens = outer, op, tokens
        self.slots, self.taps = outer.slots, outer.taps
        inside = [inner for inner, _ in walk(op.body)]
        found = [inner for inner in inside if isinstance(inner, Call)]
        carried = {name for call in found for name in call.reads[: self.program.blocks[call.block].carries]}
        made = {name for inner in inside for name in getattr(inner, "writes", ())}
        self.rows = (carried | made) if found else (set(op.reads) | made)

    def enter(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values that the region may read, gathered where it reads them as rows."""
        return {name: self.tokens.take(values[name]) if name in self.rows else values[name] for name in self.op.reads}

    def apply(self, op: Segment | Call, values: dict[str, Any], indices: Mapping[str, int]) -> None:
        """Run a block on the rows; a segment of a region reads rows alone."""
        if isinstance(op, Segment):
            super().apply(op, values, indices)
            return
        block = self.program.blocks[op.block]
        carries = [values[name] for name in op.reads[: block.carries]]
        sides = [values[name] for name in op.reads[block.carries :]]
        run_planned(self, op, carries, sides, values, indices, self.tokens)


def run_planned(
    evaluator: Evaluator,
    op: Call,
    carries: Sequence[Tensor],
    sides: Sequence[Any],
    values: dict[str, Any],
    indices: Mapping[str, int],
    tokens: TokenSet | None = None,
) -> None:
    """Apply a block to rows, with the slots of its plan as caches; writes its results into `values`."""
    slots = [indexed(plan.slot, indices) for plan in op.kv]
    given = [
        evaluator.slots.get(s) if p.mode in ("read", "update") else None for p, s in zip(op.kv, slots, strict=True)
    ]
    results, kept = run_rows(
        evaluator.program.blocks[op.block],
        carries,
        sides,
        [evaluator.param(indexed(name, indices)) for name in op.params],
        op.consts,
        positions=tokens.positions if tokens else None,
        valid=tokens.valid if tokens and not bool(tokens.valid.all()) else None,
        kv=op.kv,
        caches=given,
        ordered=True,
        training=evaluator.training,
        device=evaluator.device,
    )
    for plan, slot, cache in zip(op.kv, slots, kept, strict=False):
        if plan.mode in ("store", "update"):
            evaluator.slots[slot] = cache
    values.update(zip(op.writes, results, strict=True))
