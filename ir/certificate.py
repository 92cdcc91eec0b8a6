"""Certificates: text that is equal exactly when two rooted graphs are.

The graph is walked depth first from its ordered results along ordered arguments, so equal text is an isomorphism,
and the order in which boundary nodes are met binds the inputs of one graph to those of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from depthc.ir.body import Body


def operands(node: fx.Node) -> Iterator[Any]:
    """The arguments of a node in canonical order: positional, then keywords by name; containers flattened."""

    def flat(arg: Any) -> Iterator[Any]:
        if isinstance(arg, list | tuple):
            for item in arg:
                yield from flat(item)
        elif isinstance(arg, slice):
            yield from (x for x in (arg.start, arg.stop, arg.step))
        else:
            yield arg

    yield from flat(node.args)
    for name in sorted(node.kwargs):
        yield from flat(node.kwargs[name])


def linearize(roots: Sequence[Any], is_leaf: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """All nodes that `roots` depend on, leaves included, in depth-first post-order; leaves are not entered."""
    order: dict[fx.Node, None] = {}
    stack: list[tuple[fx.Node, bool]] = [(r, False) for r in reversed(roots) if isinstance(r, fx.Node)]
    while stack:
        node, done = stack.pop()
        if done:
            order.setdefault(node)
        elif node not in order:
            if is_leaf(node):
                order[node] = None
                continue
            stack.append((node, True))
            inner = [a for a in operands(node) if isinstance(a, fx.Node) and a not in order]
            stack.extend((a, False) for a in reversed(inner))
    return list(order)


def argument_text(arg: Any, name: Callable[[fx.Node], str], number: Callable[[float], str] = repr) -> str:
    """An argument as text: nodes by `name`, floats by `number`, everything else by its repr."""
    if isinstance(arg, fx.Node):
        return name(arg)
    if isinstance(arg, list | tuple):
        return "[" + ",".join(argument_text(a, name, number) for a in arg) + "]"
    if isinstance(arg, slice):
        return f"{argument_text(arg.start, name)}:{argument_text(arg.stop, name)}:{argument_text(arg.step, name)}"
    return number(arg) if type(arg) is float else repr(arg)


def node_text(node: fx.Node, name: Callable[[fx.Node], str], number: Callable[[float], str] = repr) -> str:
    """One op application as text."""
    args = [argument_text(a, name, number) for a in node.args]
    args += [f"{k}={argument_text(node.kwargs[k], name, number)}" for k in sorted(node.kwargs)]
    return f"{target_name(node.target)}({','.join(args)})"


def target_name(target: Any) -> str:
    """`aten.linear.default`, `_operator.mul`."""
    return str(target) if hasattr(target, "_schema") else f"{target.__module__}.{target.__name__}"


def of_body(body: Body) -> str:
    """The certificate of a body: its inputs by kind, in order, with their types, and its ops.

    Values, parameters and constants are bound by kind, so how the kinds are interleaved does not matter.
    """
    numbers: dict[fx.Node, str] = {}
    lines: list[str] = []
    for kind in ("value", "param", "const", "env"):
        for k, node in enumerate(body.placeholders_of(kind)):
            info = node.meta["input"]
            numbers[node] = info.name if kind == "env" else f"{kind}{k}"
            lines += [f"{numbers[node]}:{info.type}"] if kind != "env" else []
    for node in linearize(body.results, lambda n: n.op == "placeholder"):
        if node not in numbers:
            numbers[node] = f"n{len(lines)}"
            lines.append(f"{numbers[node]}={node_text(node, numbers.__getitem__)}")
    lines.append("return " + argument_text(list(body.results), numbers.__getitem__))
    return "\n".join(lines)
