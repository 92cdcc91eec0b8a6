"""Post-dominators of an op graph: the points through which everything passes on its way to the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import fx

Inputs = Callable[[fx.Node], Iterable[fx.Node]]


class PostDominators:
    """The post-dominator tree of the nodes that reach `root`.

    Args:
        nodes: all nodes in execution order.
        root: the result.
        inputs: the nodes whose data a node reads.
    """

    def __init__(self, nodes: Sequence[fx.Node], root: fx.Node, inputs: Inputs) -> None:
        self.root = root
        self.parent: dict[fx.Node, fx.Node] = {}
        self.depth: dict[fx.Node, int] = {root: 0}
        for node in reversed(nodes):
            if node in self.depth:
                if node is not root:
                    self.depth[node] = self.depth[self.parent[node]] + 1
                for source in inputs(node):
                    known = self.parent.get(source)
                    self.parent[source] = node if known is None else self._meet(known, node)
                    self.depth.setdefault(source, 0)

    def _meet(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """The nearest common post-dominator."""
        while a is not b:
            if self.depth[a] < self.depth[b]:
                a, b = b, a
            a = self.parent[a]
        return a

    def __contains__(self, node: fx.Node) -> bool:
        return node in self.depth

    def chain(self, node: fx.Node) -> list[fx.Node]:
        """From `node` to the root: the points through which everything that starts at `node` passes."""
        path = [node]
        while path[-1] is not self.root:
            path.append(self.parent[path[-1]])
        return path
