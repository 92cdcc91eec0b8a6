"""Layers are found by structure: which ops belong to which layer of which stack, in shapes that models really have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import depthc
from depthc.ir.graph.trace import Trace, trace
from depthc.ir.outline.outline import outline
from depthc.ir.program import Call, Loop, Program, Segment, calls

from .models import (
    WIDTH,
    Attention,
    Chain,
    Layer,
    Mlp,
    Residual,
    Spec,
    Stacked,
    assert_lowered,
    assert_same,
    carries,
    ids,
    layer_outputs,
    outputs,
    seeded,
    states,
)


def outlined(model: nn.Module, *args: Tensor, depths: tuple[int, ...]) -> Program:
    """The program of a model, after all checks that hold whatever its layers are."""
    compiled = depthc.compile(model, args=args)
    program = compiled.program
    assert program.depths == depths
    assert_same(outputs(program.run, *args), outputs(model, *args))
    assert_lowered(compiled, model, *args)
    assert depthc.parse(str(program)) == program
    return program


def sequence(program: Program) -> list[str]:
    """The block of every layer, in execution order."""
    return [call.block for stack in program.stacks for call, times in calls(stack.ops) for _ in range(times)]


def owners(program: Program) -> list[set[str]]:
    """The modules whose parameters each layer reads, as the first two parts of their names."""
    found = [call for stack in program.stacks for call, _ in calls(stack.ops)]
    return [{".".join(name.split(".")[:2]) for name in call.params} for call in found]


@pytest.mark.slow
def test_one_module_applied_several_times_is_a_loop() -> None:
    program = outlined(seeded(lambda: Stacked(Spec(shared="all", depth=4))), ids(), depths=(4,))
    (stack,) = program.stacks
    (loop,) = stack.ops
    assert isinstance(loop, Loop)
    assert (loop.count, len(loop.body)) == (4, 1)
    assert len(program.blocks) == 1


def test_loop_whose_states_are_read_is_unrolled() -> None:
    model = seeded(lambda: Stacked(Spec(shared="all", depth=3, returns="states")))
    program = outlined(model, ids(), depths=(3,))
    assert len(program.blocks) == 1
    assert len({call.params for call in program.stacks[0].ops if isinstance(call, Call)}) == 1


@pytest.mark.slow
def test_hybrid_of_three_kinds_with_a_partial_tail() -> None:
    model = seeded(lambda: Stacked(Spec(attention=("causal", "plain", "grouped"), depth=7)))
    program = outlined(model, ids(), depths=(7,))
    kinds = sequence(program)
    assert len(program.blocks) == 3
    assert kinds == [*kinds[:3], *kinds[:3], kinds[0]]
    assert owners(program) == [{f"layers.{i}"} for i in range(7)]


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.mlp = nn.Linear(WIDTH, WIDTH), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x) * self.gate(x).sigmoid()


class Inner(nn.Module):
    """A layer that loops inside: that its steps repeat does not make them layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.step, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        for _ in range(5):
            y = y + torch.tanh(self.step(y))
        return x + self.out(y)


class Listed(nn.Module):
    """Layers of any kinds in a row."""

    def __init__(self, *kinds: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_two_runs_in_a_row_are_one_stack() -> None:
    program = outlined(seeded(lambda: Listed(*[Residual] * 3, *[Wide] * 2)), states(), depths=(5,))
    assert len(program.blocks) == 2
    assert owners(program) == [{f"layers.{i}"} for i in range(5)]


def test_lone_first_and_last_layers_stay_segments() -> None:
    program = outlined(seeded(lambda: Listed(Wide, *[Residual] * 3, Gated)), states(), depths=(3,))
    first, stack, last = program.body
    assert isinstance(first, Segment)
    assert isinstance(last, Segment)
    assert stack in program.stacks
    assert any(name.startswith("layers.0") for name in first.params)
    assert any(name.startswith("layers.4") for name in last.params)


# several towers


class Cross(nn.Module):
    """A decoder layer: self-attention, cross-attention, MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.own, self.mlp = Attention(), Mlp()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.own(self.norms[0](x))
        k, v = self.kv(memory).chunk(2, -1)
        mixed = F.scaled_dot_product_attention(*(t[:, None] for t in (self.q(self.norms[1](x)), k, v)))
        x = x + self.out(mixed[:, 0])
        return x + self.mlp(self.norms[2](x))


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Layer(Spec()) for _ in range(2))
        self.decoder = nn.ModuleList(Cross() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.encoder:
            source = layer(source)
        memory = self.norm(source)
        for layer in self.decoder:
            target = layer(target, memory)
        return target, memory


@pytest.mark.slow
def test_encoder_comes_before_its_decoder() -> None:
    args = states(2, 7), states(2, 5, seed=1)
    program = outlined(seeded(EncoderDecoder), *args, depths=(2, 3))
    assert owners(program) == [*({f"encoder.{i}"} for i in range(2)), *({f"decoder.{i}"} for i in range(3))]


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Chain(3), Listed(Wide, Wide)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.left(x).mean(1) @ self.right(y).mean(1).T


def test_two_towers() -> None:
    program = outlined(seeded(TwoTowers), states(2, 5), states(3, 6, seed=1), depths=(3, 2))
    assert owners(program) == [*[{"left.layers"}] * 3, *[{"right.layers"}] * 2]


# what crosses layers


class SharedBlock(nn.Module):
    """A shared attention block, which also reads the embeddings, before every second layer (as in Zamba)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Wide() for _ in range(6))
        self.join, self.attention = nn.Linear(2 * WIDTH, WIDTH), Attention()

    def forward(self, x: Tensor) -> Tensor:
        first = x = x * 2
        for index, layer in enumerate(self.layers):
            if index % 2:
                x = x + self.attention(self.join(torch.cat([x, first], -1)))
            x = layer(x)
        return x


def test_shared_block_that_reads_the_embeddings() -> None:
    model = seeded(SharedBlock)
    program = depthc.capture(model, (states(),))
    assert sum(program.depths) >= 3
    read = [name for call, _ in calls(program.stacks[0].ops) for name in call.params]
    assert read.count("attention.q.weight") == 3
    assert_same(outputs(program.run, states(3, 7)), outputs(model, states(3, 7)))


class LongSkips(nn.Module):
    """Each layer of the second half also reads the output of its mirror image in the first half (as in U-ViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = Chain(3).layers, Chain(3).layers
        self.joins = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(3))
        self.embed = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.embed(x), []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        x = torch.tanh(x)
        for join, layer in zip(self.joins, self.up, strict=True):
            x = layer(join(torch.cat([x, skips.pop()], -1)))
        return x


def test_long_skips() -> None:
    outlined(seeded(LongSkips), states(), depths=(3, 3))


class ReturnsWeights(nn.Module):
    """Layers that return their attention weights too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)]) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        weights = []
        for norm, linear in self.layers:
            y = linear(norm(x))
            weights.append((y @ y.transpose(1, 2)).softmax(-1))
            x = x + weights[-1] @ y
        return x, tuple(weights)


class Sliced(Chain):
    """Every layer reads its own slice of one projection, which the last of them could claim for itself."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)
        self.slices = nn.Linear(WIDTH, depth * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        slices = self.slices(x).unflatten(-1, (len(self.layers), WIDTH))
        for i, layer in enumerate(self.layers):
            x = layer(x) * slices[:, :, i]
        return x


def test_what_all_layers_read_belongs_to_none() -> None:
    program = outlined(seeded(Sliced), states(), depths=(3,))
    assert len(program.blocks) == 1
    assert all(not name.startswith("slices") for layer in owners(program) for name in layer)


class Banded(nn.Module):
    """A layer that makes its mask from the length alone."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.norm, self.offset = nn.LayerNorm(WIDTH), offset

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril(self.offset)
        y = self.norm(x)[:, None]
        return x + F.scaled_dot_product_attention(y, y, y, mask)[:, 0]


@pytest.mark.parametrize("offsets", [(0, 0, 0), (0, 1, 2)])
def test_layers_that_make_their_masks(offsets: Sequence[int]) -> None:
    program = outlined(seeded(lambda: nn.Sequential(*map(Banded, offsets))), states(), depths=(3,))
    assert len(program.blocks) == 1


def test_values_that_leave_a_layer() -> None:
    program = outlined(seeded(ReturnsWeights), states(), depths=(3,))
    assert len(program.blocks) == 1
    assert {len(call.writes) for call, _ in calls(program.stacks[0].ops)} == {2}


def test_loops_inside_layers_are_not_layers() -> None:
    program = outlined(seeded(lambda: Listed(*[Inner] * 3)), states(), depths=(3,))
    assert len(program.blocks) == 1


# the order of the trace


def shuffled(traced: Trace, seed: int) -> Trace:
    """The same trace with its ops in another legal order."""
    draw, graph, copies = random.Random(seed), fx.Graph(), {}
    waiting = list(traced.graph.nodes)
    while waiting:
        ready = [n for n in waiting if all(i in copies for i in n.all_input_nodes)]
        first = [n for n in ready if n.op == "placeholder"] or [n for n in ready if n.op != "output"] or ready
        node = first[0] if first[0].op == "placeholder" else draw.choice(first)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        waiting.remove(node)
    return replace(traced, graph=graph)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "args"),
    [
        (lambda: Stacked(Spec(attention=("causal", "plain"), depth=5, sides=("rotary",))), (ids(),)),
        (EncoderDecoder, (states(2, 7), states(2, 5, seed=1))),
        (LongSkips, (states(),)),
    ],
    ids=["hybrid", "encoder-decoder", "long skips"],
)
def test_order_of_the_trace_does_not_matter(model: Any, args: tuple) -> None:
    def found(traced: Trace) -> list[list[tuple[str, Sequence[str]]]]:
        return [[(layer.text, layer.params) for layer in tower.layers] for tower in outline(traced)]

    traced = trace(seeded(model), args, {})
    expected = sorted(found(traced))
    for seed in range(3):
        assert sorted(found(shuffled(traced, seed))) == expected


def test_layers_return_what_the_modules_do() -> None:
    model = seeded(lambda: Listed(Residual, Residual, Wide, Wide, Wide))
    program = outlined(model, states(), depths=(5,))
    assert_same(carries(program, states(3, 6)), layer_outputs(model, model.layers, states(3, 6)))


def test_outputs_that_no_layer_makes() -> None:
    """A part of the model that reads nothing but the device, before anything else."""

    class Constant(Chain):
        def forward(self, x: Tensor) -> Any:
            return x, super().forward(x), torch.ones(3, device=x.device), x

    outlined(seeded(lambda: Constant(3)), states(), depths=(3,))
