"""Outline: find the layers of a captured graph by structure alone.

The trunk is a chain of post-dominators: points through which everything passes. The spans between them are compared
by certificate; the stretch of equal periods that covers the most ops is a run of layers. What remains is searched
again, so encoders, second towers and runs of another kind are found in turn. No name is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from depthc.ir.body import reached
from depthc.ir.dominators import PostDominators
from depthc.ir.errors import OutlineError
from depthc.ir.graph.trace import Trace
from depthc.ir.outline.runs import find_runs, saved_by
from depthc.ir.outline.spans import Span, SpanFinder, data_inputs, is_data

_HEADS = 32  # the residual stream starts early: trunks from later heads are their tails


@dataclass(frozen=True, eq=False)
class Tower:
    """Layers that follow each other without a gap: what becomes a stack."""

    layers: tuple[Span, ...]

    @property
    def nodes(self) -> set[fx.Node]:
        """All ops of the layers."""
        return {n for layer in self.layers for n in layer.nodes}


def outline(trace: Trace) -> tuple[Tower, ...]:
    """The towers of repeated layers, in execution order.

    Raises:
        OutlineError: no layer repeats.
    """
    order = {n: i for i, n in enumerate(trace.graph.nodes) if n.op != "output"}
    search = _Search(trace, order)
    for root in search.roots():
        search.below(root)
    for tower in search.towers:  # grows: what leads into a tower, though long skips may lead past it
        search.below(tower.layers[0].start)
    if not search.towers:
        raise OutlineError(
            "the model has no repeated layers",
            where=trace.where or trace.name,
            expected="at least two layers with the same ops and parameter shapes in a row",
            found=f"{len(order)} ops without a repeated stretch",
            remedy="give it two equal layers; what differs between them must be parameters, constants or side inputs",
        )
    return tuple(sorted(search.towers, key=lambda t: order[t.layers[0].end]))


class _Search:
    def __init__(self, trace: Trace, order: dict[fx.Node, int]) -> None:
        self.trace, self.order = trace, order
        self.towers: list[Tower] = []
        self.covered: set[fx.Node] = set()
        self.reads = {n: data_inputs(n) for n in order}
        self.live = self._depends_on_arguments()

    def roots(self) -> list[fx.Node]:
        """The outputs, the one with most ops behind it first."""
        output = next(n for n in reversed(self.trace.graph.nodes) if n.op == "output")
        sizes = {n: len(self._behind(n)) for n in output.all_input_nodes if is_data(n)}
        return sorted(sizes, key=lambda n: (-sizes[n], self.order[n]))

    def _behind(self, node: fx.Node) -> set[fx.Node]:
        """All data nodes that a node depends on, itself included."""
        return reached([node], self.reads.__getitem__)

    def _depends_on_arguments(self) -> set[fx.Node]:
        live: set[fx.Node] = set()
        for node in self.order:
            if is_data(node) and ("value" in node.meta or any(n in live for n in self.reads[node])):
                live.add(node)
        return live

    def below(self, root: fx.Node) -> None:
        """Add the towers on the chains that lead to `root`, longest coverage first."""
        tree = PostDominators(list(self.order), root, self.reads.__getitem__)
        finder = SpanFinder(self.trace, tree, self.order)
        while True:
            best: list[list[Span]] = []
            for any_type in (False, True):  # what the deepest chain carries is most often the residual stream
                trunks = self._trunks(tree, any_type)
                best = best or max((find_runs(finder, t, self.covered) for t in trunks), key=_coverage, default=[])
            if not best:
                return
            for tower in _join(best):
                self.towers.append(tower)
                self.covered |= tower.nodes

    def _trunks(self, tree: PostDominators, any_type: bool) -> Iterator[list[fx.Node]]:
        """Chains to search, uncovered part only: from the deepest node, then from what is of the type that it carries.

        With `any_type`, from all nodes.
        """
        free = [n for n in self.live if n in tree and n not in self.covered]
        if not free:
            return
        leaf = max(free, key=lambda n: (self._free_depth(tree, n), -self.order[n]))
        kinds = Counter(str(self.trace.type_of(n)) for n in tree.chain(leaf))
        stream = kinds.most_common(1)[0][0]
        behind = self._behind(leaf) & self.live - self.covered
        others = sorted(free if any_type else behind, key=self.order.__getitem__)
        heads = [leaf, *(n for n in others if any_type or str(self.trace.type_of(n)) == stream)]
        seen: set[fx.Node] = set()
        for _ in range(_HEADS):
            head = next((n for n in heads if n not in seen), None)
            if head is None:
                return
            chain = tree.chain(head)
            seen.update(chain)
            stop = next((i for i, n in enumerate(chain) if n in self.covered), len(chain))
            yield chain[:stop]

    def _free_depth(self, tree: PostDominators, node: fx.Node) -> int:
        """Points on the chain of a node before it meets a tower."""
        count = 0
        while node not in self.covered and node is not tree.root:
            node = tree.parent[node]
            count += 1
        return count


def _coverage(runs: Sequence[Sequence[Span]]) -> int:
    return sum(map(saved_by, runs))


def _join(runs: Sequence[Sequence[Span]]) -> list[Tower]:
    """Runs that follow each other without a gap are one tower."""
    joined: list[list[Span]] = []
    for run in runs:
        if joined and joined[-1][-1].end is run[0].start:
            joined[-1].extend(run)
        else:
            joined.append(list(run))
    return [Tower(tuple(layers)) for layers in joined]
