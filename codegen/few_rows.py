"""Compiling for a few rows, as a step of decoding has them: linear maps by a kernel that reads matrices at full speed.

Maps of the same rows, such as those to queries, keys and values, are one launch. Inductor compiles the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import add, getitem
from typing import Any

import torch
from torch import Tensor, fx

from depthc.codegen.kernels.few_rows import MOST, applies

FEW_ROWS = torch.ops.depthc.few_rows.default
_ADD = (torch.ops.aten.add.Tensor, torch.add, add)
_LINEAR = (torch.ops.aten.linear.default, torch.nn.functional.linear)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function without gradients by torch.compile, linear maps of few rows by the kernel."""
    return torch.compile(function, backend=_inductor)


def _inductor(graph: fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    gathered(graph)
    # Such kernels take as long as their launch does: those that do not wait for each other become one.
    return compile_fx(graph, examples, config_patches={"combo_kernels": True})  # type: ignore[return-value]


def gathered(graph: fx.GraphModule) -> None:
    """Put the kernel in the place of linear maps of few rows, one launch for those of the same rows.

    Maps move to the first of those, or to the sum that follows; where what they read is written over, they stay.
    """
    for maps in list(_siblings(graph)):
        one = maps[0]
        matrices, biases = [n for m in maps for n in m.matrices], [n for m in maps for n in m.biases]
        added, ends = _residual(maps)
        with graph.graph.inserting_before(ends[0]):
            given = (one.rows, matrices, biases, added, one.sections)
            made = graph.graph.call_function(FEW_ROWS, given)
            parts = [graph.graph.call_function(getitem, (made, i)) for i in range(len(maps))]
        for node, part in zip(ends, parts, strict=True):
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
        for node in dict.fromkeys([*ends, *(n for m in maps for n in m.nodes)]):
            graph.graph.erase_node(node)
    graph.recompile()


@dataclass(frozen=True)
class _Map:
    """A linear map, or several of which each takes its section of the rows.

    Attributes:
        nodes: that compute it; the first one is its result, the last one reads the rows.
    """

    nodes: tuple[fx.Node, ...]
    matrices: tuple[fx.Node, ...]
    biases: tuple[fx.Node, ...]
    sections: int = 1

    @property
    def rows(self) -> fx.Node:
        """What it reads now: other maps are replaced meanwhile."""
        return self.nodes[-1].args[0]  # type: ignore[return-value]


def _maps(graph: fx.GraphModule) -> Iterator[_Map]:
    """The linear maps of a graph that the kernel may take."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.kwargs:
            continue
        if node.target in _LINEAR:
            matrix, *bias = (n for n in node.args[1:] if isinstance(n, fx.Node))
            yield _Map((node,), (matrix,), tuple(bias))
        elif node.target is FEW_ROWS and len(node.users) == 1 and len(node.args) == 5:
            (result,), (_, matrices, biases, added, sections) = node.users, node.args
            if added is None and len(matrices) == sections and result.target is getitem:  # one map
                yield _Map((result, node), tuple(matrices), tuple(biases), sections)


def _residual(maps: list[_Map]) -> tuple[fx.Node | None, list[fx.Node]]:
    """What is added to the result of a map and nothing else is made of, and the sum; no such thing, and the results."""
    results = [one.nodes[0] for one in maps]
    user = next(iter(results[0].users), None)
    if len(maps) > 1 or len(results[0].users) != 1 or user is None or user.target not in _ADD or user.kwargs:
        return None, results
    others = [n for n in user.args if n is not results[0]]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None, results
    x, y = (n.meta["example_value"] for n in (others[0], results[0]))
    alike = isinstance(x, Tensor) and (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
    return (others[0], [user]) if alike and not _is_written(others[0]) else (None, results)


def _siblings(graph: fx.GraphModule) -> Iterator[list[_Map]]:
    """Linear maps that the kernel takes, those of the same rows together: all with a bias, or none."""
    found: dict[tuple[Any, ...], list[_Map]] = {}
    for one in _maps(graph):
        if _fits(one):
            found.setdefault((one.rows, one.sections, bool(one.biases)), []).append(one)
    for maps in found.values():
        yield from (maps[at : at + MOST] for at in range(0, len(maps), MOST))


def _fits(one: _Map) -> bool:
    """Whether the kernel takes a linear map, by weights that are there from the beginning."""
    if any(n.op != "placeholder" for n in (*one.matrices, *one.biases)):
        return False
    x, y = (n.meta["example_value"] for n in (one.rows, one.nodes[0]))
    matrices, biases = ([n.meta["example_value"] for n in each] for each in (one.matrices, one.biases))
    known = all(isinstance(size, int) for size in x.shape)
    alike = y.dtype == x.dtype  # autocast knows the map, not the kernel
    return known and alike and not _is_written(one.rows) and applies(x, matrices, biases, one.sections) is None


def _is_written(node: Any) -> bool:
    """Whether an op writes into a value: then others may not be moved past it."""
    return any(_writes(user.target) for user in node.users if user.op != "output")


def _writes(target: Any) -> bool:
    """Whether an op, or a method, is one that writes into what it is given."""
    schema = getattr(target, "_schema", None)
    return str(target).endswith("_") if schema is None else schema.is_mutable
