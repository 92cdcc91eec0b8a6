"""route and generate: what is refused, with a remedy; scores that are no numbers; sequences continued."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import depthc
from depthc.codegen.module import DepthModule
from depthc.ir.errors import InputError, RecipeError, RoutingError

from .models import Attention, Spec, Stacked, ids, seeded, stack_program, states


@pytest.fixture(scope="module")
def routed() -> DepthModule:
    return depthc.compile(stack_program(8), "mor", std=1.0)


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"capacities": (1.0, 0.0, 0.5)}, "no capacities", "capacities="),
        ({"capacities": (1.0, 1.5, 0.5)}, "no capacities", "capacities="),
        ({"capacities": (1.0, 0.3, 0.5)}, "no capacities", "capacities="),
        ({"capacities": (1.0, 0.5)}, "do not fit the loop", "one capacity a recursion"),
        ({"kv": "share_first", "capacities": (0.9, 0.5, 0.3)}, "recursion 0", "begin with 1.0"),
        ({"kv": "share_first", "norms": "per_depth"}, "tied in all parameters", "tied"),
        ({"kv": "shared"}, "'kv'", "share_first"),
        ({"combine": "sum"}, "'combine'", "use"),
        ({"gate": "softmax"}, "'gate'", "use"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        depthc.compile(stack_program(8), "mor", **options)  # type: ignore[arg-type]
    assert remedy in caught.value.remedy


def test_layers_that_are_not_tied_have_no_loop() -> None:
    with pytest.raises(RecipeError, match="no loop to route") as caught:
        depthc.compile(stack_program(8), "route")
    assert "tie" in caught.value.remedy


class Returning(nn.Module):
    """Every layer's result is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(4))

    def forward(self, h: Tensor) -> list[Tensor]:
        results = []
        for layer in self.layers:
            h = h + layer(h)
            results.append(h)
        return results


def test_layers_whose_results_are_read_elsewhere_form_no_loop() -> None:
    with pytest.raises(RecipeError, match="form no loop") as caught:
        depthc.compile(seeded(Returning), "tie(loops=2) | route()", args=(torch.randn(2, 5, 8),))
    assert "read behind the next layer" in caught.value.found


class Mixer(nn.Module):
    """A layer that mixes tokens by a convolution or a scan."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.linear = kind, nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        if self.kind == "convolution":
            return h + self.conv(h.transpose(1, 2)).transpose(1, 2)
        return h + self.linear(h).cumsum(1)


class Mixing(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(13, 8), nn.ModuleList(Mixer(kind) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return h


@pytest.mark.parametrize(
    ("kind", "op", "line"),
    [("convolution", "conv1d", "self.conv(h"), ("scan", "cumsum", "self.linear(h).cumsum(1)")],
)
def test_layers_that_mix_tokens_are_refused_with_the_models_line(kind: str, op: str, line: str) -> None:
    with pytest.raises(RecipeError, match="cannot run on a subset") as caught:
        depthc.compile(Mixing(kind), "tie(loops=2) | route()", args=(ids(),))
    assert op in caught.value.found
    assert "test_route.py" in caught.value.where
    assert line in caught.value.where
    assert caught.value.remedy


def test_an_example_of_one_sequence_is_refused_with_the_way_out() -> None:
    """Export takes a batch of one for a number: such a program has no batch to select in."""
    with pytest.raises(RecipeError, match="another layout") as caught:
        depthc.compile(seeded(lambda: Stacked(Spec())), "tie(loops=3) | route()", args=(ids()[:1],))
    assert "example of two sequences" in caught.value.remedy


class Framed(nn.Module):
    """Attention over frames of ten samples: a sequence is a tenth as long as the argument."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 8)
        self.layers = nn.ModuleList(Attention("masked") for _ in range(4))

    def forward(self, samples: Tensor) -> Tensor:
        h = self.embed(samples.unfold(1, 10, 10)[:, 2:])
        mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
        for layer in self.layers:
            h = h + layer(h, mask)
        return h


@pytest.mark.slow
def test_tokens_may_be_a_small_part_of_a_size() -> None:
    model = seeded(Framed)
    compiled = depthc.compile(model, "mor", args=(torch.randn(2, 95),), loops=2).train()
    for samples in (95, 147):
        out, aux = compiled.forward_with_aux(torch.randn(2, samples))
        assert [int(r.chosen[0].sum()) for r in aux.routes] == [out.shape[1], out.shape[1] // 2]


class Biased(nn.Module):
    """Attention with a bias that is the end of a table, as MPT's: up to a length, it is as long as the sequence."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(longest))
        self.layers = nn.ModuleList(Attention("masked") for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        bias = self.table[-h.shape[1] :][None]
        for layer in self.layers:
            h = h + layer(h, bias)
        return h


@pytest.mark.parametrize("longest", [64, 12])
def test_sizes_that_are_equal_up_to_a_length(longest: int) -> None:
    model = seeded(lambda: Biased(longest))
    compiled = depthc.compile(model, "mor", args=(states(2, 5),), loops=2).train()
    for length in (5, 9):
        _, aux = compiled.forward_with_aux(states(2, length))
        assert [int(r.chosen[0].sum()) for r in aux.routes] == [length, length // 2]


def test_scores_that_are_not_numbers(routed: DepthModule) -> None:
    weight = routed.parameter_of("depth.r.1.router.weight")
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        for training in (True, False):
            with pytest.raises(RoutingError, match="not a number") as caught:
                routed.train(training)(ids())
            assert "batch row" in caught.value.where
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_unknown_loop(routed: DepthModule) -> None:
    with pytest.raises(InputError, match="no loop 'core'") as caught:
        routed.loop("core")
    assert caught.value.remedy == "use 'r'"


def test_checkpointing_changes_no_gradient(routed: DepthModule) -> None:
    """Activations are computed again backward; the choices are those of the forward."""
    grads = []
    for turn in (routed.gradient_checkpointing_disable, routed.gradient_checkpointing_enable):
        turn()
        out, aux = routed.train().forward_with_aux(ids(2, 9))
        leaves = list(routed.parameters())
        grads.append(torch.autograd.grad(out.pow(2).sum() + aux.loss, leaves, allow_unused=True))
    routed.gradient_checkpointing_disable()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True) if a is not None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_bodies_compiled_once_compute_the_same() -> None:
    torch.compiler.reset()
    module = depthc.compile(stack_program(8), "mor").train()
    expected = [module(ids(2, length)) for length in (8, 6)]
    module.compile(backend="eager")
    for length, whole in zip((8, 6), expected, strict=True):
        assert torch.equal(module(ids(2, length)), whole)


# generation


def test_greedy_generation_takes_the_most_likely_token_of_the_whole_sequence(routed: DepthModule) -> None:
    routed.eval()
    found = depthc.generate(routed, ids(2, 4), 5)
    sequence = ids(2, 4)
    for _ in range(5):
        sequence = torch.cat([sequence, routed(sequence)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, sequence)


def test_draws_follow_the_seed(routed: DepthModule) -> None:
    one, same, other = (depthc.generate(routed, ids(2, 4), 12, temperature=1.0, seed=s) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(
        depthc.generate(routed, ids(2, 4), 6, temperature=1.0, top_k=1), depthc.generate(routed, ids(2, 4), 6)
    )


def test_a_row_that_stopped_repeats_the_stop(routed: DepthModule) -> None:
    free = depthc.generate(routed, ids(2, 4), 8)
    stop = int(free[0, 5])
    rows = depthc.generate(routed, ids(2, 4), 8, stop=stop)[:, 4:]
    for row in rows.tolist():
        assert stop not in row or set(row[row.index(stop) :]) == {stop}
