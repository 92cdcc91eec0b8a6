"""Execution of a schedule: every op in its frame, with operands and sizes of the rows that the frame holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from depthc.ir.axes.caches import Cached
from depthc.ir.axes.labels import Label, kinds_in
from depthc.ir.axes.ops import FILLS, Slot, map_operands, op_name
from depthc.ir.rows import counted, varlen
from depthc.ir.rows.extents import Extents
from depthc.ir.rows.fitting import Attend, Fitting
from depthc.ir.rows.gather import Reader, Rows, append_rows, overwrite_rows
from depthc.ir.rows.packing import PADDED, Packing
from depthc.ir.rows.rings import Rings, ring, write_rows
from depthc.ir.rows.schedule import HERE, Frame, Schedule, Source

Cache = tuple[Tensor, ...]
"""What one port caches: a tensor a `Cached` of `depthc.ir.axes.caches.cached_of`, in its order and layout."""


class Execution:
    """One run of a schedule.

    Args:
        feeds: the inputs of the body in order.
        caches: one a port.
        positions, valid: of the rows at hand.
        slots: where packed rows are among the padded ones that `positions` and `valid` speak of; None: they are padded.
        keys: of the rows in the caches; a cache of fewer rows holds the last of them.
        rings: given, caches are rings, written over.
        ordered: whether positions ascend.
        causal: of every port, whether its mask is known to be causality and no more; empty: of none.
        length: the number of all tokens, if it is known.
        attend: attention to the keys of all tokens as one function.
        bounded: whether packed rows go on behind the last valid one.
    """

    def __init__(
        self,
        schedule: Schedule,
        feeds: Sequence[Any],
        caches: tuple[Cache | None, ...],
        positions: Tensor | None,
        valid: Tensor | None,
        slots: Tensor | None,
        keys: Rows,
        rings: Rings | None,
        ordered: bool,
        causal: Sequence[bool],
        length: int | None,
        attend: Attend | None = None,
        bounded: bool = False,
    ) -> None:
        body = schedule.axes.block.body
        self.schedule, self.axes, self.caches, self.causal = schedule, schedule.axes, caches, causal
        self.rings = rings
        self.feeds = dict(zip(body.placeholders, feeds, strict=True))
        self.full: dict[fx.Node, Any] = dict(self.feeds)
        self.values: dict[tuple[fx.Node, Frame], Any] = {}
        self.reads: dict[Any, Tensor] = {}
        self.packing = Packing.of(schedule.axes, positions, valid, slots, bounded)
        self.sizes = Extents(schedule, self.feeds, length, self.packing)
        self.device = next((v for n, v in self.feeds.items() if n.meta["input"].name == "device"), None)
        self.frames = self.sizes.frames
        self.frames[HERE] = self.packing.padded if self.packing else Rows(self.sizes.rows, positions, valid)
        self.padded = PADDED if self.packing else HERE
        for port, source in enumerate(schedule.sources):
            if not schedule.ports[port].cross:
                self.frames[port] = self._keys(port, source, keys)
        self.fitting = Fitting(schedule, self.sizes, ordered, attend, rings)
        for node in body.placeholders_of("value")[: self.axes.block.carries]:
            self.values[node, HERE] = self.feeds[node]

    def _keys(self, port: int, source: Source, keys: Rows) -> Rows:
        """The keys of a self-attention port."""
        here, cache = self.frames[HERE], self.caches[port]
        if source == "own" or cache is None:
            return here
        count = cache[0].shape[self.schedule.cached[port][0].dim]
        if self.rings is not None:
            assert here.positions is not None
            return ring(count, here.positions)
        kept = keys.last(count)
        return kept.followed_by(here, self.sizes.batch, cache[0].device) if source == "append" else kept

    def results(self) -> tuple[Tensor, ...]:
        """Run every step; the body's results for the rows at hand."""
        self._take_caches()
        for node in self.schedule.sides:
            args, kwargs = map_operands(node, lambda _, n: self._whole(n))
            self.full[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        for node, frame in self.schedule.steps:
            if frame == HERE and node in self.schedule.skipped:
                continue
            for made in self._step(node, frame):
                self._renew(made, frame)
        results = self.axes.block.body.results
        return tuple(self._value(n, HERE) if n in self.axes.moving else self.full[n] for n in results)

    def cache(self, port: int, stored: bool) -> Cache | None:
        """What a port caches after the run."""
        source, members = self.schedule.sources[port], self.schedule.cached[port]
        if source == "own" and not stored:
            return None
        if self.schedule.ports[port].cross:
            return tuple(self.full[c.node] for c in members)
        return tuple(self._value(c.node, self.padded if source == "own" else port) for c in members)

    def _take_caches(self) -> None:
        for port, cache in enumerate(self.caches):
            for cached, tensor in zip(self.schedule.cached[port], cache or (), strict=False):
                if self.schedule.ports[port].cross:
                    self.full[cached.node] = tensor
                elif self.schedule.sources[port] == "given":
                    self.values[cached.node, port] = tensor

    def _renew(self, node: fx.Node, frame: Frame) -> None:
        """Where a value that ports cache is known for the rows at hand, it is known for all their keys."""
        for port, source in enumerate(self.schedule.sources if frame == HERE else ()):
            for at, cached in enumerate(self.schedule.cached[port]):
                if cached.node is node and source in ("append", "update"):
                    old = self.caches[port][at]  # type: ignore[index]
                    new = self._value(node, self.padded)
                    self.values[node, port] = self._joined(cached, old, new, port, source)

    def _joined(self, cached: Cached, old: Tensor, new: Tensor, port: int, source: Source) -> Tensor:
        if source == "append":
            return append_rows(old, new, cached.dim)
        here, keys = self.frames[HERE], self.frames[port]
        if self.rings is not None:
            return write_rows([old], [new], [cached.dim], here.index(new.device))[0]
        slots = here.index(new.device)
        if keys.positions is not None:
            slots = (keys.positions[:, None, :] == slots[:, :, None]).int().argmax(-1)
        sizes = self.sizes.here(port, port), self.sizes.here(HERE, self.padded)
        return overwrite_rows(old, new, cached.label, self.axes.batch, self.axes.token, slots, here.valid, sizes)

    def _step(self, node: fx.Node, frame: Frame) -> Iterable[fx.Node]:
        """Run an op; returns the nodes whose values are known now."""
        part = self.schedule.slices.get(node) if frame == HERE else None
        if self.packing and frame == HERE and self._attends_packed(node):
            return (node,)

        def operand(slot: Slot, source: fx.Node) -> Any:
            value = self._operand(node, slot, source, frame)
            return part.operand(slot, value) if part is not None and isinstance(value, Tensor) else value

        args, kwargs = map_operands(node, operand)
        result = self._counted(node, frame, args)
        if result is None:
            result = self.fitting.target(node, frame, args, kwargs)(*args, **kwargs)
        if part is None:
            self.values[node, self._layout(node, frame)] = result
            return (node,)
        found = part.results(self.axes, result, self.sizes.here(HERE, HERE))
        self.values.update({(n, HERE): value for n, value in found.items()})
        return found

    # Packed rows: attention reads and makes padded ones, all other ops packed ones.

    def _layout(self, node: fx.Node, frame: Frame) -> Frame:
        if frame != HERE or self.packing is None:
            return frame
        made = node.args[0] if op_name(node) == "python::getitem" else node  # of ops with several results
        return PADDED if made in self.schedule.port_of else HERE

    def _value(self, node: fx.Node, frame: Frame) -> Any:
        """A value in a frame; packed rows are padded and padded ones packed where they are read so."""
        if (node, frame) not in self.values and self.packing is not None:
            packed, padded = self.sizes.here(HERE, HERE), self.sizes.here(HERE, PADDED)
            move, source = (self.packing.pack, PADDED) if frame == HERE else (self.packing.pad, HERE)
            self.values[node, frame] = move(self.values[node, source], self.axes.labels[node], packed, padded)
        return self.values[node, frame]

    def _counted(self, node: fx.Node, frame: Frame, args: list[Any]) -> Tensor | None:
        """A product of packed rows without those behind the last valid one, if the library's product takes it."""
        if self.packing is None or not self.packing.bounded or frame != HERE or not counted.fits(self.axes, node):
            return None
        name = op_name(node)
        return counted.product(args, name, self.packing.members) if counted.runs(args, name) else None

    def _attends_packed(self, node: fx.Node) -> bool:
        """Run an attention op on packed rows, if the library's kernel for them takes it."""
        assert self.packing is not None
        if not (self.fitting.ordered and varlen.fits(self.schedule, node, self.causal)):
            return False
        rows = [self._value(source, HERE) for source in node.args[:3]]  # type: ignore[arg-type]
        if not varlen.runs(*rows):
            return False
        self.values[node, HERE] = varlen.attend(node, rows, self.packing)
        return True

    # Operands.

    def _operand(self, node: fx.Node, slot: Slot, source: fx.Node, frame: Frame) -> Any:
        if not isinstance(self.axes.labels.get(source), tuple | list):
            return self.sizes.number(source)
        if source in self.axes.moving:
            return self._value(source, self._layout(node, self.schedule.frame_of(node, slot, frame)))
        label, port = self.axes.read(node, slot, source), self.schedule.port_of.get(node, HERE)
        if (node, slot) in self.axes.iotas:
            count = self.sizes.here(frame, port)(label[0])
            return torch.arange(count, device=self.device or self.full[source].device)
        if not kinds_in(label) & {"token", "key"}:
            return self.full[source]
        edge = self.axes.edges.get((node, slot))
        return self._read(source, label, edge.space if edge else (), frame, port)

    def _read(self, source: fx.Node, label: Label, space: Label, frame: Frame, port: Frame) -> Tensor:
        """A side input at the tokens of a frame and the keys of a port."""
        key = (source, label, space, frame, port)
        if key not in self.reads:
            self.reads[key] = self._fresh_read(source, label, space, frame, port)
        return self.reads[key]

    def _fresh_read(self, source: fx.Node, label: Label, space: Label, frame: Frame, port: Frame) -> Tensor:
        size = self.sizes.here(frame, port)
        if op_name(source) in FILLS:
            args, kwargs = map_operands(source, lambda _, n: self._whole(n))
            sizes = self.sizes.sizes(label, frame, port, args[0])
            return source.target(sizes, *args[1:], **kwargs)  # type: ignore[operator]
        queries = self.sizes.packed if self.sizes.packed and frame == port == HERE else self.frames[frame]
        reader = Reader(self.axes.batch, queries, self.frames.get(port, queries), self.sizes.full, size)
        return reader.read(self.full[source], label, space)

    def _whole(self, node: fx.Node) -> Any:
        """A value of full length, or a number."""
        return self.full[node] if node in self.full else self.sizes.number(node)
