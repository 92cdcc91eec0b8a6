"""The rows of several sections as one batch, with weights of their own: a graph for one section becomes one for all.

Sections are equal parts of the batch, one behind the other. What reads no weights is computed for all of them at once.
A linear map is one op for all sections; what is computed element by element is one too, with a weight for every row.
What else reads a weight is computed part by part, and put together again. Rows may be given in parts too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import floordiv, getitem
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from depthc.codegen.few_rows import FEW_ROWS
from depthc.ir.axes.analysis import analyse
from depthc.ir.pieces import Piece


class PerSection(tuple[Any, ...]):
    """A weight that every section has of its own, in their order."""


class Parts(tuple[Any, ...]):
    """Rows of which parts of the batch are given, one behind the other."""


def has_sections(piece: Piece, own: Sequence[bool]) -> bool:
    """Whether a piece of a layer can run for several sections at once.

    Args:
        own: of every parameter of the piece, whether sections have one each.
    """
    axes, body = analyse(piece.block), piece.block.body
    apart = {node for node, one in zip(body.placeholders_of("param"), own, strict=True) if one}
    for node in body.nodes:
        if not apart & {*node.all_input_nodes}:
            continue
        label = axes.labels.get(node)
        each = label if isinstance(label, list) else [label]  # of an op with several results
        if None in each or any(axes.batch in atoms and atoms != (axes.batch,) for own in each for atoms in own):
            return False
        if not any(axes.batch in atoms for own in each for atoms in own):
            apart.add(node)  # made of weights alone
        elif each is label:
            return False
    return True


def over_sections(graph: fx.Graph, sections: Sequence[int], batch: SymInt) -> fx.Graph:
    """A graph over the rows of all sections.

    Args:
        graph: traced with the batch of all sections, whose size is a symbol, and the weights of one.
        sections: of every placeholder, how many weights or parts take its place; 0 for those that stay.
        batch: the size of the batch.
    """
    return _OverSections(graph, sections, batch).made


class _OverSections:
    def __init__(self, graph: fx.Graph, sections: Sequence[int], batch: SymInt) -> None:
        self.batch, self.made = batch.node.expr, fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.chunks: dict[fx.Node, fx.Node] = {}
        self.of_rows: dict[tuple[fx.Node, int], fx.Node] = {}  # by the dimensions of what they are computed with
        inputs = graph.find_nodes(op="placeholder")
        given = dict(zip(inputs, sections, strict=True))
        counts = {count for node, count in given.items() if count and self._dim(node) is None}
        assert len(counts) <= 1, f"weights of {sorted(counts)} sections"
        self.count = next(iter(counts), 0)
        for node, count in given.items():
            copies = [self.made.placeholder(f"{node.name}_{i}") for i in range(max(1, count))]
            self.values[node] = PerSection(copies) if count else copies[0]
        for node in (node for node, count in given.items() if count and self._dim(node) is not None):
            parts = ([*self.values[node]], self._dim(node))
            self.values[node] = self.made.call_function(torch.ops.aten.cat.default, parts)
        for node in graph.nodes:
            if node not in given:
                self.values[node] = self._made(node)

    def _made(self, node: fx.Node) -> Any:
        apart = [n for n in node.all_input_nodes if isinstance(self.values[n], PerSection)]
        if not apart:
            return self.made.node_copy(node, self.values.__getitem__)
        if node.target is torch.ops.aten.linear.default and self._is_map(node):
            x, *weights = (self.values[n] for n in node.all_input_nodes)
            matrices, *biases = map(list, weights)
            own = self.made.call_function(FEW_ROWS, (x, matrices, biases[0] if biases else [], None, self.count))
            return self.made.call_function(getitem, (own, 0))
        if self._is_elementwise(node, apart):
            return self.made.node_copy(node, lambda n: self._of_rows(n, node) if n in apart else self.values[n])
        parts = [self.made.node_copy(node, partial(self._part, section=i)) for i in range(self.count)]
        dim = self._dim(node)
        if dim is None:
            return PerSection(parts)
        if all(self._dim(n) is None for n in node.all_input_nodes):  # a weight for every row
            parts = [self._chunk(part, dim, i) for i, part in enumerate(parts)]
        return self.made.call_function(torch.ops.aten.cat.default, (parts, dim))

    def _is_map(self, node: fx.Node) -> bool:
        """Whether rows are mapped by weights of which each section has its own."""
        rows, *weights = node.all_input_nodes
        return self._dim(rows) == 0 and all(isinstance(self.values[n], PerSection) for n in weights)

    def _is_elementwise(self, node: fx.Node, apart: Sequence[fx.Node]) -> bool:
        """Whether elements of rows are computed of themselves and of weights that are the same for all rows."""
        target, value = node.target, node.meta.get("val")
        if torch.Tag.pointwise not in getattr(target, "tags", ()) or self._dim(node) != 0:
            return False
        if target._schema.is_mutable or not any(self._dim(n) == 0 for n in node.all_input_nodes):
            return False
        given = [n.meta["val"] for n in apart]
        alike = all(own.dim() > 0 or own.dtype == value.dtype for own in given)  # a number promotes no rows
        return alike and all(own.dim() < value.dim() or own.shape[0] == 1 for own in given)

    def _of_rows(self, weight: fx.Node, node: fx.Node) -> fx.Node:
        """The weights of all sections, for every row of a result its own."""
        rank, own = node.meta["val"].dim(), weight.meta["val"]
        if (weight, rank) not in self.of_rows:
            aten, rows = torch.ops.aten, next(n for n in node.all_input_nodes if self._dim(n) == 0)
            shape = own.shape[1:] if own.dim() == rank else own.shape
            wide = [1] * (rank - 1 - len(shape)) + [*shape]
            count = self.made.call_function(aten.sym_size.int, (self.values[rows], 0))
            each = self.made.call_function(floordiv, (count, self.count))
            stacked = self.made.call_function(aten.stack.default, (list(self.values[weight]),))
            apart = self.made.call_function(aten.view.default, (stacked, [self.count, 1, *wide]))
            spread = self.made.call_function(aten.expand.default, (apart, [self.count, each, *wide]))
            self.of_rows[weight, rank] = self.made.call_function(aten.reshape.default, (spread, [count, *wide]))
        return self.of_rows[weight, rank]

    def _part(self, node: fx.Node, section: int) -> Any:
        """What a section reads of a value."""
        value = self.values[node]
        if isinstance(value, PerSection):
            return value[section]
        dim = self._dim(node)
        return value if dim is None else self._chunk(value, dim, section)

    def _chunk(self, value: fx.Node, dim: int, section: int) -> fx.Node:
        if value not in self.chunks:
            self.chunks[value] = self.made.call_function(torch.ops.aten.chunk.default, (value, self.count, dim))
        return self.made.call_function(getitem, (self.chunks[value], section))

    def _dim(self, node: fx.Node) -> int | None:
        """The dimension of the batch, if a value has one."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        shape: tuple[Any, ...] = value.shape
        sizes = {d: n.node.expr for d, n in enumerate(shape) if isinstance(n, SymInt)}
        found = [d for d, size in sizes.items() if self.batch in size.free_symbols]
        assert all(sizes[d] == self.batch for d in found), f"{node}: a part of a dimension"  # not if `has_sections`
        return found[0] if found else None
