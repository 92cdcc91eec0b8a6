"""Regions: ops on the tokens of a set only, and applications whose keys and values follow a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthc.ir.evaluate import Evaluator, gradients, indexed
from depthc.ir.masks.causality import Causality
from depthc.ir.program import Block, Call, Kv, On, Segment
from depthc.ir.rows import varlen
from depthc.ir.rows.execution import Cache
from depthc.ir.rows.gather import Rows
from depthc.ir.rows.packing import packable
from depthc.ir.rows.run import run_rows
from depthc.ir.text.functions import walk
from depthc.ir.tokens import TokenSet


class Region(Evaluator):
    """Evaluates the body of `on`: what blocks carry is rows of the set, what else they read stays at full length.

    Whether a value is read as rows is derived: it is if a block of the region reads it as a carry, or if the region
    writes it.
    """

    def __init__(self, outer: Evaluator, op: On, tokens: TokenSet) -> None:
        super().__init__(
            outer.program, outer.param, outer.device, outer.training, outer.run_body, outer.selection, outer.step
        )
        self.run_rows = outer.run_rows
        self.outer, self.op, self.tokens = outer, op, tokens
        self.slots, self.taps = outer.slots, outer.taps
        self.rows = row_names(op, self.program.blocks)
        found = [inner for inner, _ in walk(op.body) if isinstance(inner, Call)]
        self.packed = tokens.ragged and all(packable(self.program.blocks[call.block]) for call in found)

    def enter(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values that the region may read, gathered where it reads them as rows."""
        take = self.tokens.pack if self.packed else self.tokens.take
        return {name: take(values[name]) if name in self.rows else values[name] for name in self.op.reads}

    def apply(self, op: Segment | Call, values: dict[str, Any], indices: Mapping[str, int]) -> None:
        """Run a block on the rows; a segment of a region reads rows alone."""
        if isinstance(op, Segment) or (self.tokens.everyone and not op.kv):
            super().apply(op, values, indices)
            return
        block = self.program.blocks[op.block]
        carries = [values[name] for name in op.reads[: block.carries]]
        sides = [values[name] for name in op.reads[block.carries :]]
        run_planned(self, op, carries, sides, values, indices, self.tokens, self.packed)


def row_names(op: On, blocks: Mapping[str, Block]) -> set[str]:
    """The names that a region reads as rows, or makes."""
    inside = [inner for inner, _ in walk(op.body)]
    found = [inner for inner in inside if isinstance(inner, Call)]
    carried = {name for call in found for name in call.reads[: blocks[call.block].carries]}
    made = {name for inner in inside for name in getattr(inner, "writes", ())}
    return (carried | made) if found else (set(op.reads) | made)


@dataclass(frozen=True, eq=False)
class Slot:
    """What a key/value slot holds: the cache of one port, and the tokens whose keys are in it."""

    cache: Cache
    keys: Rows


def run_planned(
    evaluator: Evaluator,
    op: Call,
    carries: Sequence[Tensor],
    sides: Sequence[Any],
    values: dict[str, Any],
    indices: Mapping[str, int],
    tokens: TokenSet | None = None,
    packed: bool = False,
) -> None:
    """Apply a block to rows, with the slots of its plan as caches; writes its results into `values`."""
    with gradients(op, indices):
        results = run_on(
            evaluator.program.blocks[op.block],
            carries,
            sides,
            [evaluator.param(indexed(name, indices)) for name in op.params],
            op.consts,
            tokens=tokens,
            packed=packed,
            kv=[Kv(plan.mode, indexed(plan.slot, indices)) for plan in op.kv],
            slots=evaluator.slots,
            causal=_causal(evaluator, op) if packed and varlen.available(evaluator.device) else (),
            training=evaluator.training,
            device=evaluator.device,
            run=evaluator.run_rows,
        )
    values.update(zip(op.writes, results, strict=True))


def run_on(
    block: Block,
    carries: Sequence[Tensor],
    sides: Sequence[Any],
    params: Sequence[Tensor],
    consts: Sequence[float] = (),
    *,
    tokens: TokenSet | None = None,
    packed: bool = False,
    kv: Sequence[Kv] = (),
    slots: dict[str, Slot],
    causal: Sequence[bool] = (),
    training: bool = False,
    device: torch.device,
    run: Callable[..., Any] = run_rows,
) -> tuple[Tensor, ...]:
    """Apply a block to the rows of a token set; its key/value plans read and fill `slots`.

    Args:
        carries: rows of the set, packed if `packed`; of all tokens where there is no set.
        sides, params, consts, causal, training, device: see `depthc.ir.rows.run.run_rows`.
        run: `run_rows`, or what a lowering has in its place.
    """
    if tokens is not None and not tokens.width and len(carries) == len(block.body.results):  # no token comes here
        return tuple(carries)
    plans = [settled(plan, plan.slot in slots) for plan in kv]
    given = [slots[plan.slot] if plan.mode in ("read", "update") else None for plan in plans]
    rows = rows_of(tokens)
    keys = next((slot.keys for slot in given if slot is not None), Rows(0))
    results, kept = run(
        block,
        carries,
        sides,
        params,
        consts,
        positions=rows.positions,
        valid=rows.valid,
        slots=tokens.slots if tokens and packed else None,
        bounded=bool(tokens and packed and tokens.bounded),
        key_positions=keys.positions,
        key_valid=keys.valid,
        kv=plans,
        caches=[slot.cache if slot is not None else None for slot in given],
        ordered=True,
        causal=causal,
        length=tokens.mask.shape[1] if tokens else None,
        training=training,
        device=device,
    )
    for plan, written, cache in zip(plans, kv, kept, strict=False):
        if plan.mode == "store" or (plan.mode == "update" and written.mode != "overlay"):
            slots[plan.slot] = Slot(cache, keys if plan.mode == "update" else rows)
    return results  # type: ignore[no-any-return]


def _causal(evaluator: Evaluator, op: Call) -> tuple[bool, ...]:
    """Of every port, whether its mask is shown to be causality and no more."""
    return Causality.of(evaluator.program).of_ports(evaluator.program.blocks[op.block])


def settled(plan: Kv, filled: bool) -> Kv:
    """A plan with `share` or `overlay` as what it is here: `read` or `update` if its slot is filled, else `store`."""
    later: dict[str, Any] = {"share": "read", "overlay": "update"}
    return Kv(later[plan.mode] if filled else "store", plan.slot) if plan.mode in later else plan


def rows_of(tokens: TokenSet | None) -> Rows:
    """The tokens of a set as rows; all tokens in order need no positions."""
    if tokens is None or tokens.everyone:
        return Rows(0)
    return Rows(tokens.width, tokens.positions, tokens.valid)
