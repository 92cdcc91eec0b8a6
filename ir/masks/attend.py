"""Who attends to whom: an attention port run on scores of no meaning, so that only its mask shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from depthc.ir.axes.analysis import Axes, analyse
from depthc.ir.axes.labels import Label, size_of
from depthc.ir.axes.ops import argument, dims_of, op_name, operands
from depthc.ir.axes.ports import Port, holds
from depthc.ir.axes.probe import shapes_at
from depthc.ir.masks.cones import Cone, Evaluation, Site, Unknown, cone_of, inside
from depthc.ir.program import Program

_LOGARITHMIC = {"softmax", "log_softmax", "amax", "max", "logsumexp"}
_BUDGET = 2**27  # elements of the scores
_MASKED = 8000.0  # scores this far below the largest are masked: above any ALiBi, below the customary -10000


@dataclass(frozen=True, eq=False)
class Attention:
    """One port of one call: where its mask comes from."""

    program: Program
    site: Site
    port: Port

    @property
    def axes(self) -> Axes:
        """The axes of the block."""
        assert self.site.block is not None
        return analyse(self.site.block)

    @property
    def fused(self) -> fx.Node | None:
        """The fused op, if it is one."""
        return next((n for n in self.port.exits if self.axes.kinds.get(n) == "fused"), None)

    def wanted(self) -> list[fx.Node]:
        """The nodes that say who attends: what every op over the keys reads, or the fused op's mask."""
        if self.fused is not None:
            mask = argument(self.fused, 3, "attn_mask")
            return [mask] if isinstance(mask, fx.Node) else []
        return list(dict.fromkeys((*self._weights_read(), *self.scores_read())))

    def _weights_read(self) -> Iterator[fx.Node]:
        """Values that count for nothing where they are 0."""
        for node in self.port.region:
            sums = node in self.port.exits and set(self.port.values) & set(node.all_input_nodes)
            if sums or (op_name(node) == "sum" and self._over_keys(node)):
                yield from (source for _, source in operands(node) if source in self.port.region)

    def scores_read(self) -> frozenset[fx.Node]:
        """Values that count for nothing where they are very low."""
        found = (n for n in self.port.region if op_name(n) in _LOGARITHMIC and self._over_keys(n))
        return frozenset(source for n in found for source in n.all_input_nodes[:1]) & self.port.region

    def _over_keys(self, node: fx.Node) -> bool:
        """Whether an op reduces, or normalises, the key axis."""
        label: Label = self.axes.labels[node.args[0]]  # type: ignore[index]
        dims = dims_of(argument(node, 1, "dim", -1 if "softmax" in op_name(node) else None), len(label))
        return holds((label[d] for d in dims), self.port.axis)

    def given(self) -> frozenset[fx.Node]:
        """Where evaluation stops: at the scores, and at what else the tokens decide."""
        found: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        stack, made = list(self.wanted()), self._made_of_scores()
        while stack:
            node = stack.pop()
            if node in seen or node not in self.axes.moving:
                continue
            seen.add(node)
            added = op_name(node) == "baddbmm"  # adds its bias in the same op: run it, on operands of no meaning
            if node not in made or (node in self.port.entries and not added):
                found.add(node)
            else:
                stack.extend(node.all_input_nodes)
        return frozenset(found)

    def _made_of_scores(self) -> set[fx.Node]:
        made = set(self.port.entries)
        for node in self.site.body.nodes:
            if not made.isdisjoint(node.all_input_nodes):
                made.add(node)
        return made

    def from_tokens(self) -> set[torch.dtype]:
        """The dtypes of what the tokens decide besides scores: a bias, or a mask."""
        bias = {n for e in self.port.entries if op_name(e) == "baddbmm" for n in e.all_input_nodes}
        return {self.axes.probe.values[n].dtype for n in self.given() if n not in bias | set(self.port.entries)}

    def cone(self) -> Cone:
        """What the mask depends on.

        Raises:
            Unknown: it cannot be followed to arguments.
        """
        return cone_of(self.program, self.site, self.wanted(), self.given())

    def origins(self) -> tuple[Any, ...]:
        """What the block's inputs in the cone are bound to."""
        nodes = inside(self.site, self.wanted(), self.given()) - self.given()
        return tuple(self.site.origin(n) for n in self.site.body.placeholders if n in nodes)

    def allowed(self, evaluation: Evaluation, heads: bool = True) -> tuple[Tensor, bool]:
        """The relation bool[batch or 1, queries, keys], and whether allowed pairs get other than equal weights.

        Args:
            heads: False: take one head for all where they can only differ by side inputs, to save memory.

        Raises:
            Unknown: the heads differ, or it would not fit into memory.
        """
        shapes = shapes_at(self.site.body, evaluation.sizes)
        weights = self._weights(evaluation, shapes, heads, random=True)
        found = [self._arranged(w, label, shapes) for w, label in weights.found]
        read = [(f != 0) & ~f.isnan() for f in found]
        if any((r != r[:, :1]).any() for r in read):
            raise Unknown("the heads have masks of their own")
        result = reduce(torch.logical_or, read)  # a key that any of the ops reads
        plain = self._weights(evaluation, shapes, heads, random=False).found if heads else []
        return result[:, 0], any(_uneven(self._arranged(w, label, shapes)) for w, label in plain)

    def _weights(self, evaluation: Evaluation, shapes: Mapping[fx.Node, Any], heads: bool, random: bool) -> Weigh:
        weigh = Weigh(random)
        given = {n: self._filler(n, shapes, heads, random) for n in self.given()}
        values = evaluation.values(self.site, self.wanted(), given, weigh)
        if self.fused is not None:
            q, k = (a for a in self.fused.args[:2] if isinstance(a, fx.Node))
            label = (*self.axes.labels[q][:-1], self._read(self.fused, 1, k)[-2])
            size = (*shapes[q].shape[:-1], shapes[k].shape[-2])
            causal = bool(argument(self.fused, 5, "is_causal", False))
            weigh.found = [(weigh.fused(values[0] if values else None, size, causal), label)]
        else:
            low = self.scores_read()
            named = [(v, n, self.axes.labels[n]) for v, n in zip(values, self.wanted(), strict=True)]
            weigh.found = [
                (weigh.softmax(v, self._key_dim(label)) if n in low else v, label)
                for v, n, label in named
                if random or n not in low
            ]
        return weigh

    def _key_dim(self, label: Label) -> int:
        return next(d for d, dim in enumerate(label) if holds([dim], self.port.axis))

    def _read(self, node: fx.Node, index: int, source: Any) -> Label:
        edge = self.axes.edges.get((node, (index, -1)))
        return edge.label if edge else self.axes.labels[source]

    def _filler(self, node: fx.Node, shapes: Mapping[fx.Node, Any], heads: bool, random: bool) -> Tensor:
        """Scores of no meaning: all alike, or random so that a masked row shows by being constant."""
        shape = list(shapes[node].shape)
        if not heads and node in self.port.entries:
            tokens = {self.axes.token, self.axes.batch, self.port.axis}
            for d, dim in enumerate(self.axes.labels[node]):
                if dim and all(a.kind == "free" and a not in tokens for a in dim):
                    shape[d] = 1
        if prod(shape) > _BUDGET:
            raise Unknown(f"scores of shape {shape} are too large to look at")
        return filler(shape, shapes[node].dtype, random)

    def _arranged(self, weights: Tensor, label: Label, shapes: Mapping[fx.Node, Any]) -> Tensor:
        """Weights as [batch or 1, heads, queries, keys]."""
        axes, port = self.axes, self.port
        query = [d for d, dim in enumerate(label) if dim and all(a.kind == "token" for a in dim)]
        key = [d for d, dim in enumerate(label) if holds([dim], port.axis)]
        if len(query) != 1 or len(key) != 1 or len(label) != weights.dim():
            raise Unknown("queries and keys have no dimensions of their own")
        rest = [d for d in range(len(label)) if d not in (query[0], key[0])]
        x = weights.permute(*rest, query[0], key[0])
        batched = bool(rest) and label[rest[0]][:1] == (axes.batch,)
        if any(axes.batch in label[d] for d in rest[1:]) or (rest and axes.batch in label[rest[0]][1:]):
            raise Unknown("the batch is not the first dimension of the scores")
        batch = shapes[axes.block.body.placeholders_of("value")[0]].shape[self._batch_dim()] if batched else 1
        x = x.reshape(batch if batched and x.shape[0] != 1 else 1, -1, *x.shape[-2:])
        return self._cropped(x, label[key[0]])

    def _batch_dim(self) -> int:
        carry = self.axes.block.body.placeholders_of("value")[0]
        return next(d for d, dim in enumerate(self.axes.labels[carry]) if self.axes.batch in dim)

    def _cropped(self, x: Tensor, dim: Sequence[Any]) -> Tensor:
        """Without the keys that are concatenated to the tokens' own: sinks and memory, which all tokens must read."""
        before, after = (sum(size_of(d) for a in dim for d in getattr(a, side)) for side in ("before", "after"))
        if not before and not after:
            return x
        end = x.shape[-1] - after
        if not ((x[..., :before] != 0).all() and (x[..., end:] != 0).all()):
            raise Unknown("not every token reads the keys that are added to the tokens' own")
        return x[..., before:end]


def filler(shape: Sequence[int], dtype: torch.dtype, random: bool) -> Tensor:
    """Ones, or random numbers around one."""
    if not random or not dtype.is_floating_point:
        return torch.ones(shape, dtype=dtype)
    return (0.5 + torch.rand(tuple(shape), generator=torch.Generator().manual_seed(1))).to(dtype)


def _uneven(weights: Tensor) -> bool:
    """Whether keys that a query may read get different weights."""
    size = weights.float().abs().nan_to_num()
    on = size > 0
    top, low = size.amax(-1), torch.where(on, size, torch.inf).amin(-1)
    return bool((on.any(-1) & (top > 1.001 * low)).any())


class Weigh:
    """Runs ops; on random scores with a softmax that keeps every weight that is not masked above zero.

    So no bias underflows. A row that is constant in spite of random scores has all keys masked by a finite minimum, and
    gets weights 0.
    """

    def __init__(self, random: bool) -> None:
        self.random = random
        self.found: list[tuple[Tensor, Label]] = []

    def __call__(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if not self.random or op_name(node) != "softmax":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        dtype = argument(node, 2, "dtype")
        return self.softmax(args[0], args[1]).to(dtype if isinstance(dtype, torch.dtype) else args[0].dtype)

    def softmax(self, x: Tensor, dim: int) -> Tensor:
        """Weights that are 0 for masked scores only, and at most 3000 times apart."""
        top, low = x.amax(dim, keepdim=True), x.amin(dim, keepdim=True)
        below = (top.float() - x.float()).nan_to_num(posinf=torch.inf)
        on = below < _MASKED
        on &= torch.isfinite(top) & ((top != low) | (x.shape[dim] == 1))
        weights = torch.where(on, torch.exp(below.clamp(max=_MASKED) * (-8 / _MASKED)), 0.0)
        return weights / weights.sum(dim, keepdim=True).clamp(min=1e-9)

    def fused(self, mask: Tensor | None, shape: Sequence[int], causal: bool) -> Tensor:
        """The weights of the fused op."""
        scores = filler(shape[-2:], torch.float32, self.random)
        if causal:
            mask = torch.ones(shape[-2:], dtype=torch.bool).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores.to(mask.dtype) + mask
        weights = self.softmax(scores, -1) if self.random else torch.softmax(scores, -1)
        return weights.reshape([1] * (len(shape) - weights.dim()) + list(weights.shape))
