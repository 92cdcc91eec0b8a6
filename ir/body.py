"""Body: a closed FX graph. Segments and blocks are both made of one.

Closed means that everything it needs is an input: values of the program, parameters, constants that differ between
the layers of a block, and the environment (`training`, `device`). Sizes are read off the inputs inside the body, so
the same body runs at any length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import fx

from depthc.ir import certificate
from depthc.ir.types import ValueType

InputKind = Literal["value", "param", "const", "env"]


@dataclass(frozen=True)
class Input:
    """One input of a body.

    `kind` is "value" (a value of the program), "param" (a parameter or buffer slot), "const" (a number that differs
    between the layers of a block) or "env" (`training`: bool, or `device`: the device the program runs on).
    """

    name: str
    kind: InputKind
    type: ValueType | None = None


class Body:
    """A closed FX graph of ATen ops. Do not change `graph` after construction.

    Every placeholder has `meta["input"]`, an `Input`. A node may have `meta["source"]`: the line of the user's model
    that made it, as "file.py:12 (code)".
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.placeholders: tuple[fx.Node, ...] = tuple(n for n in graph.nodes if n.op == "placeholder")
        self.inputs: tuple[Input, ...] = tuple(n.meta["input"] for n in self.placeholders)
        results = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
        assert isinstance(results, tuple | list)
        self.results: tuple[fx.Node, ...] = tuple(results)  # type: ignore[arg-type]

    def inputs_of(self, kind: InputKind) -> tuple[Input, ...]:
        """The inputs of one kind, in order."""
        return tuple(i for i in self.inputs if i.kind == kind)

    def placeholders_of(self, kind: InputKind) -> tuple[fx.Node, ...]:
        """The placeholders of one kind, in order."""
        return tuple(n for n in self.placeholders if n.meta["input"].kind == kind)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The operations, in execution order."""
        return tuple(n for n in self.graph.nodes if n.op == "call_function")

    @cached_property
    def certificate(self) -> str:
        """Two bodies compute the same function of their inputs, op for op, if their certificates are equal."""
        return certificate.of_body(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Body) and self.certificate == other.certificate

    def __hash__(self) -> int:
        return hash(self.certificate)

    def __deepcopy__(self, memo: object) -> Body:
        return self

    def arrange(
        self,
        values: Sequence[Any],
        params: Sequence[Any] = (),
        consts: Sequence[Any] = (),
        *,
        training: bool = False,
        device: torch.device | str = "cpu",
    ) -> list[Any]:
        """Actual inputs in placeholder order, from one sequence a kind."""
        env = {"training": training, "device": torch.device(device)}
        feeds = {"value": iter(values), "param": iter(params), "const": iter(consts)}
        return [env[i.name] if i.kind == "env" else next(feeds[i.kind]) for i in self.inputs]


def add_input(graph: fx.Graph, input: Input) -> fx.Node:
    """The placeholder of one more input."""
    node = graph.placeholder(input.name.replace(".", "_"))
    node.meta["input"] = input
    return node


def behind(ends: Iterable[fx.Node], stops: Set[fx.Node] = frozenset()) -> set[fx.Node]:
    """Everything that `ends` are computed from, and they; what `stops` are computed from is left out."""
    return reached(ends, lambda node: () if node in stops else node.all_input_nodes)


def reached(ends: Iterable[fx.Node], sources: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """All nodes that lead to `ends` by way of `sources`, and they."""
    found: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(sources(node))
    return found


def interpret(
    body: Body, inputs: Sequence[Any], observe: Callable[[fx.Node, Any], Any] | None = None
) -> tuple[Any, ...]:
    """Run a body node by node: what its graph means.

    Args:
        inputs: one a placeholder, in order (see `Body.arrange`).
        observe: called with every op node and its result; returns the result to go on with.
    """
    env: dict[fx.Node, Any] = dict(zip(body.placeholders, inputs, strict=True))
    for node in body.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        env[node] = observe(node, result) if observe else result
    return tuple(env[n] for n in body.results)
