"""Moving rows between full-length values and subsets of tokens, for values whose token axis is anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from depthc.ir.axes.labels import Atom, Dim, Label

Extent = Callable[[Dim], int]


@dataclass(frozen=True)
class Rows:
    """A set of tokens for every row of the batch.

    `positions` is [batch, count] (or [1, count] where they are equal), None for the first `count` tokens in order.
    `valid` is [batch, count], None if all are. Where the rows of all batch rows are packed into one,
    `owners` [1, count] says which batch row each is of.
    """

    count: int
    positions: Tensor | None = None
    valid: Tensor | None = None
    owners: Tensor | None = None

    def index(self, device: torch.device) -> Tensor:
        """Positions as a tensor."""
        return torch.arange(self.count, device=device)[None] if self.positions is None else self.positions

    def last(self, count: int) -> Rows:
        """The last `count` of these tokens, as far as they are listed."""
        positions, valid = (x if x is None else x[:, x.shape[1] - count :] for x in (self.positions, self.valid))
        return Rows(count, positions, valid)

    def followed_by(self, other: Rows, batch: int, device: torch.device) -> Rows:
        """These tokens and then others; without positions, all of them are the first ones in order."""
        positions = valid = None
        if self.positions is not None:
            both = self.positions, other.index(device)
            rows = max(p.shape[0] for p in both)
            positions = torch.cat([p.expand(rows, -1) for p in both], 1)
        if self.valid is not None or other.valid is not None:
            valid = torch.cat([r._validity(batch, device) for r in (self, other)], 1)
        return Rows(self.count + other.count, positions, valid)

    def _validity(self, batch: int, device: torch.device) -> Tensor:
        return torch.ones((batch, self.count), dtype=torch.bool, device=device) if self.valid is None else self.valid


def arrange(x: Tensor, atoms: Sequence[Atom], target: Label, extent: Extent) -> Tensor:
    """A tensor with one dimension an atom, brought to the dimensions of `target`.

    Target atoms that `x` lacks are expanded if their dimension holds one that it has; else the dimension is 1.
    """
    wanted = [dim if any(a in atoms for a in dim) else () for dim in target]
    order = [a for dim in wanted for a in dim]
    x = x.permute([atoms.index(a) for a in order if a in atoms])
    for d, atom in enumerate(order):
        if atom not in atoms:
            x = x.unsqueeze(d)
            x = x.expand(*x.shape[:d], extent((atom,)), *x.shape[d + 1 :])
    sizes, at = [], 0
    for dim in wanted:
        sizes.append(prod(x.shape[at : at + len(dim)]))
        at += len(dim)
    return x.reshape(sizes)


def unmerge(x: Tensor, label: Label, extent: Extent) -> tuple[Tensor, list[Atom]]:
    """A tensor with one dimension an atom."""
    atoms = [a for dim in label for a in dim]
    if len(atoms) == x.dim() and all(len(dim) == 1 for dim in label):
        return x, atoms
    return x.reshape([extent((a,)) for a in atoms]), atoms


@dataclass(frozen=True)
class Reader:
    """Reads side inputs at the tokens of a query set and a key set."""

    batch: Atom
    queries: Rows
    keys: Rows
    full: Extent  # sizes in the side input
    here: Extent  # sizes among the tokens read

    def read(self, x: Tensor, label: Label, space: Label) -> Tensor:
        """The rows of `x` at the positions, with a batch dimension where `space` has it."""
        flat, atoms = unmerge(x, label, self.full)
        picked: list[tuple[int, Tensor]] = []
        for d, atom in enumerate(atoms):
            if atom.kind in ("token", "key"):
                rows = self.queries if atom.kind == "token" else self.keys
                if rows.positions is None:
                    flat = _first(flat, d, atom, rows.count, self.full)
                else:
                    picked.append((d, _places(atom, rows, self.full)))
        batch = atoms.index(self.batch) if self.batch in atoms else None
        if picked:
            flat, atoms = self._pick(flat, atoms, batch, picked)
        return arrange(flat, atoms, self._target(label, atoms, space), self.here)

    def _pick(
        self, x: Tensor, atoms: list[Atom], batch: int | None, picked: list[tuple[int, Tensor]]
    ) -> tuple[Tensor, list[Atom]]:
        first = [d for d, _ in picked]
        front = ([] if batch is None else [batch]) + first
        rest = [d for d in range(x.dim()) if d not in front]
        x = x.permute(front + rest)
        shapes = [
            [-1] + [places.shape[1] if j == i else 1 for j in range(len(picked))]
            for i, (_, places) in enumerate(picked)
        ]
        index = [
            places.reshape([places.shape[0], *shape[1:]]) for (_, places), shape in zip(picked, shapes, strict=True)
        ]
        if batch is not None:
            owners = self.queries.owners
            if owners is None:
                owners = torch.arange(x.shape[0], device=x.device)[:, None]
            index.insert(0, owners.reshape([*owners.shape, *[1] * (len(picked) - 1)]))
        x = x[tuple(index)]
        kept = [atoms[d] for d in first] + [atoms[d] for d in rest]
        if batch is None and x.shape[0] == 1:
            return x[0], kept
        return x, [self.batch, *kept]

    def _target(self, label: Label, atoms: list[Atom], space: Label) -> Label:
        """The dimensions to read into: those of the label, and the batch where the op has room for it."""
        if self.batch not in atoms or any(self.batch in dim for dim in label):
            return label
        rank = max(len(label), len(space))
        own = ((),) * (rank - len(label)) + label
        around = ((),) * (rank - len(space)) + space
        target = list(own)
        at = next((d for d, dim in enumerate(around) if self.batch in dim and not own[d]), None)
        if at is None:  # a batch of one
            return label
        target[at] = around[at]
        return tuple(target)


def _first(x: Tensor, d: int, atom: Atom, count: int, full: Extent) -> Tensor:
    """The first `count` rows of an axis, and what is concatenated to it."""
    before, after = (sum(map(full, part)) for part in (atom.before, atom.after))
    if x.shape[d] == before + count + after:
        return x
    head = x.narrow(d, 0, before + count)
    return torch.cat([head, x.narrow(d, x.shape[d] - after, after)], d) if after else head


def _places(atom: Atom, rows: Rows, full: Extent) -> Tensor:
    """Where rows lie on an axis, and what is concatenated to it."""
    assert rows.positions is not None
    if not atom.extended:
        return rows.positions
    before, after = (sum(map(full, part)) for part in (atom.before, atom.after))
    ends = full((atom,)) - after
    batch, device = rows.positions.shape[0], rows.positions.device
    head = torch.arange(before, device=device).expand(batch, before)
    tail = torch.arange(ends, ends + after, device=device).expand(batch, after)
    return torch.cat([head, rows.positions + before, tail], 1)


def place_mask(allowed: Tensor, atoms: Sequence[Atom], space: Label, extent: Extent) -> Tensor:
    """A mask of [batch, token, key] brought to the dimensions of scores; extra columns are always allowed."""
    here = {a.kind: a for dim in space for a in dim if a.extended or a in atoms}
    named = [here.get(a.kind, a) if a.kind == "key" else a for a in atoms]
    key = named[-1]
    if key.extended:
        widths = [sum(map(extent, part)) for part in (key.before, key.after)]
        allowed = F.pad(allowed, widths, value=True)
    kept = [d for d, a in enumerate(named) if any(a in dim for dim in space)]
    for d in reversed(range(len(named))):
        if d not in kept:
            allowed = allowed.select(d, 0)
    return arrange(allowed, [named[d] for d in kept], space, extent)


def _canonical(x: Tensor, label: Label, batch: Atom, row: Atom, extent: Extent) -> tuple[Tensor, list[Atom]]:
    """[batch, rows, ...] and the atoms of the dimensions."""
    flat, atoms = unmerge(x, label, extent)
    order = [a for a in (batch, row) if a in atoms] + [a for a in atoms if a not in (batch, row)]
    return flat.permute([atoms.index(a) for a in order]), order


def append_rows(old: Tensor, new: Tensor, dim: int) -> Tensor:
    """A cache with further rows."""
    return torch.cat([old, new], dim)


def overwrite_rows(
    old: Tensor,
    new: Tensor,
    label: Label,
    batch: Atom,
    row: Atom,
    slots: Tensor,
    valid: Tensor | None,
    sizes: tuple[Extent, Extent],
) -> Tensor:
    """A cache in which the rows at `slots` [batch, count] are replaced; rows that are not valid are not written."""
    base, order = _canonical(old, label, batch, row, sizes[0])
    rows, _ = _canonical(new, label, batch, row, sizes[1])
    if batch not in order:
        base, rows = base[None], rows[None]
    if valid is not None:  # they go to a row that is cut off again
        base = torch.cat([base, base[:, :1]], 1)
        slots = torch.where(valid, slots, base.shape[1] - 1)
    index = slots.expand(rows.shape[0], -1).reshape([rows.shape[0], -1] + [1] * (rows.dim() - 2)).expand_as(rows)
    written = base.scatter(1, index, rows)
    if valid is not None:
        written = written[:, :-1]
    if batch not in order:
        written = written[0]
    return arrange(written, order, label, sizes[0])
