"""Compiling for a few rows, as a step of decoding has them: linear maps by a kernel that reads matrices at full speed.

Maps of the same rows, such as those to queries, keys and values, are one launch. Inductor compiles the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from operator import add, getitem
from typing import Any

import torch
from torch import Tensor, fx

from depthc.codegen.kernels.few_rows import FEW, MOST, applies

FEW_ROWS = torch.ops.depthc.few_rows.default
_ADD = (torch.ops.aten.add.Tensor, torch.add, add)
_LINEAR = (torch.ops.aten.linear.default, torch.nn.functional.linear)


def compiler(rows: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """torch.compile for functions without gradients; linear maps of so many rows by the kernel, where they are few."""
    return partial(torch.compile, backend=_inductor) if rows <= FEW else torch.compile


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
        matrices, *biases = zip(*(_weights(node) for node in maps), strict=True)
        added, ends = _residual(maps)
        with graph.graph.inserting_before(ends[0]):
            made = graph.graph.call_function(FEW_ROWS, (maps[0].args[0], list(matrices), list(*biases), added))
            parts = [graph.graph.call_function(getitem, (made, i)) for i in range(len(maps))]
        for node, part in zip(ends, parts, strict=True):
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
        for node in dict.fromkeys([*ends, *maps]):
            graph.graph.erase_node(node)
    graph.recompile()


def _residual(maps: list[fx.Node]) -> tuple[fx.Node | None, list[fx.Node]]:
    """What is added to the result of a map and nothing else is made of, and the sum; no such thing, and the maps."""
    user = next(iter(maps[0].users), None)
    if len(maps) > 1 or len(maps[0].users) != 1 or user is None or user.target not in _ADD or user.kwargs:
        return None, maps
    others = [n for n in user.args if n is not maps[0]]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None, maps
    x, y = (n.meta["example_value"] for n in (others[0], maps[0]))
    alike = isinstance(x, Tensor) and (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
    return (others[0], [user]) if alike and not _is_written(others[0]) else (None, maps)


def _siblings(graph: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """Linear maps that the kernel takes, those of the same rows together: all with a bias, or none."""
    found: dict[tuple[Any, int], list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in _LINEAR and _fits(node):
            found.setdefault((node.args[0], len(_weights(node))), []).append(node)
    for maps in found.values():
        yield from (maps[at : at + MOST] for at in range(0, len(maps), MOST))


def _fits(node: fx.Node) -> bool:
    """Whether the kernel takes a linear map, by weights that are there from the beginning."""
    rows, weights = node.args[0], _weights(node)
    if node.kwargs or any(n.op != "placeholder" for n in weights):
        return False
    x, *given = (n.meta["example_value"] for n in (rows, *weights))  # type: ignore[union-attr]
    known = all(isinstance(size, int) for size in x.shape)
    alike = node.meta["example_value"].dtype == x.dtype  # autocast knows the map, not the kernel
    return known and alike and not _is_written(rows) and applies(x, given[:1], given[1:]) is None


def _is_written(node: Any) -> bool:
    """Whether an op writes into a value: then others may not be moved past it."""
    return any(_writes(user.target) for user in node.users if user.op != "output")


def _writes(target: Any) -> bool:
    """Whether an op, or a method, is one that writes into what it is given."""
    schema = getattr(target, "_schema", None)
    return str(target).endswith("_") if schema is None else schema.is_mutable


def _weights(node: fx.Node) -> list[fx.Node]:
    """The matrix, and the bias if there is one."""
    return [n for n in node.args[1:] if isinstance(n, fx.Node)]
