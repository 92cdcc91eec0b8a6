"""Which ops run for which rows when a block runs on a subset of its tokens.

Every op runs in a frame: for the tokens at hand, or, behind the cut of a port that has keys of other tokens, for all
keys of that port. What a plan does not need (own keys where others' are read) is in no frame and is not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx

from depthc.ir.axes.analysis import Axes, analyse
from depthc.ir.axes.caches import Cached, cached_of
from depthc.ir.axes.labels import Atom, Dim
from depthc.ir.axes.ops import Slot, operands
from depthc.ir.axes.ports import Port, ports_of
from depthc.ir.memo import once
from depthc.ir.program import Block
from depthc.ir.rows.slicing import Slice, slices_of

Source = Literal["own", "append", "given", "update"]
"""Where a port's keys come from: the rows at hand; those and a cache; a cache; a cache with the rows replaced."""

HERE = -1
Frame = int  # HERE, or the number of the port whose keys it holds


@dataclass(frozen=True, eq=False)
class Schedule:
    """What to run, in order.

    Attributes:
        steps: ops with their frame.
        sides: ops that do not depend on the carry, run once at full length.
        slices: products of frame HERE that compute only their live features.
        key_port: the port that an op reads keys of, by op and operand slot.
        port_of: the port that an op's key axis belongs to.
        foreign: free axes whose size is only known from a side input: the input, its dimension, the axis, and what
            else is in that dimension.
    """

    axes: Axes
    ports: tuple[Port, ...]
    cached: tuple[tuple[Cached, ...], ...]
    sources: tuple[Source, ...]
    steps: tuple[tuple[fx.Node, Frame], ...]
    sides: tuple[fx.Node, ...]
    slices: Mapping[fx.Node, Slice]
    skipped: frozenset[fx.Node]
    key_port: Mapping[tuple[fx.Node, Slot], int]
    port_of: Mapping[fx.Node, int]
    foreign: tuple[tuple[fx.Node, int, Atom, Dim], ...]

    def frame_of(self, node: fx.Node, slot: Slot, frame: Frame) -> Frame:
        """The frame in which an op that runs in `frame` reads an operand."""
        port = self.key_port.get((node, slot))
        return frame if port is None or self.sources[port] == "own" else port


def schedule_of(block: Block, sources: tuple[Source, ...], stored: tuple[bool, ...]) -> Schedule:
    """The schedule of a block under one source of keys a port; computed once.

    Args:
        stored: ports whose cached values are wanted though no later op reads them.
    """
    return once(block, "schedule", lambda: _Scheduler(block, sources, stored).schedule(), sources, stored)


class _Scheduler:
    def __init__(self, block: Block, sources: tuple[Source, ...], stored: tuple[bool, ...]) -> None:
        self.body, self.axes, self.ports, self.cached = block.body, analyse(block), ports_of(block), cached_of(block)
        self.sources, self.stored = sources, stored
        self.key_port = {edge: i for i, port in enumerate(self.ports) for edge in port.key_edges}
        self.port_of = {node: i for i, port in enumerate(self.ports) for node in port.region}
        self.order = {n: i for i, n in enumerate(self.body.graph.nodes)}
        self.seen: set[tuple[fx.Node, Frame]] = set()
        self.full: set[fx.Node] = set()

    def schedule(self) -> Schedule:
        """Everything that the results and the wanted caches need."""
        for node, frame in self._roots():
            self._need(node, frame)
        steps = sorted(self.seen, key=lambda s: (self.order[s[0]], s[1] != HERE))
        slices, skipped = self._slices()
        return Schedule(
            self.axes,
            self.ports,
            self.cached,
            self.sources,
            tuple(step for step in steps if step[0].op == "call_function"),
            tuple(sorted((n for n in self.full if n.op == "call_function"), key=self.order.__getitem__)),
            slices,
            skipped,
            self.key_port,
            self.port_of,
            tuple(self._foreign()),
        )

    def _roots(self) -> Iterator[tuple[fx.Node, Frame]]:
        yield from ((node, HERE) for node in self.body.results)
        for i, source in enumerate(self.sources):
            if source in ("append", "update") or (source == "own" and self.stored[i]):
                yield from ((c.node, HERE) for c in self.cached[i])

    def _need(self, node: fx.Node, frame: Frame) -> None:
        """Mark an op, and what it reads in the frames where it reads it."""
        stack = [(node, frame)]
        while stack:
            current, at = stack.pop()
            if current not in self.axes.moving:
                self._need_full(current)
                continue
            if (current, at) in self.seen or self._given(current, at):
                continue
            self.seen.add((current, at))
            for slot, source in operands(current):
                if self._is_data(source):
                    stack.append((source, self._frame(current, slot, at)))

    def _given(self, node: fx.Node, frame: Frame) -> bool:
        return frame != HERE and any(c.node is node for c in self.cached[frame])

    def _frame(self, node: fx.Node, slot: Slot, frame: Frame) -> Frame:
        port = self.key_port.get((node, slot))
        return frame if port is None or self.sources[port] == "own" else port

    def _need_full(self, node: fx.Node) -> None:
        given = {
            c.node for i, s in enumerate(self.sources) if s == "given" and self.ports[i].cross for c in self.cached[i]
        }
        stack = [node]
        while stack:
            current = stack.pop()
            if current not in self.full and current not in given:
                self.full.add(current)
                stack.extend(filter(self._is_data, current.all_input_nodes))

    def _is_data(self, node: fx.Node) -> bool:
        return isinstance(self.axes.labels.get(node), tuple | list)

    def _slices(self) -> tuple[dict[fx.Node, Slice], frozenset[fx.Node]]:
        if "given" not in self.sources:  # as captured, so that no bit changes
            return {}, frozenset()
        here = {n for n, frame in self.seen if frame == HERE and n.op == "call_function"}
        kept = {c.node for i, s in enumerate(self.sources) if s != "given" for c in self.cached[i]} | set(
            self.body.results
        )

        def read(node: fx.Node) -> list[fx.Node]:
            return [] if node in kept else [u for u in node.users if u in here and self._reads_here(u, node)]

        slices = slices_of(self.axes, here - kept, read)
        return slices, frozenset(n for part in slices.values() for n in part.skipped)

    def _reads_here(self, user: fx.Node, node: fx.Node) -> bool:
        return any(s is node and self._frame(user, slot, HERE) == HERE for slot, s in operands(user))

    def _foreign(self) -> Iterator[tuple[fx.Node, int, Atom, Dim]]:
        for node in self.body.placeholders_of("value"):
            label = self.axes.labels[node]
            for d, size in enumerate(node.meta["input"].type.shape):
                free = [a for a in label[d] if a.kind == "free"] if isinstance(size, str) else []
                if len(free) == 1:
                    yield node, d, free[0], tuple(a for a in label[d] if a is not free[0])
