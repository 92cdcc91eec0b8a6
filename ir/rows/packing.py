"""Packing: the selected rows of all batch rows one behind the other, so that none is there only to fill up.

Ops that take every row by itself run on the packed rows, [1, members, ...]; attention runs on padded ones,
[batch, width, ...], or on the packed rows by the library's kernel for sequences of unequal length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from depthc.ir.axes.analysis import Axes, analyse
from depthc.ir.axes.labels import Label, kinds_in
from depthc.ir.axes.ops import operands
from depthc.ir.axes.ports import ports_of
from depthc.ir.memo import once
from depthc.ir.program import Block
from depthc.ir.rows.gather import Extent, Rows, arrange, unmerge
from depthc.ir.rows.schedule import Frame

PADDED: Frame = -2  # of the rows at hand, filled up, where those of frame HERE are packed


def packable(block: Block) -> bool:
    """Whether a block runs on packed rows: outside of attention it reads nothing that only a batch row tells.

    A vector a sequence, which a block may be conditioned on, has no row a token to be packed.
    """
    return once(block, "packable", lambda: _packable(block))


def _packable(block: Block) -> bool:
    axes = analyse(block)
    attention = frozenset[fx.Node]().union(*(port.region for port in ports_of(block)))
    rowwise = [node for node in axes.moving if node.op == "call_function" and node not in attention]
    return all(_by_rows(axes, node) for node in rowwise)


def _by_rows(axes: Axes, node: fx.Node) -> bool:
    """Whether an op reads no value of the layers, and no other of a batch, without a row for every token."""
    for slot, source in operands(node):
        if isinstance(axes.labels.get(source), tuple):
            kinds = kinds_in(axes.read(node, slot, source)) & {"batch", "token"}
            if kinds == {"batch"} or (kinds == {"token"} and source in axes.moving):
                return False
    return True


@dataclass(frozen=True, eq=False)
class Packing:
    """How packed rows and padded ones belong together.

    Attributes:
        axes: of the block.
        padded: the rows of every batch row, filled up to one width.
        slots: [members]: where a packed row is among the padded ones, batch row by batch row.
        batch: how many batch rows there are.
        bounded: whether packed rows go on behind the last valid one; these need not be computed.
    """

    axes: Axes
    padded: Rows
    slots: Tensor
    batch: int
    bounded: bool = False

    @classmethod
    def of(
        cls, axes: Axes, positions: Tensor | None, valid: Tensor | None, slots: Tensor | None, bounded: bool
    ) -> Packing | None:
        """The packing of rows that are packed, by their `slots`."""
        if slots is None:
            return None
        assert positions is not None and valid is not None, "packed rows are of a set"
        return cls(axes, Rows(positions.shape[1], positions, valid), slots, positions.shape[0], bounded)

    @cached_property
    def rows(self) -> Rows:
        """The packed rows."""
        assert self.padded.positions is not None
        owners = torch.arange(self.batch, device=self.slots.device)[:, None].expand(-1, self.padded.count)
        positions, owners = (t.flatten()[self.slots][None] for t in (self.padded.positions, owners))
        return Rows(self.slots.shape[0], positions, None, owners)

    @cached_property
    def ends(self) -> Tensor:
        """int32[batch + 1]: where the members of every batch row begin; the last entry is their number."""
        assert self.padded.valid is not None
        return F.pad(self.padded.valid.sum(1).cumsum(0), (1, 0)).int()

    @property
    def members(self) -> Tensor:
        """int32[1]: how many packed rows are valid."""
        return self.ends[-1:]

    @cached_property
    def places(self) -> Tensor:
        """[batch * width]: which packed row lies at a padded one; the first, where none does."""
        places = self.slots.new_zeros(self.batch * self.padded.count)
        return places.scatter(0, self.slots, torch.arange(self.slots.shape[0], device=self.slots.device))

    def pad(self, x: Tensor, label: Label, packed: Extent, padded: Extent) -> Tensor:
        """Packed rows as padded ones; what fills up is the first member's."""
        flat, rest = self._rows_first(x, label, packed)
        wide = flat[self.places].unflatten(0, (self.batch, self.padded.count))
        return arrange(wide, [self.axes.batch, self.axes.token, *rest], label, padded)

    def pack(self, x: Tensor, label: Label, packed: Extent, padded: Extent) -> Tensor:
        """The members of padded rows."""
        flat, rest = self._rows_first(x, label, padded)
        return arrange(flat[self.slots][None], [self.axes.batch, self.axes.token, *rest], label, packed)

    def _rows_first(self, x: Tensor, label: Label, extent: Extent) -> tuple[Tensor, list]:
        """[rows of all batch rows, ...], and the atoms of the other dimensions."""
        flat, atoms = unmerge(x, label, extent)
        rest = [a for a in atoms if a not in (self.axes.batch, self.axes.token)]
        order = [self.axes.batch, self.axes.token, *rest]
        return flat.permute([atoms.index(a) for a in order]).flatten(0, 1), rest
