"""Stacks whose layers are alike, together: what a step does in all of them is one sequence of kernels.

A layer of the first stack is what layers of the others are without their cross-attention. So the rows of all stacks are
one batch in front of the cross-attention and behind it. Weights that they share are read once; of their own, each
section of the batch is given its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from depthc.codegen.kernels.few_rows import SECTIONS, WIDEST
from depthc.codegen.over_sections import Parts, PerSection, has_sections
from depthc.ir.axes.analysis import analyse, batch_dim
from depthc.ir.axes.caches import Cached, cached_of
from depthc.ir.axes.ports import ports_of
from depthc.ir.evaluate import as_data
from depthc.ir.pieces import Piece, Pieces, pieces_of
from depthc.ir.program import Block, Call, Kv, Program
from depthc.ir.rows.execution import Cache
from depthc.ir.sections import Section, lagged_ports
from depthc.ir.side_by_side import Sections, shown_by
from depthc.ir.steps import Kept
from depthc.runtime.fixed import FixedAlone

Placed = tuple[str, Call]  # a layer's place and its call


def runs_together(program: Program, sections: Sequence[Section], apart: bool = False) -> bool:
    """Whether all sections have the same layers with the same weights, but for cross-attentions.

    Args:
        apart: or with other weights.
    """
    if len({section.depth for section in sections}) != 1:
        return False
    apart = apart and len(sections) <= SECTIONS
    return all(_alike(program, calls, apart) for calls in zip(*(section.calls for section in sections), strict=True))


def _alike(program: Program, calls: Sequence[Call], apart: bool) -> bool:
    layer, crossed, *_ = (program.blocks[call.block] for call in calls)
    if len({call.block for call in calls[1:]}) != 1 or (layer.carries, crossed.carries) != (1, 2):
        return False
    pieces = pieces_of(layer, crossed)
    if pieces is None or not _one_layout(pieces, layer, crossed):
        return False
    if not all(_takes_weights(program, piece, calls, apart) for piece in pieces.shared):
        return False
    others = {_bound(pieces.shared, call, crossed.carries - 1) for call in calls[1:]}
    return len(others | {_bound(pieces.shared, calls[0], 0)}) == 1


def crossings_at_once(program: Program, sections: Sequence[Section]) -> int:
    """How many cross-attentions can be one batch, each with weights of its own, and show it its memory at once.

    All of a depth are in one batch, and as many depths as a launch of linear maps takes; 1 if that is not possible.
    """
    others = len(sections) - 1
    crossed = [call for section in sections[1:] for call in section.calls]
    (block, *more) = dict.fromkeys(call.block for call in crossed)
    if more or others > SECTIONS:
        return 1
    layer = program.blocks[sections[0].calls[0].block]
    pieces, own = pieces_of(layer, program.blocks[block]), program.blocks[block]
    assert pieces is not None
    needed = [pieces.crossing, *(shown_by(own, port) for port in lagged_ports(program, crossed[0]))]
    alike = len({_bound(needed, call, own.carries - 1) for call in crossed}) == 1
    alike = alike and all(_has_batch(cached_of(own)[i]) for i in pieces.crossing.ports)
    if not alike or not all(has_sections(piece, [True] * len(piece.params)) for piece in needed):
        return 1
    return SECTIONS // others * others


def _takes_weights(program: Program, piece: Piece, calls: Sequence[Call], apart: bool) -> bool:
    """Whether a piece can read those of all calls: the same ones, or, `apart`, others of the same types.

    Maps of rows that are too wide for one launch are better made by each section for itself.
    """
    names = [{call.params[i] for call in calls} for i in piece.params]
    if all(len(own) == 1 for own in names):
        return True
    types = [{program.params[name].type for name in own} for own in names]
    sizes = [n * type.dtype.itemsize for each in types for type in each for n in type.shape if isinstance(n, int)]
    alike = all(len(each) == 1 for each in types) and max(sizes, default=0) <= WIDEST
    return apart and alike and has_sections(piece, [len(own) > 1 for own in names])


def _bound(pieces: Sequence[Piece], call: Call, extra: int) -> tuple[Any, ...]:
    """What pieces read in a call beside parameters; `extra` carries are in front of its side inputs."""
    found: list[Any] = []
    for piece in pieces:
        found += [call.reads[i - 1 + extra] for i in piece.values]
        found += [call.consts[i] for i in piece.consts]
    return tuple(found)


def _one_layout(pieces: Pieces, layer: Block, crossed: Block) -> bool:
    """Whether the pieces keep what the layers do, with the rows of the batch in a dimension of their own."""
    own = [c for piece in pieces.shared for c in cached_of(piece.block)]
    whole = [cached_of(crossed)[i] for piece in pieces.shared for i in piece.ports]
    return all(map(_has_batch, own)) and _layouts(own) == _layouts(whole) == _layouts(cached_of(layer))


def _has_batch(port: Sequence[Cached]) -> bool:
    """Whether what a port keeps has the batch as a dimension of its own."""
    return all(c.batch is not None and len(c.label[c.batch]) == 1 for c in port)


def _layouts(ports: Sequence[Sequence[Cached]]) -> list[list[tuple[Any, ...]]]:
    return [[(c.dim, c.batch, len(c.label), c.elements) for c in port] for port in ports]


class FixedTogether(Sections, FixedAlone):
    """Evaluates one token in all sections at once, depth by depth.

    Args:
        most: how many cross-attentions are one batch (`crossings_at_once`).
    """

    def __init__(self, most: int, *given: Any) -> None:
        super().__init__(*given)
        self.most, self.depths, self.crossings = most, list[tuple[Placed, ...]](), list[Placed]()

    def layers(self, calls: Mapping[str, Call], indices: Mapping[str, int]) -> None:
        placed = list(calls.items())
        self.depths = depths = list(zip(*([placed[at] for at in s.numbers] for s in self.sections), strict=True))
        self.crossings = [one for depth in depths for one in depth[1:]]
        dim = batch_dim(self.program.blocks[depths[0][0][1].block])
        rows = torch.cat([self._rows_of(call.reads[0], self.program.blocks[call.block]) for _, call in depths[0]], dim)
        for depth in depths:
            rows = self._depth(depth, rows, dim)
        for (_, call), own in zip(depths[-1], rows.chunk(len(self.sections), dim), strict=True):
            self.values[call.writes[0]], self.kinds[call.writes[0]] = own, "rows"
        for at in range(0, len(self.crossings), self.most):
            self._show(self.crossings[at : at + self.most])

    def _depth(self, depth: Sequence[Placed], rows: Tensor, dim: int) -> Tensor:
        """The layers of one depth."""
        pieces, crossed = self._pieces(depth), self.program.blocks[depth[1][1].block]
        states: dict[fx.Node, Any] = {crossed.body.placeholders_of("value")[0]: rows}
        if pieces.front is not None:
            self._shared(pieces.front, depth, states, 0)
        states[pieces.after] = Parts(self._crossed(pieces, depth, states, dim))
        self._shared(pieces.rest, depth, states, 0 if pieces.front is None else len(pieces.front.ports))
        return states[crossed.body.results[0]]  # type: ignore[no-any-return]

    def _pieces(self, depth: Sequence[Placed]) -> Pieces:
        layer, crossed = (self.program.blocks[call.block] for _, call in depth[:2])
        pieces = pieces_of(layer, crossed)
        assert pieces is not None  # `runs_together`
        return pieces

    def _shared(self, piece: Piece, depth: Sequence[Placed], states: dict[fx.Node, Any], port: int) -> None:
        """Run a piece for all sections; its ports are those of the layer from number `port` on."""
        name = f"{depth[0][0]} {piece.block.name}"
        if name not in self.memory.static:
            layouts = cached_of(piece.block)
            places = [[port + i, *[own] * (len(depth) - 1)] for i, own in enumerate(piece.ports)]
            self.memory.static[name] = [self._together(depth, *one) for one in zip(layouts, places, strict=True)]
        made = self._run_piece(piece, [call for _, call in depth], states, self.memory.static[name])
        states.update(zip(piece.makes, made, strict=True))

    def _crossed(
        self, pieces: Pieces, depth: Sequence[Placed], states: Mapping[fx.Node, Tensor], dim: int
    ) -> Iterator[Tensor]:
        """The state behind the cross-attention: that of the first section, which has none, and those of others."""
        state, memory = self.program.blocks[depth[1][1].block].body.placeholders_of("value")[:2]
        rows, count = states[state].shape[dim] // len(depth), min(self.most, len(depth) - 1)
        yield states[pieces.before].narrow(dim, 0, rows)
        for at in range(1, len(depth), count):
            own = {node: value.narrow(dim, at * rows, count * rows) for node, value in states.items()}
            own[memory] = own[state]  # none of the new tokens is read
            made = depth[at : at + count]
            yield from self._run_piece(
                pieces.crossing, [call for _, call in made], own, self._memory_of(pieces.crossing, made), reads=True
            )

    def _memory_of(self, piece: Piece, crossings: Sequence[Placed]) -> list[Cache | None]:
        """What cross-attentions next to each other read, a part of what their batch keeps."""
        first = self.crossings.index(crossings[0])
        group = self.crossings[first - first % self.most :][: self.most]
        layouts = cached_of(self.program.blocks[group[0][1].block])
        kept = zip(self._kept_of(piece, group), piece.ports, strict=True)
        return [_part(cache, layouts[i], first % self.most, len(crossings), len(group)) for cache, i in kept]

    def _kept_of(self, piece: Piece, crossings: Sequence[Placed]) -> Sequence[Cache | None]:
        """What a batch of cross-attentions keeps, port by port."""
        name = f"{crossings[0][0]} {piece.block.name}"
        if name not in self.memory.static:
            layouts = cached_of(self.program.blocks[crossings[0][1].block])
            kept = [self._together(crossings, layouts[i], [i] * len(crossings)) for i in piece.ports]
            self.memory.static[name] = kept
        return self.memory.static[name]

    def _together(self, placed: Sequence[Placed], layouts: Sequence[Cached], ports: Sequence[int]) -> Cache | None:
        """What a port keeps in several layers, which they give away."""
        found: list[Cache | None] = []
        for (site, call), port in zip(placed, ports, strict=True):
            found.append(self._kept(call, self.program.blocks[call.block], site)[port])
            self.memory.static[site][port] = None
        caches = [cache for cache in found if cache is not None]
        if len(caches) < len(placed):
            return None
        return tuple(torch.cat(own, c.batch or 0) for c, own in zip(layouts, zip(*caches, strict=True), strict=True))

    def _show(self, crossings: Sequence[Placed]) -> None:
        """Write what the new token shows to a batch of cross-attentions."""
        calls, depth = [call for _, call in crossings], self.crossings.index(crossings[0]) // (len(self.sections) - 1)
        block, crossing = self.program.blocks[calls[0].block], self._pieces(self.depths[depth]).crossing
        kept = dict(zip(crossing.ports, self._kept_of(crossing, crossings), strict=True))
        for port in lagged_ports(self.program, calls[0]):
            piece = shown_by(block, port)
            rows = [self.memory_of(call, piece) for call in calls]
            states = {piece.takes[0]: Parts(rows) if len(rows) > 1 else rows[0]}
            made = self._run_piece(piece, calls, states, ())
            self.memory.write(kept[port] or (), made, [c.dim for c in cached_of(block)[port]], self.place)

    def _run_piece(
        self,
        piece: Piece,
        calls: Sequence[Call],
        states: Mapping[fx.Node, Any],
        caches: Sequence[Cache | None],
        reads: bool = False,
    ) -> tuple[Tensor, ...]:
        """Run a piece for the sections whose calls are given; their keys are given too if it only `reads`."""
        call, sections = calls[-1], len(calls)
        block, ports = piece.block, ports_of(piece.block)
        inputs = block.body.placeholders_of("value")[block.carries :]
        sides = [self._side(call.reads[i], node, block, sections) for i, node in zip(piece.values, inputs, strict=True)]
        plans = [Kv("read" if reads or port.cross else "update", "cache") for port in ports]
        rows = [states[node] for node in piece.takes]
        each = zip(*(self.params_of(piece, call, {}) for call in calls), strict=True)
        params = [own[0] if all(x is own[0] for x in own) else PerSection(own) for own in each]
        return self.run_piece(piece, call, params, rows, sides, plans, Kept(tuple(caches), self._nothing()))

    def _side(self, name: str, node: fx.Node, block: Block, sections: int) -> Any:
        """A side input, for the batch rows of all sections."""
        side, axes, type = as_data(self.values[name]), analyse(block), node.meta["input"].type
        label = axes.labels.get(node) or ()
        dims = [d for d, atoms in enumerate(label) if axes.batch in atoms and isinstance(type.shape[d], str)]
        if sections == 1 or not dims:
            return side
        if name in self.memory.hoisted.changing:
            return torch.cat([side] * sections, dims[0])
        if (key := f"{name} {sections}") not in self.memory.repeated:
            self.memory.repeated[key] = torch.cat([side] * sections, dims[0])
        return self.memory.repeated[key]


def _part(cache: Cache | None, layouts: Sequence[Cached], at: int, count: int, of: int) -> Cache | None:
    """Some of equal parts of the batch."""
    if cache is None:
        return None
    sizes = [x.shape[c.batch or 0] // of for x, c in zip(cache, layouts, strict=True)]
    given = zip(cache, layouts, sizes, strict=True)
    return tuple(x.narrow(c.batch or 0, at * size, count * size) for x, c, size in given)
