"""Mixture-of-Depths beside other passes, in hybrids and several stacks, and what people do with its modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import Wide
from scores import with_scores

import depthc
from depthc.codegen.module import lower
from depthc.ir.errors import RecipeError
from depthc.ir.evaluate import run
from depthc.passes.mod import Mod
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of

from .models import Hybrid, Spec, Stacked, ids, seeded
from .routed import FORWARD, captured, forward

DEPTH = 8


def test_after_tie_every_application_has_a_router() -> None:
    """Loops are written out: the layers that tie shares are routed one by one."""
    _, program, inputs = captured("llama", "full")
    tied = run_recipe(program, recipe_of("tie", {"loops": 2}))[0]
    routed = run_recipe(tied, recipe_of("mod", {}))[0]
    assert routed.depths == tied.depths == (DEPTH,)
    assert routed.params.keys() - tied.params.keys() == {f"depth.mod.{n}.router.weight" for n in (1, 3, 5, 7)}
    everyone = with_scores(run_recipe(tied, recipe_of("mod", {"capacity": 1.0}))[0], 1.0)
    with Wide():
        expected = lower(tied).eval()(**inputs).logits
    assert (forward(lower(everyone), inputs, True)[0] - expected).abs().max() < FORWARD


@pytest.mark.slow
def test_two_stacks_have_routers_of_their_own() -> None:
    _, program, inputs = captured("encoder_decoder", "padded")
    both = run_recipe(program, recipe_of("mod(stack=0) | mod(stack=1, seed=9)", {}))[0]
    new = set(both.params) - set(program.params)
    assert new == {f"depth.{group}.router.weight" for group in ("mod.1", *(f"mod_1.{n}" for n in (1, 3, 5, 7)))}
    _, aux = forward(lower(both), inputs, causal=False)
    assert [(r.loop, r.recursion) for r in aux.routes] == [("mod", 1), *(("mod_1", n) for n in (1, 3, 5, 7))]


@pytest.mark.slow
def test_layers_that_read_the_stream_twice() -> None:
    """The first layer reads the embeddings as its stream and beside it."""
    model = seeded(lambda: Stacked(Spec(depth=3, sides=("embeddings",))))
    program = depthc.capture(model, (ids(),))
    routed = with_scores(run_recipe(program, recipe_of("mod", {"layers": (0, 1), "capacity": 1.0}))[0], 1.0)
    assert torch.allclose(lower(routed).eval()(ids()), model(ids()), atol=1e-6)
    some = lower(run_recipe(program, recipe_of("mod", {"layers": (0, 1), "capacity": 0.5}))[0])
    assert torch.equal(some.train()(ids()), run(some.program, (ids(),), {}, training=True))


def test_layers_whose_results_are_returned() -> None:
    """Every layer writes another name, so that no loop is there; single layers are routed all the same."""
    model = seeded(lambda: Stacked(Spec(depth=4, returns="states")))
    program = depthc.capture(model, (ids(),))
    routed = lower(with_scores(run_recipe(program, recipe_of("mod", {"capacity": 1.0}))[0], 1.0)).eval()(ids())
    for found, expected in zip(routed["states"], model(ids())["states"], strict=True):
        assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.slow
def test_hybrids_route_the_layers_that_may_be() -> None:
    with pytest.raises(RecipeError, match="layer 3 cannot be chosen") as caught:
        depthc.compile(seeded(Hybrid), "mod", args=(ids(),))
    assert "cumsum" in caught.value.found
    assert "models.py" in caught.value.where
    assert caught.value.remedy == "choose among layers 1, 4"
    compiled = depthc.compile(seeded(Hybrid), "mod", args=(ids(),), layers=(1, 4), capacity=0.5)
    assert [r.recursion for r in compiled.train().forward_with_aux(ids())[1].routes] == [1, 4]


@pytest.mark.slow
def test_checkpointed_saved_and_compiled(tmp_path: Path) -> None:
    """Activations are computed again backward with the same choices; a saved module is the same; one graph holds it."""
    compiled = depthc.compile(seeded(Stacked), Mod(capacity=0.5, predictor=True, std=1.0), args=(ids(2, 9),)).train()
    found = []
    for turn in (compiled.gradient_checkpointing_disable, compiled.gradient_checkpointing_enable):
        turn()
        out, aux = compiled.forward_with_aux(ids(2, 9))
        grads = torch.autograd.grad(out.pow(2).sum() + aux.loss, list(compiled.parameters()), allow_unused=True)
        found.append([out, *(g for g in grads if g is not None)])
    assert all(map(torch.equal, *found))
    compiled.gradient_checkpointing_disable()
    torch.compiler.reset()
    assert torch.equal(torch.compile(compiled, backend="eager", fullgraph=True)(ids(2, 9)), found[0][0])
    depthc.save(compiled.eval(), tmp_path / "saved")
    assert torch.equal(depthc.load(tmp_path / "saved").eval()(ids(2, 9)), compiled(ids(2, 9)))
