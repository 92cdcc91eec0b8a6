"""Lowering to a module: the model's own parameters, one function a block, and all that people do with modules."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import depthc

from .models import Chain, Spec, Stacked, assert_lowered, assert_same, gradients, ids, outputs, seeded, states

SPEC = Spec(attention=("masked",), sides=("rotary", "window"), depth=4, dropout=0.1, returns="dict")


def make() -> nn.Module:
    return seeded(lambda: Stacked(SPEC))


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    model = make()
    return model, depthc.compile(model, args=(ids(),))


@pytest.fixture
def model(pair: tuple[nn.Module, nn.Module]) -> nn.Module:
    return pair[0].eval()


@pytest.fixture
def compiled(pair: tuple[nn.Module, nn.Module]) -> nn.Module:
    return pair[1].eval()


def test_module_is_the_model(model: nn.Module, compiled: nn.Module) -> None:
    assert_lowered(compiled, model, ids())
    assert compiled.program.depths == (4,)
    assert type(compiled).__name__ == "DepthStacked"


def test_parameters_are_the_same_objects(model: nn.Module, compiled: nn.Module) -> None:
    theirs = dict(model.named_parameters())
    for name, parameter in compiled.named_parameters():
        assert parameter is theirs[name]
    optimizer = torch.optim.SGD(compiled.parameters(), 0.1)
    assert len(optimizer.param_groups[0]["params"]) == len(theirs)


def test_signature_is_that_of_the_model(model: nn.Module, compiled: nn.Module) -> None:
    assert inspect.signature(compiled.forward) == inspect.signature(model.forward)


def test_a_block_is_one_function(compiled: nn.Module) -> None:
    (block,) = compiled.program.blocks.values()
    functions = compiled._functions[False]
    assert len(functions) == 1 + sum(type(item).__name__ == "Segment" for item in compiled.program.body)
    assert block.body.certificate in functions


def test_mode_follows_the_model() -> None:
    assert depthc.compile(seeded(Chain).train(), args=(states(),)).training
    assert not depthc.compile(seeded(Chain).eval(), args=(states(),)).training


def test_state_dict_goes_both_ways(model: nn.Module, compiled: nn.Module) -> None:
    other = seeded(lambda: Stacked(SPEC), seed=1)
    mine = copy.deepcopy(compiled)
    mine.load_state_dict(other.state_dict())
    assert_same(outputs(mine, ids()), outputs(other, ids()))
    fresh = Stacked(SPEC).eval()
    fresh.load_state_dict(compiled.state_dict())
    assert_same(outputs(fresh, ids()), outputs(model, ids()))


def test_state_dict_may_be_partial_if_not_strict(compiled: nn.Module) -> None:
    mine = copy.deepcopy(compiled)
    state = {"embed.weight": torch.zeros_like(mine.embed.weight), "other": torch.ones(1)}
    result = mine.load_state_dict(state, strict=False)
    assert result.unexpected_keys == ["other"]
    assert "head.weight" in result.missing_keys
    assert not mine.embed.weight.any()


def test_state_dict_may_be_assigned(compiled: nn.Module) -> None:
    mine = copy.deepcopy(compiled)
    other = seeded(lambda: Stacked(SPEC), seed=1)
    mine.load_state_dict(other.state_dict(), assign=True)
    assert_same(outputs(mine, ids()), outputs(other, ids()))


@pytest.mark.slow
def test_meta_module_is_filled_by_a_state_dict(model: nn.Module) -> None:
    with torch.device("meta"):
        empty = Stacked(SPEC)
    compiled = depthc.compile(empty.eval(), args=(ids().to("meta"),))
    compiled.load_state_dict(model.state_dict(), assign=True)
    assert_same(outputs(compiled, ids()), outputs(model, ids()))


def test_copies_are_independent(model: nn.Module, compiled: nn.Module) -> None:
    mine = copy.deepcopy(compiled)
    with torch.no_grad():
        mine.embed.weight.zero_()
    assert model.embed.weight.any()
    assert mine.program == compiled.program
    assert not torch.equal(outputs(mine, ids())["logits"], outputs(compiled, ids())["logits"])


def test_moving_to_the_same_dtype_and_device_changes_nothing(model: nn.Module, compiled: nn.Module) -> None:
    assert compiled.to("cpu", torch.float32) is compiled
    assert compiled.float() is compiled
    assert compiled.embed.weight is model.embed.weight


def test_moving_to_another_device(compiled: nn.Module) -> None:
    moved = copy.deepcopy(compiled).to("meta")
    assert all(p.is_meta for p in moved.parameters())
    assert moved(ids().to("meta"))["logits"].shape == (2, 5, 13)


@pytest.mark.slow
def test_training_step(model: nn.Module) -> None:
    modules = [copy.deepcopy(model), depthc.compile(copy.deepcopy(model), args=(ids(),))]
    for module in modules:
        optimizer = torch.optim.AdamW(module.train().parameters(), 0.01)
        for step in range(2):
            torch.manual_seed(step)
            optimizer.zero_grad()
            module(ids(seed=step))["logits"].logsumexp(-1).sum().backward()
            optimizer.step()
    assert_same(dict(modules[1].state_dict()), dict(modules[0].state_dict()))


@pytest.mark.parametrize("training", [False, True])
def test_autocast(model: nn.Module, compiled: nn.Module, training: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(compiled.train(training), ids())
        expected = gradients(model.train(training), ids())
    assert_same(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(model: nn.Module, compiled: nn.Module, reentrant: bool) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.scale = nn.Parameter(torch.ones(()))

        def run(self, ids: Tensor, scale: Tensor) -> Tensor:
            return self.inner(ids)["logits"] * scale

        def forward(self, ids: Tensor) -> Tensor:
            return checkpoint(self.run, ids, self.scale, use_reentrant=reentrant)

    inner = [module.train() for module in (compiled, model)]
    found, expected = (_backward(Wrapped(module)) for module in inner)
    assert_same(found, expected)


def _backward(module: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module.zero_grad()
    module(ids()).square().sum().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_torch_compile(model: nn.Module, compiled: nn.Module, backend: str) -> None:
    torch.compiler.reset()
    faster = torch.compile(compiled, fullgraph=True, backend=backend)
    for length in (5, 7, 9):
        assert_same(outputs(faster, ids(2, length)), outputs(compiled, ids(2, length)))
    found, got = gradients(faster, ids())
    expected, wanted = gradients(compiled, ids())
    assert_same(found, expected)
    assert_same({n.removeprefix("_orig_mod."): g for n, g in got.items()}, wanted, 1e-6)


def test_exported_again(compiled: nn.Module) -> None:
    exported = torch.export.export(compiled, (ids(),)).module()
    assert_same(outputs(exported, ids()), outputs(compiled, ids()))


@pytest.mark.slow
def test_captured_again(compiled: nn.Module) -> None:
    again = depthc.capture(compiled, (ids(),))
    assert again.depths == (4,)
    assert_same(outputs(again.run, ids(3, 7)), outputs(compiled, ids(3, 7)))


def test_hooks_and_repr(compiled: nn.Module) -> None:
    seen = []
    handle = compiled.register_forward_hook(lambda *_: seen.append(1))
    compiled(ids())
    handle.remove()
    assert seen == [1]
    assert "DepthStacked" in repr(compiled)


def test_weights_can_be_saved(compiled: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(compiled.state_dict(), file)
    file.seek(0)
    mine = copy.deepcopy(compiled)
    mine.load_state_dict(torch.load(file))
    assert_same(outputs(mine, ids()), outputs(compiled, ids()))


def test_parsed_program_lowers_to_the_same_module(model: nn.Module, compiled: nn.Module) -> None:
    from depthc.codegen.module import lower

    parsed = depthc.parse(str(compiled.program), weights=compiled.program.weights)
    assert_lowered(lower(parsed), model, ids())
