"""Runs: the repeated layers on one trunk of a graph.

A stretch of equal periods gives the pattern. A period of a hybrid holds several layers: a layer is a run of sublayers
that mix tokens, closed by those that do not. The pattern is then followed beyond the stretch, in both directions, as
long as the layers there are ones that repeat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import groupby, pairwise, takewhile

import torch
from torch import fx

from depthc.ir import certificate
from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.ports import ports_of
from depthc.ir.errors import SubsetError
from depthc.ir.outline.build import layer_block
from depthc.ir.outline.repeats import Repeat, best_repeat
from depthc.ir.outline.spans import Span, SpanFinder, data_inputs, is_size

aten = torch.ops.aten

_MIXERS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.convolution.default,
    aten.cumsum.default,
    aten.roll.default,
}
_CONTRACTIONS = {aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default}


def mixes(span: Span) -> bool:
    """Whether a span mixes tokens: an attention, a convolution, or a contraction of activations along the tokens."""
    carried, contracts = {span.start}, False
    for node in span.nodes:
        reads = [n for n in data_inputs(node) if n in carried]
        if reads:
            carried.add(node)
        if node.target in _MIXERS and node.meta["val"].dtype.is_floating_point:
            return True
        if node.target is aten.scaled_dot_product_attention.default and node.args[1] in carried:
            return True
        contracts = contracts or (node.target in _CONTRACTIONS and len(reads) > 1)
    return contracts and _contracts_tokens(span)


def _contracts_tokens(span: Span) -> bool:
    """The analysis of token axes decides what a contraction sums over."""
    sides = {n: f"side{i}" for i, n in enumerate(dict.fromkeys([*span.sides, *_sized_by(span)]))}
    block = layer_block(span, "span", sides, [f"slot{i}" for i in range(len(span.params))])
    try:
        return not analyse(block).legal or any(not port.cross for port in ports_of(block))
    except SubsetError:  # what cannot be analysed is not known to be token-wise
        return True


def _sized_by(span: Span) -> list[fx.Node]:
    """The model's arguments that a span's sizes are read from."""
    sizes = [n for node in span.nodes for n in node.all_input_nodes if is_size(n)]
    return [n for n in certificate.linearize(sizes, lambda n: n.op == "placeholder") if "value" in n.meta]


def find_runs(finder: SpanFinder, chain: Sequence[fx.Node], taken: Set[fx.Node] = frozenset()) -> list[list[Span]]:
    """All runs of repeated layers on a trunk, in order. Layers of a run follow each other without a gap.

    Args:
        finder: of the tree that the trunk is part of.
        chain: the trunk.
        taken: ops that belong to other runs.
    """
    if len(chain) < 3:
        return []
    trunk = _Trunk(finder, chain)
    repeats = trunk.repeats()
    run = max((trunk.run_of(r, taken) for r in repeats), key=saved_by, default=[])
    if not run:
        halves = (chain[: repeats[0].start + 1], chain[repeats[0].stop :]) if repeats else ()
        return [found for half in halves for found in find_runs(finder, half, taken)]
    taken = taken | {n for layer in run for n in layer.nodes}
    before, after = trunk.outside(run)
    return [*find_runs(finder, before, taken), run, *find_runs(finder, after, taken)]


class _Trunk:
    """A chain of post-dominators, the spans between its points, and where layers begin on it."""

    def __init__(self, finder: SpanFinder, chain: Sequence[fx.Node]) -> None:
        self.finder, self.chain = finder, chain
        self.spans = [finder.span(a, b) for a, b in pairwise(chain)]
        self.mixing = [mixes(span) for span in self.spans]

    def repeats(self) -> list[Repeat]:
        """The best repeat of whole periods, and the best one that may end before its second period does."""
        texts = [span.text for span in self.spans]

        def best(partial: bool) -> Repeat | None:
            return best_repeat(texts, lambda i: self.spans[i].weight, lambda i: len(self.spans[i].start.users), partial)

        return [r for r in dict.fromkeys([best(False), best(True)]) if r is not None]

    def run_of(self, repeat: Repeat, taken: Set[fx.Node]) -> list[Span]:
        """The layers of a repeated stretch and those around it that continue them; empty if none repeats."""
        return max((self._run_of(*cut, taken) for cut in self._cuttings(repeat)), key=saved_by)

    def _cuttings(self, repeat: Repeat) -> list[tuple[Repeat, int]]:
        """The ways to cut a repeated stretch into layers, as it and how far before its mixing sublayers a layer begins.

        Several may fit the stretch equally well; only one may fit what is around it.
        """
        period = self.mixing[repeat.start : repeat.start + repeat.period]
        starts = [i for i in range(repeat.period) if self._begins(period, i)]
        if len(starts) < 2:
            return [(r, 0) for r in self._rotations(repeat)]
        gaps = takewhile(lambda back: not any(period[i - back] for i in starts), range(1, repeat.period))
        return [(repeat, back) for back in (0, *gaps)]

    def _rotations(self, repeat: Repeat) -> list[Repeat]:
        """A repeat and those of its period that begin elsewhere in it and cover as much."""
        if repeat.partial:
            offsets = range(repeat.length - repeat.period + 1)
            return [replace(repeat, start=repeat.start + d, length=repeat.length - d) for d in offsets]
        texts = [span.text for span in self.spans]
        shifted = (replace(repeat, start=repeat.start + d) for d in range(1 - repeat.period, repeat.period))
        fits = [r for r in shifted if r.start >= 0 and r.stop <= len(texts) and self._is_repeat(texts, r)]
        return [repeat, *(r for r in fits if self._weight(r) == self._weight(repeat))]

    def _is_repeat(self, texts: Sequence[str], repeat: Repeat) -> bool:
        return texts[repeat.start : repeat.stop - repeat.period] == texts[repeat.start + repeat.period : repeat.stop]

    def _weight(self, repeat: Repeat) -> int:
        return sum(span.weight for span in self.spans[repeat.start : repeat.stop])

    def _run_of(self, repeat: Repeat, back: int, taken: Set[fx.Node]) -> list[Span]:
        layers = self._layers_of(repeat, back)
        if not layers:
            return []
        run = self._followed([*_before(self.finder, layers, taken), *layers], back)
        run = [*_before(self.finder, run, taken), *run] if run else []
        return run if len(run) > 1 and any(layer.params for layer in run) else []

    def outside(self, run: Sequence[Span]) -> tuple[Sequence[fx.Node], Sequence[fx.Node]]:
        """The parts of the trunk before and behind a run."""
        first = next((i for i, n in enumerate(self.chain) if n is run[0].start), 0)
        return self.chain[: first + 1], self.chain[self._index(run[-1].end) :]

    def _layers_of(self, repeat: Repeat, back: int) -> list[Span]:
        """The layers of a repeated stretch: one a period, or several if its sublayers say so."""
        period = self.mixing[repeat.start : repeat.start + repeat.period]
        starts = {(i - back) % repeat.period for i in range(repeat.period) if self._begins(period, i)}
        if len(starts) < 2:
            starts = {0}
        cuts = [repeat.start + i for i in range(repeat.length + 1) if i % repeat.period in starts]
        return [self.finder.span(self.chain[a], self.chain[b]) for a, b in pairwise(cuts)]

    def _begins(self, mixing: Sequence[bool], i: int) -> bool:
        """A layer begins where mixing follows non-mixing; where every sublayer mixes, each is a layer."""
        return mixing[i] and (not mixing[i - 1] or all(mixing))

    def _followed(self, layers: Sequence[Span], back: int) -> list[Span]:
        """The layers with those around them on the trunk, as far as all of them repeat."""
        lengths = {s.text: self._index(s.end) - self._index(s.start) for s in layers if s.start in self.chain}
        before = list(self._beyond(layers[0].start, -1, lengths, back))
        after = list(self._beyond(layers[-1].end, 1, lengths, back))
        return _repeating([*reversed(before), *layers, *after])

    def _beyond(self, point: fx.Node, step: int, lengths: Mapping[str, int], back: int) -> Iterator[Span]:
        """The layers on one side of a trunk point, nearest first; `lengths` are those of the known kinds."""
        if point not in self.chain:
            return
        at, kind = self._index(point), self.finder.trace.type_of(point)
        each = max(lengths.values()) == 1  # every sublayer is a layer
        begins = [i - back for i in range(back, len(self.spans)) if each or self._begins(self.mixing, i)]
        begins.append(len(self.spans))
        while True:
            known = [at + step * n for n in sorted(set(lengths.values()))]
            ends = [e for e in known if 0 <= e < len(self.chain) and self._between(at, e).text in lengths]
            ends += [b for b in begins[::step] if (b - at) * step > 0][:1]
            if not ends or self.finder.trace.type_of(self.chain[ends[0]]) != kind:
                return
            yield self._between(at, ends[0])
            at = ends[0]

    def _between(self, a: int, b: int) -> Span:
        return self.finder.span(self.chain[min(a, b)], self.chain[max(a, b)])

    def _index(self, point: fx.Node) -> int:
        return self.chain.index(point)


def _repeating(layers: Sequence[Span]) -> list[Span]:
    """The longest stretch of layers with parameters of which each occurs at least twice."""
    counts = Counter(layer.text for layer in layers)
    stretches = groupby(layers, lambda layer: counts[layer.text] > 1 and bool(layer.params))
    return max((list(group) for repeated, group in stretches if repeated), key=len, default=[])


def saved_by(run: Sequence[Span]) -> int:
    """The ops that a run's calls stand for, each call itself counted as one."""
    return sum(layer.weight - 1 for layer in run)


def _before(finder: SpanFinder, run: Sequence[Span], taken: Set[fx.Node]) -> list[Span]:
    """Layers before a run that are not spans of its trunk, nearest last.

    The input of a layer may be read again much later (a long skip, embeddings that every layer reads); then it is not
    on the trunk, and the layer is recognised by its kind alone.
    """
    kinds = {layer.text: layer for layer in run}.values()
    found: list[Span] = []
    while True:
        end = (found or run)[0].start
        layer = next((s for kind in kinds if (s := finder.like(kind, end)) and taken.isdisjoint(s.nodes)), None)
        if layer is None:
            return found
        found.insert(0, layer)
