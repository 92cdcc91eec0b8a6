"""Extents: the size of every axis when a block runs on some of its tokens, and the numbers that it computes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from depthc.ir.axes.labels import Atom, Dim, Label
from depthc.ir.axes.ops import map_operands
from depthc.ir.rows.gather import Extent, Rows
from depthc.ir.rows.packing import Packing
from depthc.ir.rows.schedule import HERE, Frame, Schedule

aten = torch.ops.aten


class Extents:
    """Sizes in a frame, and in values of full length.

    Attributes:
        frames: the tokens that each frame holds.
        batch: rows of the batch.
        packed: the rows outside of attention, where they are packed into a batch of one.
    """

    def __init__(
        self, schedule: Schedule, feeds: dict[fx.Node, Any], length: int | None, packing: Packing | None = None
    ) -> None:
        self.schedule, self.feeds, self._length = schedule, feeds, length
        self.frames: dict[Frame, Rows] = {}
        self._numbers: dict[fx.Node, Any] = {}
        axes = schedule.axes
        carry = axes.block.body.placeholders_of("value")[0]
        shape = dict(zip(axes.labels[carry], feeds[carry].shape, strict=True))
        self.batch: int = shape.get((axes.batch,), 1) if packing is None else packing.batch
        self.packed = None if packing is None else packing.rows
        self.rows: int = shape[(axes.token,)]
        self._foreign: dict[Atom, int] = {}
        for node, d, atom, others in schedule.foreign:
            self._foreign[atom] = feeds[node].shape[d] // self.full(others)

    def here(self, frame: Frame, port: Frame) -> Extent:
        """Sizes in a frame, with the keys of a port."""
        return lambda dim: prod(self._atom(atom, frame, port) for atom in dim)

    def sizes(self, label: Label, frame: Frame, port: Frame, given: Sequence[int]) -> list[int]:
        """A shape for an op that was `given` one for all tokens; -1 where only the data decide."""
        size = self.here(frame, port)
        shape: list[int] = []
        for dim, whole in zip(label, given, strict=True):
            if any(a.kind == "sorted" and not a.base for a in dim):
                shape.append(-1)
            else:
                shape.append(whole if dim and all(a.kind == "free" for a in dim) and whole >= 0 else size(dim))
        return shape

    def _atom(self, atom: Atom, frame: Frame, port: Frame) -> int:
        if self.packed is not None and frame == port == HERE and atom.kind in ("batch", "token"):
            return 1 if atom.kind == "batch" else self.packed.count
        size = self.here(frame, port)
        more = sum(map(size, (*atom.before, *atom.after)))
        match atom.kind:
            case "batch":
                return self.batch
            case "token":
                return self.frames[frame].count + more
            case "key":
                return self.frames.get(port, self.frames[HERE]).count + more
            case "sorted":
                return size(atom.base)
        return self._foreign.get(atom, atom.size)

    def full(self, dim: Dim) -> int:
        """The size of a dimension in a value of full length."""
        return prod(self._full_atom(atom) for atom in dim)

    def _full_atom(self, atom: Atom) -> int:
        match atom.kind:
            case "batch":
                return self.batch
            case "token" | "key":
                return self.length + sum(map(self.full, (*atom.before, *atom.after)))
            case "sorted":
                return self.full(atom.base)
        return self._foreign.get(atom, atom.size)

    @property
    def length(self) -> int:
        """The number of all tokens: that of a side input, or up to the last position."""
        if self._length is None:
            self._length = self._side_length() or max(map(_end, self.frames.values()))
        return self._length

    def _side_length(self) -> int | None:
        axes = self.schedule.axes
        for node in axes.block.body.placeholders_of("value")[axes.block.carries :]:
            for d, dim in enumerate(axes.labels[node]):
                if dim in ((axes.token,), (axes.key,)):
                    return self.feeds[node].shape[d]
        return None

    def number(self, node: fx.Node) -> Any:
        """A size, a flag or a constant, as the block computes it for all tokens."""
        if node in self.feeds:
            return self.feeds[node]
        if node not in self._numbers:
            if node.target is aten.sym_size.int:
                self._numbers[node] = self._size(*node.args)  # type: ignore[arg-type]
            else:
                args, kwargs = map_operands(node, lambda _, n: self.number(n))
                self._numbers[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._numbers[node]

    def _size(self, source: fx.Node, d: int) -> int:
        axes = self.schedule.axes
        if source in axes.moving and {axes.batch, axes.token} & {*axes.labels[source][d]}:
            return self.full(axes.labels[source][d])
        return self.feeds[source].shape[d]


def _end(rows: Rows) -> int:
    positions: Tensor | None = rows.positions
    return rows.count if positions is None else int(positions.max()) + 1
