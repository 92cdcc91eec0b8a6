"""Rows: run a block on any subset of its tokens, with its keys from wherever a plan says.

One function serves recursion (keys are the rows at hand), shared keys (another pass's), refreshed keys (another
pass's with these rows replaced), and decoding (a cache and the new rows).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.ports import ports_of
from depthc.ir.errors import SubsetError
from depthc.ir.program import Block, Kv
from depthc.ir.rows.execution import Cache, Execution
from depthc.ir.rows.fitting import Attend
from depthc.ir.rows.gather import Rows
from depthc.ir.rows.rings import Rings
from depthc.ir.rows.schedule import Schedule, Source, schedule_of


def run_rows(
    block: Block,
    carries: Sequence[Tensor],
    sides: Sequence[Tensor] = (),
    params: Sequence[Tensor] = (),
    consts: Sequence[float] = (),
    *,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    kv: Sequence[Kv] = (),
    caches: Sequence[Cache | None] = (),
    valid: Tensor | None = None,
    slots: Tensor | None = None,
    key_valid: Tensor | None = None,
    rings: Rings | None = None,
    ordered: bool = False,
    causal: Sequence[bool] = (),
    length: int | None = None,
    attend: Attend | None = None,
    bounded: bool = False,
    training: bool = False,
    device: torch.device | str | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Cache | None, ...]]:
    """Run a block on some of its tokens.

    Args:
        carries: the rows of the selected tokens; the token axis is where the carry has it.
        sides: the block's other values at full length; they are read at the positions of the tokens.
        params, consts: the block's slots in order.
        positions: [batch, rows], or [1, rows] where all batch rows agree; None: the tokens 0, 1, 2, ...
        key_positions: of the keys in `caches`, the same way.
        kv: one plan a port; empty: all fresh. `read` takes the keys of `caches`; `update` those, with the rows at hand
            replaced; `fresh` and `store` those at hand, after those of `caches` if there are any.
        caches: one a port, as an earlier call returned it; None where there is none.
        valid: [batch, rows]; rows that are not valid are never keys and are not written to caches.
        slots: [members] where the carries are packed, [1, members, ...]: the places of the valid rows in [batch, rows],
            flattened. Needs `positions` and `valid`, and a block that is `packable`; the results are packed too.
        key_valid: [batch, keys], the same of the keys in `caches`.
        rings: given, caches are rings: `update` writes over them, for one token at the same place in all batch rows,
            and which tokens they hold follows from that.
        ordered: promises that positions ascend in every batch row; then causal attention among the rows at hand keeps
            its flag, and its fast kernels.
        causal: promises of every port that its mask is causality and no more; then attention on packed rows need not
            read it.
        length: the number of all tokens, where no side input tells and the block computes with it.
        attend: gives attention to the keys of all tokens as one function, where it has one (see `Attend`).
        bounded: `slots` go on behind the valid rows, with the places of others in [batch, rows], which need not be
            computed: then no size depends on how many valid ones there are. Results there may be anything finite.
        training, device: of the run; the device is that of the carry by default.

    Returns:
        The block's results for these rows, and the caches: new ones for `store` and `update` (and for `fresh` after a
        cache), those given for `read`.

    Raises:
        SubsetError: the block mixes tokens other than by attention, or a plan lacks its cache.

    Example:
        >>> (rows,), _ = run_rows(block, [h[:, :3]], sides, params)  # doctest: +SKIP
    """
    schedule, given, stored = prepare(block, kv, caches)
    feeds = block.body.arrange(
        (*carries, *sides), params, consts, training=training, device=device or carries[0].device
    )
    keys = Rows(0, key_positions, key_valid)
    rows = positions, valid, slots, keys
    run = Execution(schedule, feeds, given, *rows, rings, ordered, causal, length, attend, bounded)
    return run.results(), tuple(run.cache(port, own) for port, own in enumerate(stored))


def prepare(
    block: Block, kv: Sequence[Kv], caches: Sequence[Cache | None]
) -> tuple[Schedule, tuple[Cache | None, ...], tuple[bool, ...]]:
    """The schedule of a call of `run_rows`, its caches, and which of its ports store their keys.

    Raises:
        SubsetError: as `run_rows`.
    """
    analyse(block).require_legal()
    count = len(ports_of(block))
    plans, given = _matched(block, count, kv, Kv()), _matched(block, count, caches, None)
    sources = tuple(_source(plan, cache) for plan, cache in zip(plans, given, strict=True))
    stored = tuple(plan.mode == "store" for plan in plans)
    return schedule_of(block, sources, stored), given, stored


def _matched(block: Block, count: int, given: Sequence, default: object) -> tuple:
    """One entry a port."""
    if given and len(given) != count:
        raise SubsetError(
            f"block {block.name!r} has {count} attention ports",
            expected=f"{count} plans and caches, or none",
            found=str(len(given)),
            remedy="give one plan and one cache a port, in the order of ports_of(block)",
        )
    return tuple(given) or (default,) * count


def _source(plan: Kv, cache: Cache | None) -> Source:
    if plan.mode in ("fresh", "store"):
        return "own" if cache is None else "append"
    if cache is None:
        raise SubsetError(
            f"the plan {plan.mode!r} needs a cache",
            expected="the cache that an earlier pass stored",
            found="None",
            remedy="store the keys first, or use the plan 'fresh'",
        )
    return "given" if plan.mode == "read" else "update"
