"""tie and loop: which layers share what, what the shared values are, and what is refused."""

from __future__ import annotations

from functools import cache

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.ir.errors import RecipeError
from depthc.ir.program import Loop, Program, calls
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of
from depthc.passes.sharing import SHARINGS, Sharing, legal_loops

from .models import Attention, Mlp, Spec, Stacked, ids, outputs, seeded, states

DEPTH = 8
INITS = ("stepwise", "average", "lower", "upper")


@cache
def captured() -> tuple[nn.Module, Program]:
    model = oracles.build("llama", layers=DEPTH)
    with oracles.Wide():
        return model, depthc.capture(model, kwargs={"input_ids": tokens()})


def tokens() -> Tensor:
    return oracles.inputs_of("llama", torch.ones(2, 6, dtype=torch.bool))["input_ids"]


def tied(recipe: str = "tie", **options: object) -> DepthModule:
    return lower(run_recipe(captured()[1], recipe_of(recipe, options))[0]).eval()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_tied_model_is_the_oracle(sharing: str, init: str) -> None:
    """Against a loop over single tokens with the layers that the rules name."""
    loops = 3 if sharing.startswith("middle") else 2
    model, _ = captured()
    math = oracles.math_of("llama", model)
    inputs, real = {"input_ids": tokens()}, torch.ones(2, 6, dtype=torch.bool)
    with oracles.Wide(), torch.no_grad():
        expected = oracles.looped(math, oracles.tie(math, sharing, loops, init), inputs, real)
        found = tied(sharing=sharing, loops=loops, init=init)(input_ids=tokens()).logits
    assert (found - expected).abs().max() < 1e-10


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("layers", [3, 6, 8, 14])
def test_slots_are_the_oracles(sharing: str, layers: int) -> None:
    for loops in legal_loops(sharing, layers):
        found = Sharing(sharing, layers, loops)
        assert list(found.slots) == [oracles.slot_of(sharing, layers, loops, i) for i in range(layers)]
        for init in INITS:
            sources = [found.sources(slot, init) for slot in range(found.unique)]
            assert sources == [tuple(s) for s in oracles.sources_of(sharing, layers, loops, init)], init


def test_only_shared_layers_are_left() -> None:
    compiled = tied(sharing="middle_cycle", loops=3)
    layers = sorted({int(n.split(".")[2]) for n in compiled.state_dict() if ".layers." in n})
    assert layers == [0, 1, 2, 7]
    (loop,) = [op for op in compiled.program.stacks[0].ops if isinstance(op, Loop)]
    assert (loop.count, len(loop.body)) == (3, 2)
    assert compiled.program.depths == (DEPTH,)


def test_one_shared_layer_is_albert() -> None:
    compiled = tied("albert")
    (loop,) = compiled.program.stacks[0].ops
    assert (loop.count, len(loop.body)) == (DEPTH, 1)
    assert {n.split(".")[2] for n in compiled.state_dict() if ".layers." in n} == {"0"}


@cache
def alike() -> tuple[nn.Module, Program]:
    """A model with equal layers, and its program."""
    model = seeded(lambda: Stacked(Spec(depth=6, sides=("rotary",))))
    for layer in model.layers[1:]:
        layer.load_state_dict(model.layers[0].state_dict())
    return model, depthc.capture(model, (ids(),))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_equal_layers_stay_bitwise_the_model(sharing: str) -> None:
    """The identity of tie: layers that are equal already."""
    model, program = alike()
    compiled = depthc.compile(program, "tie", sharing=sharing, loops=2)
    assert torch.equal(outputs(compiled, ids(3, 7)), outputs(model, ids(3, 7)))


def test_norms_may_stay_their_own() -> None:
    compiled = tied(sharing="cycle", loops=2, norms="per_depth")
    names = set(compiled.state_dict())
    assert "model.layers.7.input_layernorm.weight" in names
    assert "model.layers.7.mlp.up_proj.weight" not in names
    (loop,) = compiled.program.stacks[0].ops
    assert any("{r + 4}" in p or "{4 * r" in p for call in loop.body for p in call.params)


def test_layers_may_be_left_out() -> None:
    compiled = tied(loops=3, fit="resample")
    assert compiled.program.depths == (6,)
    assert Sharing("cycle", 8, 3).kept == (0, 1, 3, 4, 6, 7)


def test_random_values_follow_the_law_of_the_weights() -> None:
    one, other = (tied(loops=2, init="random", seed=s).state_dict() for s in (0, 1))
    name = "model.layers.1.mlp.up_proj.weight"
    own = captured()[0].state_dict()[name]
    assert not torch.equal(one[name], other[name])
    assert torch.equal(one[name].flatten().sort().values, own.flatten().sort().values)
    assert torch.equal(tied(loops=2, init="random").state_dict()[name], one[name])


@pytest.mark.slow
def test_a_compiled_model_has_parameters_of_its_own() -> None:
    model = seeded(lambda: Stacked(Spec(depth=4)))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    compiled = depthc.compile(model, "tie", args=(ids(),), loops=2)
    with torch.no_grad():
        for parameter in compiled.parameters():
            parameter.zero_()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


@pytest.mark.slow
def test_loop_rolls_what_is_equal_and_changes_no_bit() -> None:
    program = captured()[1]
    once = run_recipe(program, recipe_of("tie", {"loops": 2}))[0]
    rolled, (step,) = run_recipe(once, recipe_of("loop", {}))
    assert rolled == once
    assert (step.before, step.after) == (5, 5)
    shared = seeded(lambda: Stacked(Spec(depth=4, shared="mlp")))
    compiled = depthc.compile(shared, "roll", args=(ids(),))
    (loop,) = compiled.program.stacks[0].ops
    assert isinstance(loop, Loop)
    assert torch.equal(outputs(compiled, ids(2, 6)), outputs(shared, ids(2, 6)))
    assert sum(times for _, times in calls(compiled.program.stacks[0].ops)) == 4


class Scaled(nn.Module):
    """Two kinds of layers in turn: they differ in a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, h: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            h = h + layer(F.gelu(h)) * (0.5 if i % 2 else 0.25)
        return h


def test_layers_that_differ_in_a_constant_are_refused_with_the_period() -> None:
    with pytest.raises(RecipeError, match="not the same function") as caught:
        depthc.compile(Scaled(), "tie", args=(torch.ones(2, 5, 8),), loops=2)
    assert "0.25" in str(caught.value)
    assert "use loops=3:" in caught.value.remedy
    depthc.compile(Scaled(), "tie", args=(torch.ones(2, 5, 8),), loops=3)


@pytest.mark.parametrize(("recipe", "options"), [("tie", {"loops": 3}), ("roll", {})])
def test_a_first_layer_that_reads_the_argument_is_in_the_loop(recipe: str, options: dict[str, int]) -> None:
    """Its input has another name than what the layers pass on."""
    model, x = Scaled(), torch.randn(2, 5, 8)
    for i in range(2, 6):
        model.layers[i] = model.layers[i % 2]
    compiled = depthc.compile(model, recipe, args=(x,), **options)  # type: ignore[arg-type]
    (loop,) = (op for op in compiled.program.stacks[0].ops if isinstance(op, Loop))
    assert (loop.count, len(loop.body), compiled.program.depths) == (3, 2, (6,))
    assert depthc.parse(str(compiled.program), weights=compiled.program.weights) == compiled.program
    assert torch.equal(compiled(x), model(x))


@pytest.mark.slow
def test_layers_that_are_one_already_are_not_looped_more_often_than_asked() -> None:
    model = seeded(lambda: Stacked(Spec(depth=6, shared="all")))
    (loop,) = depthc.compile(model, "tie", args=(ids(),), loops=2).program.stacks[0].ops
    assert isinstance(loop, Loop)
    assert (loop.count, len(loop.body)) == (2, 3)


class TwoKinds(nn.Module):
    """Six attention layers; some have a gate, and so a parameter more."""

    def __init__(self, gated: tuple[int, ...]) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(Attention() for _ in range(6))
        self.mlps = nn.ModuleList(Mlp("swiglu" if i in gated else "gelu") for i in range(6))

    def forward(self, h: Tensor) -> Tensor:
        for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
            h = h + mixer(h)
            h = h + mlp(h)
        return h


@pytest.mark.slow
def test_values_come_from_layers_of_the_same_kind() -> None:
    """Stepwise, the slots are layers 0, 2 and 5; but 2 has a gate and slot 1 has none, so it is the nearest without."""
    model = seeded(lambda: TwoKinds((2, 5)))
    compiled = depthc.compile(model, "tie", args=(states(),), loops=2)
    assert len(compiled.program.blocks) == 2
    for slot, source in enumerate([0, 1, 5]):
        own = compiled.state_dict()[f"mlps.{slot}.up.weight"]
        assert torch.equal(own, model.mlps[source].up.weight)


@pytest.mark.slow
def test_first_layers_of_another_kind_may_be_kept() -> None:
    model = seeded(lambda: TwoKinds((0, 1)))
    with pytest.raises(RecipeError, match="not the same function") as caught:
        depthc.compile(model, "tie", args=(states(),), loops=2, sharing="middle_cycle")
    assert "use loops=2, keep=(2, 0)" in caught.value.remedy
    compiled = depthc.compile(model, "tie", args=(states(),), loops=2, sharing="middle_cycle", keep=(2, 0))
    assert Sharing("middle_cycle", 6, 2, (2, 0)).slots == (0, 1, 2, 3, 2, 3)
    (loop,) = (op for op in compiled.program.stacks[0].ops if isinstance(op, Loop))
    assert (loop.count, len(loop.body)) == (2, 2)
    for slot, source in enumerate([0, 1, 2, 5]):
        assert torch.equal(compiled.state_dict()[f"mlps.{slot}.up.weight"], model.mlps[source].up.weight)


@pytest.mark.parametrize("keep", [(0, 0), (0, 1), (3, 0), (2, 2)])
def test_kept_layers_stay_their_own(keep: tuple[int, int]) -> None:
    """What is kept changes nothing for the others: they are a stack by themselves."""
    count = 8 - sum(keep)
    for loops in legal_loops("cycle", count):
        found, inner = Sharing("middle_cycle", 8, loops, keep), Sharing("cycle", count, loops)
        ends = [*range(keep[0])], [*range(8 - keep[1], 8)]
        assert found.slots[keep[0] : keep[0] + count] == tuple(keep[0] + slot for slot in inner.slots)
        for init in INITS:
            sources = [found.sources(slot, init) for slot in found.slots]
            assert [*sources[: keep[0]], *sources[keep[0] + count :]] == [(i,) for end in ends for i in end]
            own = [tuple(keep[0] + i for i in inner.sources(slot, init)) for slot in inner.slots]
            assert sources[keep[0] : keep[0] + count] == own


@pytest.mark.slow
def test_windows_that_differ_are_refused() -> None:
    model = oracles.build("hybrid", layers=6)
    with oracles.Wide(), pytest.raises(RecipeError, match="one reads") as caught:
        depthc.compile(model, "tie", kwargs={"input_ids": tokens()}, loops=2)
    assert "use loops=3:" in caught.value.remedy


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"loops": 3}, "3 loops do not divide the 8 layers", "loops=2"),
        ({"loops": 4, "sharing": "middle_cycle"}, "without the first and the last", "loops=3"),
        ({"sharing": "cycles"}, "'sharing'", "'cycle'"),
        ({"init": "best"}, "'init'", "use"),
        ({"loops": -1}, "'loops'", "0"),
        ({"keep": (1, -1)}, "'keep'", "(1, 1)"),
        ({"keep": 2}, "'keep'", "(1, 1)"),
        ({"keep": (2, 0), "sharing": "middle_cycle", "loops": 4}, "those that are kept", "loops=3"),
        ({"keep": (4, 4), "sharing": "middle_cycle"}, "those that are kept", "another sharing"),
        ({"loops": 2.0}, "'loops'", "0"),
        ({"stack": "encoder"}, "no such stack", "name one"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        tied(**options)
    assert remedy in caught.value.remedy


@cache
def smollm(layers: int) -> Program:
    """SmolLM-360M on the meta device."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=layers,
        num_attention_heads=15,
        num_key_value_heads=5,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        example = torch.zeros((2, 16), dtype=torch.int64)
    return depthc.capture(model, kwargs={"input_ids": example})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "counts"),
    [
        pytest.param(32, {1: 314_572_800, 2: 167_116_800, 3: 117_964_800}, marks=pytest.mark.thorough),
        pytest.param(34, {4: 98_304_000}, marks=pytest.mark.thorough),
    ],
)
def test_published_parameter_counts(layers: int, counts: dict[int, int]) -> None:
    """SmolLM-360M and its recursions: the linear weights of all layers (recipes: section 2)."""
    for loops, expected in counts.items():
        recipe = recipe_of("tie", {"loops": loops, "sharing": "middle_cycle"})
        compiled = lower(run_recipe(smollm(layers), recipe)[0])
        named = compiled.named_parameters()
        assert sum(p.numel() for n, p in named if p.dim() == 2 and "embed" not in n and "head" not in n) == expected
