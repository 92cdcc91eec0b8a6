"""Cones: what a value is computed from, and its value at sizes and arguments of one's choice.

A cone is evaluated through segments and bodies back to arguments, sizes and buffers, and nothing else is: no
embedding, no layer. Trained parameters in a cone are replaced by small random numbers, since what they hold today
says nothing about tomorrow; so a model on the meta device has cones as well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from depthc.ir import sizes
from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.ops import op_name
from depthc.ir.body import Body, reached
from depthc.ir.errors import StateDictError
from depthc.ir.evaluate import indexed
from depthc.ir.params import value_of
from depthc.ir.program import Block, Call, Loop, Merge, On, Op, Program, Segment, Select, Stack


class Unknown(Exception):
    """A value that cannot be had without running layers, or without weights that are not there."""


@dataclass(frozen=True, eq=False)
class Site:
    """One application of a body; `sources` says where its value inputs come from.

    A source is the name of an argument, a result of another site, or None where it is neither.
    """

    op: Segment | Call
    body: Body
    sources: tuple[Source, ...]
    params: tuple[str, ...]
    block: Block | None = None

    def origin(self, node: fx.Node) -> Any:
        """What a placeholder is bound to: a source, a parameter's name, a number; None for the environment."""
        kind = node.meta["input"].kind
        if kind == "env":
            return None
        bound = {"value": self.sources, "param": self.params, "const": getattr(self.op, "consts", ())}[kind]
        return bound[self.body.placeholders_of(kind).index(node)]


Source = str | tuple[Site, int] | None


def sites_of(program: Program) -> list[Site]:
    """Every application of a body in execution order, loops unrolled where their count is static."""
    names: dict[str, Source] = {leaf.name: leaf.name for leaf in program.signature.inputs if leaf.type is not None}
    found: list[Site] = []
    for item in program.body:
        found.extend(_walk(program, item.ops if isinstance(item, Stack) else (item,), names, {}))
    return found


def _walk(program: Program, ops: Sequence[Op], names: dict[str, Source], indices: Mapping[str, int]) -> Iterator[Site]:
    for op in ops:
        match op:
            case Segment() | Call():
                block = program.blocks[op.block] if isinstance(op, Call) else None
                body = op.body if isinstance(op, Segment) else program.blocks[op.block].body
                params = tuple(indexed(p, indices) for p in op.params)
                site = Site(op, body, tuple(names.get(r) for r in op.reads), params, block)
                names.update((name, (site, i)) for i, name in enumerate(op.writes))
                yield site
            case Loop():
                for index in range(sizes.evaluate(op.count, {}) if isinstance(op.count, int) else 1):
                    yield from _walk(program, op.body, names, {**indices, op.index: index})
            case On():  # positions keep their meaning on a subset, so what is classified is the whole
                inner = {name: names.get(name) for name in op.reads}
                yield from _walk(program, op.body, inner, indices)
                names.update((name, inner.get(name)) for name in op.writes)
            case Select() | Merge():
                names[op.write] = None


@dataclass
class Cone:
    """What a value depends on: data of arguments, and the integers that it is compared with or shifted by."""

    arguments: dict[str, None] = field(default_factory=dict)
    integers: set[int] = field(default_factory=set)


def inside(site: Site, wanted: Sequence[fx.Node], given: Mapping[fx.Node, Any] | frozenset[fx.Node]) -> set[fx.Node]:
    """The nodes of one body that `wanted` are computed from, up to those that are `given`."""
    return reached(wanted, lambda node: _read(node, given))


def _read(node: fx.Node, given: Mapping[fx.Node, Any] | frozenset[fx.Node]) -> set[fx.Node]:
    """The values that an op needs."""
    return set() if node in given or _reads_size(node) else set(node.all_input_nodes)


def _reads_size(node: fx.Node) -> bool:
    """Whether a node is a dimension of an input, which its type knows: the input's data are not needed."""
    return op_name(node) == "sym_size" and node.args[0].op == "placeholder"  # type: ignore[union-attr]


def cone_of(program: Program, site: Site, wanted: Sequence[fx.Node], given: frozenset[fx.Node] = frozenset()) -> Cone:
    """Follow values back to arguments.

    Raises:
        Unknown: the cone reaches what a layer computes from its tokens.
    """
    cone = Cone()
    _collect(program, site, wanted, given, cone, set())
    return cone


def _collect(
    program: Program, site: Site, wanted: Sequence[fx.Node], given: frozenset[fx.Node], cone: Cone, seen: set[Any]
) -> None:
    for node in inside(site, wanted, given) - given:
        if node.op != "placeholder":
            cone.integers.update(_integers(node))
            continue
        origin = site.origin(node)
        kind = node.meta["input"].kind
        if kind == "const":
            cone.integers.update(_lengths([origin]))
        elif kind == "param" and not trained(program, origin):
            cone.integers.update(_lengths(program.params[origin].type.shape))
        elif kind == "value" and isinstance(origin, str):
            cone.arguments[origin] = None
        elif kind == "value":
            source, index = _followed(origin)
            if (source, index) not in seen:
                seen.add((source, index))
                _collect(program, source, [source.body.results[index]], frozenset(), cone, seen)


def _followed(origin: Source) -> tuple[Site, int]:
    """The site and result behind a value.

    Raises:
        Unknown: it is made by a layer from its tokens, or by a token set.
    """
    if not isinstance(origin, tuple):
        raise Unknown("it depends on which tokens are selected")
    site, index = origin
    block = site.block
    if block is not None and (index < block.carries or site.body.results[index] in analyse(block).moving):
        raise Unknown(f"it is computed from the tokens in {block.name}")
    return site, index


# Their numbers are shapes or values to write; a token's place is never compared with them.
_NOT_COMPARED = {"view", "expand", "repeat", "masked_fill", "where", "full", "permute", "transpose"}
_ENDLESS = 2**31
_ADDED = 8192.0  # larger floats are the customary -10000 and its like, not places


def _integers(node: fx.Node) -> Iterator[int]:
    if op_name(node) not in _NOT_COMPARED:
        yield from _lengths(node.args)
        yield from _lengths(node.kwargs.values())


def _lengths(values: Any) -> Iterator[int]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _lengths(value)
        elif isinstance(value, int | float) and abs(value) < (_ENDLESS if isinstance(value, int) else _ADDED):
            yield math.ceil(abs(value))


def trained(program: Program, name: str) -> bool:
    """Whether a parameter is floating and takes gradients."""
    param = program.params[name]
    return param.kind == "parameter" and param.type.dtype.is_floating_point


class Evaluation:
    """Evaluates cones at one choice of sizes and arguments.

    Args:
        sizes: a value for every size name.
        arguments: a tensor for every argument that a cone reaches.
    """

    def __init__(self, program: Program, sizes: Mapping[str, int], arguments: Mapping[str, Tensor]) -> None:
        self.program, self.sizes, self.arguments = program, dict(sizes), arguments

    def values(
        self,
        site: Site,
        wanted: Sequence[fx.Node],
        given: Mapping[fx.Node, Any] | None = None,
        run: Callable[[fx.Node, Any, Any], Any] | None = None,
    ) -> list[Any]:
        """The values of some nodes of a site's body; what is not needed any more is freed on the way.

        Args:
            given: values to take instead of computing them.
            run: runs one op; its own target unless given.
        """
        given = given or {}
        needed = inside(site, wanted, given)
        left = Counter(source for node in needed for source in _read(node, given))
        left.update(wanted)
        env: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in site.body.graph.nodes:
                if node not in needed:
                    continue
                env[node] = given[node] if node in given else self._value(site, node, env, run)
                for source in _read(node, given):
                    left[source] -= 1
                    if not left[source]:
                        del env[source]
        return [env[n] for n in wanted]

    def _value(self, site: Site, node: fx.Node, env: Mapping[fx.Node, Any], run: Any) -> Any:
        if node.op == "placeholder":
            return self._input(site, node)
        if _reads_size(node):
            read, dim = node.args[0], node.args[1]
            shape = read.meta["input"].type.shape  # type: ignore[union-attr]
            return sizes.evaluate(shape[dim], self.sizes)
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        return run(node, args, kwargs) if run else node.target(*args, **kwargs)  # type: ignore[operator]

    def _input(self, site: Site, node: fx.Node) -> Any:
        origin, kind = site.origin(node), node.meta["input"].kind
        if kind == "env":
            return torch.device("cpu") if node.meta["input"].name == "device" else False
        if kind == "const":
            return origin
        if kind == "param":
            return self._param(origin)
        if isinstance(origin, str):
            return self.arguments[origin]
        source, index = _followed(origin)
        return self.values(source, [source.body.results[index]])[0]

    def _param(self, name: str) -> Tensor:
        param = self.program.params[name]
        if trained(self.program, name):
            generator = torch.Generator().manual_seed(len(name))
            return 0.1 * torch.randn(param.type.sizes({}), generator=generator).to(param.type.dtype)
        try:
            value = value_of(name, param, self.program.weights).detach()
        except StateDictError as error:
            raise Unknown(f"it needs the values of {name}") from error
        if value.is_meta:
            raise Unknown(f"it needs the values of {name}, which is on the meta device")
        return value.cpu()


class Choice:
    """Sizes that a program takes: its ranges and guards hold."""

    def __init__(self, program: Program) -> None:
        self.ranges, self.guards = program.signature.ranges, program.signature.guards

    def legal(self, values: Mapping[str, int]) -> bool:
        """Whether the captured graph is the model at these sizes, as far as guards tell."""
        return all(sizes.evaluate(g, values) for g in self.guards if sizes.names(sizes.read(g)) <= values.keys())

    def near(self, name: str | None, length: int, fixed: Mapping[str, int]) -> dict[str, int]:
        """Sizes with `name` at most `length`, as close to it as legal; the others are small and all different.

        Raises:
            Unknown: there are none.
        """
        rest = [n for n in self.ranges if n != name and n not in fixed]
        others = {n: self.clip(n, 23 + 6 * i) for i, n in enumerate(rest)}
        if name is None:
            return {**others, **fixed}
        for other in (True, False):  # first different lengths, then, if guards tie them, the same ones
            for value in range(self.clip(name, length), 1, -1):
                values = {**(others if other else dict.fromkeys(rest, value)), **fixed, name: value}
                if self.legal(values):
                    return values
        raise Unknown("no sizes satisfy the guards of the captured graph")

    def clip(self, name: str, value: int) -> int:
        """The size within the range of `name` that is closest to `value`."""
        low, high = self.ranges[name]
        return max(low, value if high is None else min(value, high))
