"""Stacks whose layers are alike, together: what a step does in all of them is one sequence of kernels.

A layer of the first stack is what layers of the others are without their cross-attention. So the rows of all stacks are
one batch in front of the cross-attention and behind it. Weights that they share are read once; of their own, each
section of the batch is given its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from depthc.codegen.over_sections import PerSection, has_sections
from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.caches import Cached, cached_of
from depthc.ir.axes.ports import ports_of
from depthc.ir.evaluate import as_data
from depthc.ir.pieces import Piece, Pieces, pieces_of
from depthc.ir.program import Block, Call, Kv, Program
from depthc.ir.rows.execution import Cache
from depthc.ir.sections import Section
from depthc.ir.side_by_side import Sections
from depthc.ir.steps import Kept
from depthc.runtime.fixed import FixedAlone


def runs_together(program: Program, sections: Sequence[Section], apart: bool = False) -> bool:
    """Whether all sections have the same layers with the same weights, but for cross-attentions.

    Args:
        apart: or with other weights.
    """
    if len({section.depth for section in sections}) != 1:
        return False
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
    return len({_bound(pieces, call, crossed.carries - 1) for call in calls[1:]} | {_bound(pieces, calls[0], 0)}) == 1


def _takes_weights(program: Program, piece: Piece, calls: Sequence[Call], apart: bool) -> bool:
    """Whether a piece can read those of all calls: the same ones, or, `apart`, others of the same types."""
    names = [{call.params[i] for call in calls} for i in piece.params]
    if all(len(own) == 1 for own in names):
        return True
    alike = all(len({program.params[name].type for name in own}) == 1 for own in names)
    return apart and alike and has_sections(piece, [len(own) > 1 for own in names])


def _bound(pieces: Pieces, call: Call, extra: int) -> tuple[Any, ...]:
    """What the shared pieces read in a call beside parameters; `extra` carries are in front of its side inputs."""
    found: list[Any] = []
    for piece in pieces.shared:
        found += [call.reads[i - 1 + extra] for i in piece.values]
        found += [call.consts[i] for i in piece.consts]
    return tuple(found)


def _one_layout(pieces: Pieces, layer: Block, crossed: Block) -> bool:
    """Whether the pieces keep what the layers do, with the rows of the batch in a dimension of their own."""
    own = [c for piece in pieces.shared for c in cached_of(piece.block)]
    whole = [cached_of(crossed)[i] for piece in pieces.shared for i in piece.ports]
    batches = [c.batch is not None and len(c.label[c.batch]) == 1 for port in own for c in port]
    return all(batches) and _layouts(own) == _layouts(whole) == _layouts(cached_of(layer))


def _layouts(ports: Sequence[Sequence[Cached]]) -> list[list[tuple[Any, ...]]]:
    return [[(c.dim, c.batch, len(c.label), c.elements) for c in port] for port in ports]


class FixedTogether(Sections, FixedAlone):
    """Evaluates one token in all sections at once, depth by depth."""

    def layers(self, calls: Mapping[str, Call], indices: Mapping[str, int]) -> None:
        placed = list(calls.items())
        depths = list(zip(*([placed[at] for at in section.numbers] for section in self.sections), strict=True))
        dim = batch_dim(self.program.blocks[depths[0][0][1].block])
        rows = torch.cat([self._rows_of(call.reads[0], self.program.blocks[call.block]) for _, call in depths[0]], dim)
        for depth in depths:
            rows = self._depth(depth, rows, dim)
        for (_, call), own in zip(depths[-1], rows.chunk(len(self.sections), dim), strict=True):
            self.values[call.writes[0]], self.kinds[call.writes[0]] = own, "rows"
        for site, call in placed:
            self.show(call, site, indices)

    def _depth(self, depth: Sequence[tuple[str, Call]], rows: Tensor, dim: int) -> Tensor:
        """The layers of one depth."""
        layer, crossed = (self.program.blocks[call.block] for _, call in depth[:2])
        pieces = pieces_of(layer, crossed)
        assert pieces is not None
        state, memory = crossed.body.placeholders_of("value")[:2]
        states = {state: rows}
        if pieces.front is not None:
            self._shared(pieces.front, depth, states, 0)
        made = [states[pieces.before].chunk(len(depth), dim)[0]]
        for number, (site, call) in enumerate(depth[1:], 1):
            own = {node: value.chunk(len(depth), dim)[number] for node, value in states.items()}
            own[memory] = own[state]  # none of the new tokens is read
            kept = self._kept(call, crossed, site)
            made += self._run_piece(pieces.crossing, [call], own, [kept[i] for i in pieces.crossing.ports])
        states[pieces.after] = torch.cat(made, dim)
        self._shared(pieces.rest, depth, states, 0 if pieces.front is None else len(pieces.front.ports))
        return states[crossed.body.results[0]]

    def _shared(
        self, piece: Piece, depth: Sequence[tuple[str, Call]], states: dict[fx.Node, Tensor], port: int
    ) -> None:
        """Run a piece for all sections; its ports are those of the layer from number `port` on."""
        name = f"{depth[0][0]} {piece.block.name}"
        if name not in self.memory.static:
            self.memory.static[name] = [self._together(piece, depth, i, port + i) for i in range(len(piece.ports))]
        made = self._run_piece(piece, [call for _, call in depth], states, self.memory.static[name])
        states.update(zip(piece.makes, made, strict=True))

    def _together(self, piece: Piece, depth: Sequence[tuple[str, Call]], number: int, port: int) -> Cache | None:
        """What a port keeps in all sections, which they give away."""
        found: list[Cache | None] = []
        for section, (site, call) in enumerate(depth):
            kept, at = self._kept(call, self.program.blocks[call.block], site), piece.ports[number] if section else port
            found.append(kept[at])
            self.memory.static[site][at] = None
        caches = [cache for cache in found if cache is not None]
        if len(caches) < len(depth):
            return None
        layouts = cached_of(piece.block)[number]
        return tuple(torch.cat(own, c.batch or 0) for c, own in zip(layouts, zip(*caches, strict=True), strict=True))

    def _run_piece(
        self,
        piece: Piece,
        calls: Sequence[Call],
        states: Mapping[fx.Node, Tensor],
        caches: Sequence[Cache | None],
    ) -> tuple[Tensor, ...]:
        """Run a piece for the sections whose calls are given."""
        call, sections = calls[-1], len(calls)
        block, ports = piece.block, ports_of(piece.block)
        alone = {i for i, port in enumerate(ports) if port.cross or sections == 1}
        inputs = block.body.placeholders_of("value")[block.carries :]
        sides = [self._side(call.reads[i], node, block, sections) for i, node in zip(piece.values, inputs, strict=True)]
        plans = [Kv("read" if i in alone else "update", "cache") for i in range(len(ports))]
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
        if name not in self.memory.repeated:
            self.memory.repeated[name] = torch.cat([side] * sections, dims[0])
        return self.memory.repeated[name]


def batch_dim(block: Block) -> int:
    """The dimension of the batch in a block's state."""
    axes = analyse(block)
    return int(axes.labels[block.body.placeholders_of("value")[0]].index((axes.batch,)))
