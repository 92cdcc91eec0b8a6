"""Steps: the evaluation of some new tokens after a past."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthc.ir import sizes
from depthc.ir.axes.caches import Cached, bounds, cached_of
from depthc.ir.axes.ports import ports_of
from depthc.ir.errors import IncrementalError
from depthc.ir.evaluate import Evaluator, WeightParams, as_data, indexed, precision
from depthc.ir.liveness import reads_of
from depthc.ir.plans import Kind, Plan, as_block, is_fixed, kinds_of, token_dim
from depthc.ir.program import Block, Call, Kv, Loop, Merge, On, Op, Program, Segment, Select
from depthc.ir.regions import settled
from depthc.ir.rows.execution import Cache
from depthc.ir.rows.gather import Rows
from depthc.ir.rows.run import run_rows
from depthc.ir.signature import device_of
from depthc.ir.tokens import Held, TokenSet

if TYPE_CHECKING:
    from depthc.ir.incremental import Past


@dataclass(frozen=True, eq=False)
class Kept:
    """What the attention ports of one application keep, and the tokens that it is of.

    A port with a window keeps the last of them alone. Batch rows may keep different numbers of tokens: `keys.valid`
    says which rows are there.
    """

    caches: tuple[Cache | None, ...]
    keys: Rows


class Steps:
    """Evaluates the tokens from `past.length` up to `length`."""

    def __init__(self, program: Program, plan: Plan, past: Past, tensors: Mapping[str, Tensor], length: int) -> None:
        self.program, self.plan, self.past, self.length = program, plan, past, length
        device = device_of(tensors)
        self.evaluator = Evaluator(program, WeightParams(program), device)
        self.values: dict[str, Any] = {**past.fixed, **tensors}
        self.kinds: dict[str, Kind] = {leaf.name: plan.kinds[leaf.name] for leaf in program.signature.inputs}
        self.caches: dict[str, Kept] = {}
        self.stream: Tensor | None = None
        self.sets: dict[int, tuple[TokenSet, TokenSet]] = {}  # token sets, and those of the new tokens among them
        self.device, self.fresh = device, length - past.length
        self.run_rows: Callable[..., Any] = run_rows

    def ops(self, ops: Sequence[Op], site: str, indices: Mapping[str, int]) -> None:
        """Run ops in order; `site` names their place, for the caches."""
        for number, op in enumerate(ops):
            self.op(op, f"{site}.{number}", indices)

    def op(self, op: Op, site: str, indices: Mapping[str, int]) -> None:
        """Run one op."""
        match op:
            case Loop():
                for index in range(sizes.evaluate(op.count, indices)):
                    self.ops(op.body, f"{site}[{index}]", {**indices, op.index: index})
            case _ if is_fixed(found := kinds_of(op, self.kinds)):
                self.fixed(op, found, indices)
            case Select():
                self.select(op, indices)
            case On():
                self.on(op, site, indices)
            case Merge():
                self.merge(op, site, indices)
            case Segment() | Call():
                self.apply(op, site, indices)

    def fixed(self, op: Op, found: Mapping[str, Kind], indices: Mapping[str, int]) -> None:
        """Evaluate what no later token changes; once, with the prompt."""
        if not self.past.length:
            self.evaluator.ops((op,), self.values, indices)
        self.kinds.update(found)

    def apply(self, op: Segment | Call, site: str, indices: Mapping[str, int]) -> None:
        """Run a segment or a block, on the new tokens if it is among the layers or behind them."""
        found = kinds_of(op, self.kinds)
        if "rows" in found.values():
            self.rows(op, site, indices)
        else:
            self.whole(op, site, indices)
        self.kinds.update(found)

    def whole(self, op: Segment | Call, site: str, indices: Mapping[str, int]) -> None:
        """Run what stands in front of the layers, on all tokens."""
        self.evaluator.apply(op, self.values, indices)

    def rows(self, op: Segment | Call, site: str, indices: Mapping[str, int], tokens: TokenSet | None = None) -> None:
        """Run a block, or a segment behind the layers, on the new tokens, or on a set of them."""
        block = as_block(self.program, op, self.kinds)
        if isinstance(op, Call):
            carried, sides = op.reads[: block.carries], op.reads[block.carries :]
        else:
            carried = tuple(r for r in op.reads if self.kinds[r] == "rows")
            sides = tuple(r for r in op.reads if r not in carried)
        rows = [self.values[r] if tokens is not None else self._rows_of(r, block) for r in carried]
        here = self._positions(tokens)
        if not here.count:
            self.values.update(zip(op.writes, rows, strict=False))
            self._keep(op, site, indices)
            return
        with precision(op, self.device):
            results = self._run(op, block, rows, [as_data(self.values[r]) for r in sides], here, site, indices)
        if tokens is None and isinstance(op, Call) and not op.kv:
            self._forget(op, block, site)
        self.values.update(zip(op.writes, results, strict=True))

    def _run(
        self,
        op: Segment | Call,
        block: Block,
        rows: list[Tensor],
        sides: list[Any],
        here: Rows,
        site: str,
        indices: Mapping[str, int],
    ) -> tuple[Tensor, ...]:
        plans, kept = self._plans(op, block, site, indices)
        params = [self.evaluator.param(indexed(p, indices)) for p in op.params]
        consts = op.consts if isinstance(op, Call) else ()
        results, caches = self.run_block(block, rows, sides, params, consts, here, plans, kept)
        stores = any(p.mode == "store" and not port.cross for p, port in zip(plans, ports_of(block), strict=True))
        keys = kept.keys.followed_by(here, rows[0].shape[0], self.device) if stores else kept.keys
        if ports_of(block):
            self._store(op, block, plans, Kept(caches, keys), site, indices)
        return results

    def run_block(
        self,
        block: Block,
        rows: Sequence[Tensor],
        sides: Sequence[Any],
        params: Sequence[Tensor],
        consts: Sequence[float],
        here: Rows,
        plans: Sequence[Kv] = (),
        kept: Kept | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Cache | None, ...]]:
        """Run a block on the rows `here` after what is kept: its results, and its caches (see `run_rows`)."""
        kept = kept or Kept((), self._nothing())
        return self.run_rows(  # type: ignore[no-any-return]
            block,
            rows,
            sides,
            params,
            consts,
            positions=here.positions,
            valid=here.valid,
            **self._kept_rows(block, kept),
            kv=plans,
            caches=kept.caches,
            ordered=True,
            causal=(),
            length=self.length,
            training=False,
            device=self.device,
        )

    def _kept_rows(self, block: Block, kept: Kept) -> dict[str, Any]:
        """What `run_rows` is told of the rows of caches."""
        return {"key_positions": kept.keys.positions, "key_valid": kept.keys.valid}

    # Caches: by the slot of a key/value plan, or by the place of the application.

    def _store(
        self, op: Segment | Call, block: Block, plans: Sequence[Kv], kept: Kept, site: str, indices: Mapping[str, int]
    ) -> None:
        """Keep what a run left in the caches of a block's ports."""
        self._put(op, indices, site, _compact(block, kept))

    def _slot(self, op: Segment | Call, site: str, indices: Mapping[str, int]) -> str:
        plans = op.kv if isinstance(op, Call) else ()
        return f"{op.block}/{indexed(plans[0].slot, indices)}" if plans and plans[0].slot else site

    def _plans(self, op: Segment | Call, block: Block, site: str, indices: Mapping[str, int]) -> tuple[list[Kv], Kept]:
        """What each port does with its keys, and what it keeps so far."""
        ports, name = ports_of(block), self._slot(op, site, indices)
        kept = self.caches.get(name) or self.past.caches.get(name) or Kept((None,) * len(ports), self._nothing())
        if self._overlays(op, name) and site in self.past.caches:
            kept = overlaid(block, kept, self.past.caches[site], self.length, self.device)
        plans = [settled(p, name in self.caches) for p in (op.kv if isinstance(op, Call) else ())]
        plans = plans or [Kv("store", "") for _ in ports]
        for number, (port, cache) in enumerate(zip(ports, kept.caches, strict=True)):
            if port.cross and cache is not None:
                plans[number] = Kv("read", "")
        return plans, kept

    def _overlays(self, op: Segment | Call, name: str) -> bool:
        """Whether an application lays rows of its own over a slot that another one filled."""
        return isinstance(op, Call) and any(p.mode == "overlay" for p in op.kv) and name in self.caches

    def _forget(self, op: Call, block: Block, site: str) -> None:
        """Drop keys that no later token reads: of a port with a window, all but the last."""
        kept, reaches = self.caches.get(site), self.plan.reaches.get(op, ())
        if kept is None or kept.keys.valid is not None or not any(reach is not None for reach in reaches):
            return
        caches = tuple(
            tuple(map(_last, cache, own, repeat(reach))) if cache is not None and reach is not None else cache
            for cache, own, reach in zip(kept.caches, cached_of(block), bounds(block, reaches), strict=True)
        )
        self.caches[site] = replace(kept, caches=caches)

    def _put(self, op: Segment | Call, indices: Mapping[str, int], site: str, kept: Kept) -> None:
        name = self._slot(op, site, indices)
        self.caches[site if self._overlays(op, name) else name] = kept

    def _keep(self, op: Segment | Call, site: str, indices: Mapping[str, int]) -> None:
        """No new token comes here: what was kept stays."""
        name = self._slot(op, site, indices)
        name = site if self._overlays(op, name) else name
        if name in self.past.caches:
            self.caches.setdefault(name, self.past.caches[name])

    def _nothing(self) -> Rows:
        return Rows(0, torch.empty((1, 0), dtype=torch.int64, device=self.device))

    def _positions(self, tokens: TokenSet | None) -> Rows:
        """The rows at hand, by their place in the whole sequence."""
        if tokens is None or tokens.everyone:
            return Rows(self.fresh, torch.arange(self.past.length, self.length, device=self.device)[None])
        return Rows(tokens.width, tokens.positions + self.past.length, tokens.valid)

    # Token sets.

    def select(self, op: Select, indices: Mapping[str, int]) -> None:
        """A token set: of all tokens before the layers, of the new ones among them."""
        found = kinds_of(op, self.kinds)
        new = {name: self._new(name) for name in op.reads} if found[op.write] == "rows" else {}
        self.values[op.write] = self.evaluator.select(op, self.values | new, indices)
        self.kinds.update(found)

    def on(self, op: On, site: str, indices: Mapping[str, int]) -> None:
        """Run a region on those of the new tokens that are in the set."""
        tokens: TokenSet = self._new(op.tokens)
        calls = [inner for inner in op.body if isinstance(inner, Call)]
        carried = {n for call in calls for n in call.reads[: self.program.blocks[call.block].carries]}
        outer, kinds = self.values, self.kinds
        self.values = {n: tokens.take(self._stream(n, calls)) if n in carried else outer[n] for n in op.reads}
        self.kinds = {n: "rows" if n in carried else kinds[n] for n in op.reads}
        for number, inner in enumerate(op.body):
            self.rows(inner, f"{site}.{number}", indices, tokens)  # type: ignore[arg-type]
            self.kinds.update(dict.fromkeys(inner.writes, "rows"))  # type: ignore[union-attr]
        inside, self.values, self.kinds = self.values, outer, kinds
        self.values.update({n: inside[n] for n in op.writes})
        self.kinds.update(dict.fromkeys(op.writes, "rows"))

    def merge(self, op: Merge, site: str, indices: Mapping[str, int]) -> None:
        """Write rows of new tokens back into the rows of all new tokens."""
        values = self.values | {n: self._new(n) for n in sorted(reads_of(op) - {op.value})}
        if op.over is None:
            self.evaluator.merge(op, values, indices)
        else:
            values[op.write] = self._spread(op, values, site, indices)
        self.values[op.write] = values[op.write]
        self.kinds[op.write] = "rows"

    def _spread(self, op: Merge, values: Mapping[str, Any], site: str, indices: Mapping[str, int]) -> Tensor:
        """Rows of new tokens, or of the last one before them, for all new tokens up to the next one."""
        kept, held = self.past.caches.get(site), None
        if kept is not None and kept.keys.valid is not None:
            held = Held(kept.caches[0] or (), kept.keys.valid)
        combine = partial(self.evaluator.combined, op, indices) if op.combine is not None else None
        extra, over = [values[name] for name in op.extra], values[op.over or ""]
        made, held = values[op.tokens].spread(values[op.read], values[op.value], over, combine, extra, held)
        self.caches[site] = Kept((held.values,), Rows(1, valid=held.valid))
        return made

    def _new(self, name: str) -> Any:
        """A value, or a token set, of the new tokens."""
        value = self.values[name]
        if self.kinds[name] == "rows" or not self.past.length:
            return value
        start = self.past.length
        if not isinstance(value, TokenSet):
            return value.narrow(1, start, self.fresh)
        if id(value) not in self.sets:  # layers share what is found out about a set
            self.sets[id(value)] = value, value.among(start)
        return self.sets[id(value)][1]

    def _stream(self, name: str, calls: Sequence[Call]) -> Tensor:
        """What a region gathers its rows from."""
        return self._rows_of(name, self.program.blocks[calls[0].block])

    def _rows_of(self, name: str, block: Block) -> Tensor:
        """The rows of the new tokens; where the layers begin they are cut from the full value."""
        value: Tensor = as_data(self.values[name])
        if self.kinds[name] == "rows":
            return value
        dim = token_dim(block)
        if self.past.stream is not None:
            _require_unchanged(self.past.stream, value.narrow(dim, 0, self.past.length))
        self.stream = value
        return value.narrow(dim, self.past.length, self.fresh)


def _last(cache: Tensor, cached: Cached, count: int) -> Tensor:
    """The last rows of what is cached, `count` at most."""
    size = cache.shape[cached.dim]
    return cache if size <= count else cache.narrow(cached.dim, size - count, count).clone()  # frees the others


def _compact(block: Block, kept: Kept) -> Kept:
    """What is kept without rows that no batch row needs."""
    valid, positions = kept.keys.valid, kept.keys.positions
    layouts = [c for port, own in zip(ports_of(block), cached_of(block), strict=True) if not port.cross for c in own]
    if valid is None or positions is None or any(c.batch is None or c.dim == c.batch for c in layouts):
        return kept
    members = TokenSet(valid)
    if members.width == kept.keys.count:
        return kept
    caches = tuple(
        cache
        if port.cross or cache is None
        else tuple(members.take(t, c.batch, c.dim) for t, c in zip(cache, own, strict=True))  # type: ignore[arg-type]
        for port, own, cache in zip(ports_of(block), cached_of(block), kept.caches, strict=True)
    )
    rows = positions.expand(valid.shape[0], -1).gather(1, members.positions)
    return Kept(caches, Rows(members.width, rows, members.valid))


def overlaid(block: Block, base: Kept, own: Kept, length: int, device: torch.device) -> Kept:
    """What is kept, with the rows of tokens that another application keeps too replaced by those."""
    batch = max(k.index(device).shape[0] for k in (base.keys, own.keys))
    theirs, mine = (k.index(device).expand(batch, -1) for k in (base.keys, own.keys))
    if own.keys.valid is not None:
        mine = mine.masked_fill(~own.keys.valid, length)  # beyond all tokens
    rows = torch.arange(own.keys.count, device=device).expand(batch, -1)
    at = torch.full((batch, length + 1), -1, device=device).scatter(1, mine, rows).gather(1, theirs)
    found, at = at >= 0, at.clamp(min=0)
    caches: list[Cache | None] = []
    for port, layouts, old, new in zip(ports_of(block), cached_of(block), base.caches, own.caches, strict=True):
        laid = port.cross or old is None or new is None
        pairs = () if laid else zip(layouts, old, new, strict=True)  # type: ignore[arg-type]
        caches.append(old if laid else tuple(_laid(c, a, b, found, at) for c, a, b in pairs))
    return Kept(tuple(caches), base.keys)


def _laid(cached: Cached, base: Tensor, own: Tensor, found: Tensor, at: Tensor) -> Tensor:
    """`base` with its rows where `found` from the rows `at` of `own`: both [batch, rows]."""
    if cached.batch is None or cached.dim == cached.batch:
        raise IncrementalError(
            "keys whose rows of the batch are merged with others cannot be laid over each other",
            expected="keys with a dimension for the batch",
            found=f"a cache of shape {list(base.shape)}",
            remedy='use kv="share_first" or kv="recursion"',
        )
    places = (cached.batch, cached.dim)
    below, above = (t.movedim(places, (0, 1)) for t in (base, own))
    batch = torch.arange(below.shape[0], device=base.device)[:, None]
    taken = above[batch, at.expand(below.shape[0], -1)]
    mask = found.expand(below.shape[0], -1).reshape(*below.shape[:2], *(1,) * (below.dim() - 2))
    return torch.where(mask, taken, below).movedim((0, 1), places)


def _require_unchanged(old: Tensor, new: Tensor) -> None:
    if not torch.allclose(old, new, rtol=1e-3, atol=1e-5):
        raise IncrementalError(
            "later tokens changed what earlier ones feed into the layers",
            expected="a part before the layers in which no token depends on a later one",
            found=f"a change of {(old - new).abs().max().item():.3g}",
            remedy="evaluate the whole sequence with run()",
        )
