"""Calls of torch functions and methods as ATen ops.

Calls that are alike (one function of arguments of the same types) are traced once, so the time hardly grows with the
depth of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from depthc.ir.certificate import argument_text
from depthc.ir.errors import CaptureError
from depthc.ir.graph.export import mutates
from depthc.ir.graph.size_nodes import source_of


@dataclass(frozen=True)
class Call:
    """A call as ATen ops.

    Attributes:
        operands: the nodes among its arguments.
        template: its ops, as a graph over the operands.
        structure: that of its result.
    """

    operands: tuple[fx.Node, ...]
    template: fx.GraphModule
    structure: pytree.TreeSpec

    @property
    def changes(self) -> bool:
        """Whether it writes to an operand."""
        return any(mutates(n.target) for n in self.template.graph.nodes)

    @property
    def results(self) -> Sequence[Any]:
        """The leaves of its result: nodes of the template, and numbers."""
        return next(iter(reversed(self.template.graph.nodes))).args[0]  # type: ignore[return-value]

    def copy(self, graph: fx.Graph, constant: Callable[[fx.GraphModule, fx.Node], fx.Node]) -> Mapping[Any, fx.Node]:
        """Add its ops to a graph that has its operands; returns what became of the template's nodes.

        Args:
            constant: the node of a tensor that the template holds.
        """
        copies: dict[Any, fx.Node] = {}
        feed = iter(self.operands)
        for n in self.template.graph.nodes:
            if n.op == "placeholder":
                copies[n] = next(feed)
            elif n.op == "get_attr":
                copies[n] = constant(self.template, n)
            elif n.op == "call_function":
                copies[n] = graph.node_copy(n, copies.__getitem__)
                copies[n].meta = {"val": n.meta["val"]}
        return copies


class Calls:
    """Traces calls, each kind once."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._made: dict[str, tuple[fx.GraphModule, pytree.TreeSpec]] = {}

    def call(self, node: fx.Node, args: Any, kwargs: Mapping[str, Any]) -> Call:
        """The call of a node, whose nodes among the arguments are of the graph that it will be copied into.

        Raises:
            CaptureError: it does not trace, or returns nothing.
        """
        operands: dict[fx.Node, str] = {}

        def operand(n: fx.Node) -> str:
            return operands.setdefault(n, f"%{len(operands)}:{_text(n.meta['val'])}")

        target: Any = node.target
        name = target if isinstance(target, str) else f"{target.__module__}.{target!r}"
        key = f"{name}{argument_text(args, operand)}{argument_text(sorted(kwargs.items()), operand)}"
        if key not in self._made:
            self._made[key] = self._traced(node, args, kwargs, tuple(operands))
        return Call(tuple(operands), *self._made[key])

    def _traced(
        self, node: fx.Node, args: Any, kwargs: Mapping[str, Any], operands: Sequence[fx.Node]
    ) -> tuple[fx.GraphModule, pytree.TreeSpec]:
        structures: list[pytree.TreeSpec] = []
        target: Any = node.target

        def run(*given: Any) -> list[Any]:
            own, named = fx.map_arg((args, dict(kwargs)), dict(zip(operands, given, strict=True)).__getitem__)
            method = node.op == "call_method"
            out = getattr(own[0], target)(*own[1:], **named) if method else target(*own, **named)
            leaves, structure = pytree.tree_flatten(out)
            structures.append(structure)
            return leaves

        try:
            with self.mode, torch.no_grad():
                # tensors of their own: calls that are alike share the examples of their results
                values = [v.detach() if isinstance(v := n.meta["val"], Tensor) else v for n in operands]
                made = make_fx(run, pre_dispatch=True)(*values)
        except Exception as error:  # whatever an op may raise
            first = str(error).strip().split("\n", 1)[0]
            refuse(f"{target} does not trace: {type(error).__name__}: {first}", node)
        made_call = Call(tuple(operands), made, structures[-1])
        if all(leaf is None for leaf in made_call.results) and not made_call.changes:
            refuse(f"{target} returns nothing", node, "functions without side effects")
        return made, structures[-1]


def _text(value: Any) -> str:
    """What of an operand the ops of a call depend on."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.device}"
    return f"{type(value).__name__} {value}"


def refuse(what: str, node: fx.Node | None = None, expected: str = "") -> NoReturn:
    """Raise the error of a graph of Dynamo that has no canonical form."""
    raise CaptureError(
        f"the graph of torch.compile cannot be rewritten: {what}",
        where=source_of(node) if node is not None else "",
        expected=expected,
        remedy="leave the recipe out, and Inductor compiles the graph as it is; or use depthc.compile(model, recipe)",
    )
