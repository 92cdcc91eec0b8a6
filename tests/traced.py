"""Layers as blocks in fp64, traced without an export, and inputs for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_aggregate

from depthc.ir.body import Body, Input
from depthc.ir.graph.size_nodes import SizeEmitter, source_of
from depthc.ir.program import Block
from depthc.ir.sizes import Size
from depthc.ir.types import Type

WIDTH, HEADS, BATCH, LENGTH, FOREIGN = 16, 2, 3, 11, 6
TRACED = {"b": 1009, "s": 2003, "t": 3001}  # sizes that no other number in a graph is a multiple of
HEAD = WIDTH // HEADS


NAMES = ("h", "mask", "memory", "cos", "sin", "distance", "place")


class Case(NamedTuple):
    """A block with its parameters, the names of its side inputs, and the layer that it was traced from."""

    block: Block
    params: list[Tensor]
    sides: list[str]
    layer: nn.Module

    def full(self, h: Tensor, **sides: Tensor) -> Tensor:
        """The layer on all tokens, run by PyTorch."""
        wanted = inspect.signature(self.layer.forward).parameters
        return self.layer(**{k: v for k, v in {"h": h, **sides}.items() if k in wanted})

    def pick(self, sides: Mapping[str, Tensor]) -> list[Tensor]:
        return [sides[name] for name in self.sides]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(batch: int = BATCH, length: int = LENGTH, foreign: int = FOREIGN) -> dict[str, Tensor]:
    """Everything that a layer may read. `mask` is causal and additive; finite, so that no row is empty."""
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    at = torch.arange(length)
    return {
        "h": draw(batch, length, WIDTH),
        "mask": torch.zeros(batch, 1, length, length, dtype=torch.float64).masked_fill(later, -1e30),
        "memory": draw(batch, foreign, WIDTH, seed=2),
        "cos": torch.cos(draw(length, HEAD, seed=3)),
        "sin": torch.sin(draw(length, HEAD, seed=3)),
        "distance": (at[:, None] - at[None, :]).clamp(-3, 3) + 3,
        "place": at,
    }


def block_cases(layers: Mapping[str, nn.Module]) -> dict[str, Case]:
    """Every layer as a block in fp64; all traced in one go, on fake tensors of unusual sizes: faster than an export."""
    model = _Together(layers).double().eval().requires_grad_(False)
    weights = dict(model.named_parameters())
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes = {name: mode.from_tensor(weight, static_shapes=True) for name, weight in weights.items()}
        feeds = inputs(*TRACED.values())
        run = make_fx(lambda w, *x: functional_call(model, w, x), pre_dispatch=True, record_stack_traces=True)
        graph = run(fakes, *feeds.values()).graph
    named = [
        *((name, weight, "param") for name, weight in weights.items()),
        *((k, v, "value") for k, v in feeds.items()),
    ]
    known = dict(zip((n for n in graph.nodes if n.op == "placeholder"), named, strict=True))
    (results,) = next(n for n in graph.nodes if n.op == "output").args
    return {name: _close(graph, node, known, layers[name]) for name, node in zip(layers, results, strict=True)}


class _Together(nn.Module):
    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, *values: Tensor) -> list[Tensor]:
        pool = dict(zip(NAMES, values, strict=True))
        wants = {name: inspect.signature(layer.forward).parameters for name, layer in self.layers.items()}
        return [layer(**{k: pool[k] for k in wants[name]}) for name, layer in self.layers.items()]


def _close(
    graph: fx.Graph, result: fx.Node, known: Mapping[fx.Node, tuple[str, Tensor, str]], layer: nn.Module
) -> Case:
    """The ops behind one result as a body: the hidden states are the carry, other inputs the sides."""
    needed, stack = set(), [result]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    read = [n for kind in ("value", "param") for n in known if n in needed and known[n][2] == kind]
    body, copies = fx.Graph(), {}
    places = {}
    for node in read:
        name, tensor, kind = known[node]
        copy = copies[node] = body.placeholder(name.replace(".", "_"))
        shape = tuple(map(_size, tensor.shape))
        copy.meta["input"] = Input(copy.name, kind, Type(tensor.dtype, shape))  # type: ignore[arg-type]
        for d, size in enumerate(shape):
            if isinstance(size, str):
                places.setdefault(size, (copy, d))
    device = body.placeholder("device")
    device.meta["input"] = Input("device", "env")
    emit = SizeEmitter(body, places)

    def argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return copies[value]
        if isinstance(value, torch.device):
            return device
        return emit.emit(_size(value)) if type(value) is int else value

    for node in graph.nodes:
        if node in needed and node.op == "call_function":
            args, kwargs = map_aggregate(node.args, argument), map_aggregate(node.kwargs, argument)
            copies[node] = body.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            copies[node].meta["source"] = source_of(node)
    body.output((copies[result],))
    if not device.users:
        body.erase_node(device)
    sides = [known[n][0] for n in read if known[n][2] == "value"]
    assert sides[0] == "h"
    return Case(Block("block", Body(body)), [known[n][1] for n in read if known[n][2] == "param"], sides[1:], layer)


def _size(number: int) -> Size:
    """A number of the traced graph over the size names: 2006018 is "b * s * 2"."""
    found = []
    for name, size in TRACED.items():
        while number % size == 0 and number:
            number //= size
            found.append(name)
    return " * ".join([*found, *([str(number)] if number != 1 else [])]) if found else number
