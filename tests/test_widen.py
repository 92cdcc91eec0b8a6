"""widen: a stream of several blocks, judged by an oracle that goes token by token in fp64."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from oracles import Wide
from oracles import widened as oracle
from torch import Tensor, nn

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.ir.errors import RecipeError
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipe import Recipe
from depthc.passes.recipes import recipe_of
from depthc.passes.widen import Widen

from .models import Spec, Stacked, ids, seeded
from .routed import BACKWARD, FORWARD, ROWS, captured, documents_of, logits_of, stepped, weighted

GEMMA = {"coefficients": "router", "compute_on": "predicted", "reads": None, "active": 0}
ENDS = {"depth.widen.embedding": "table", "depth.widen.head": "head"}
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "recycled": {"embedding": "recycled", "active": 1},
    "wide": {"embedding": "wide", "blocks": 3},
    "three": {"blocks": 3, "compute_on": "predicted"},
    "gemma": GEMMA,
    "router": {"coefficients": "router", "blocks": 3, "reads": 1, "eps": 1e-5},
}


def widened(kind: str, rows: str = "full", **options: Any) -> DepthModule:
    """A widened model whose coefficients are far from those at which it is the original."""
    with Wide():
        module = lower(run_recipe(captured(kind, rows)[1], recipe_of(Widen(**options), {}))[0]).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.new_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    return module


def coefficients(module: DepthModule) -> dict[str, Tensor]:
    """The new parameters, as the oracle names them."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.new_parameters().items():
        if name in ENDS:
            found[ENDS[name]] = parameter
            continue
        _, _, layer, slot = name.split(".")
        routed = f"depth.widen.{layer}.mix" in module.new_parameters()
        found[f"router.{layer}.{slot}" if routed else f"{slot}.{layer}"] = parameter
    return found


def settings(options: dict[str, Any]) -> oracle.Settings:
    return oracle.Settings(**options)


def agree(kind: str, rows: str = "full", **options: Any) -> None:
    """Logits, gradients, and the same token by token."""
    model, _, inputs = captured(kind, rows)
    module, real = widened(kind, rows, **options), ROWS[rows]
    with Wide():
        math = oracles.math_of(kind, model)
        given = settings(options), coefficients(module), inputs, real, documents_of(rows)
        expected = oracle.widen(math, *given)
        found = logits_of(module(**inputs))
    assert (found - expected)[real].abs().max() < FORWARD
    ours = dict(module.named_parameters())
    shared = {n: p for n, p in model.named_parameters() if n in ours}
    narrow = {id(table) for table in math.tables()} if options.get("embedding") == "wide" else set()
    assert {id(p) for n, p in model.named_parameters() if n not in shared and p.requires_grad} <= narrow
    wanted = [*shared.values(), *module.new_parameters().values()]
    names = [*shared, *module.new_parameters()]
    theirs = torch.autograd.grad(weighted(expected, real), wanted, allow_unused=True)
    own = torch.autograd.grad(weighted(found, real), [ours[name] for name in names], allow_unused=True)
    for name, one, other in zip(names, own, theirs, strict=True):
        assert (one is None) == (other is None) or (one if one is not None else other).abs().max() == 0, name
        if one is not None and other is not None:
            assert (one - other).abs().max() < BACKWARD, name


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n != "gemma" else []) for n in SETTINGS])
def test_options(name: str) -> None:
    agree("llama", **SETTINGS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "wide", pytest.param("gemma", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", [kind for kind in oracles.KINDS if kind != "llama"])
def test_other_architectures(kind: str, name: str) -> None:
    agree(kind, "padded", **SETTINGS[name])


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_untrained_it_is_the_model(options: dict[str, Any]) -> None:
    """But for the sum of equal blocks, which a norm of the next part takes back."""
    model, program, inputs = captured("llama", "full")
    with Wide():
        module = lower(run_recipe(program, recipe_of(Widen(**options), {}))[0]).eval()
        gap = (logits_of(module(**inputs)) - logits_of(model(**inputs))).abs().max()
    assert gap < (1e-4 if options.get("embedding") == "recycled" else 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "wide", pytest.param("gemma", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", ["llama", "post_norm", pytest.param("moe", marks=pytest.mark.thorough)])
def test_step_by_step(kind: str, name: str) -> None:
    module, inputs = widened(kind, **SETTINGS[name]), captured(kind, "full")[2]
    with Wide(), torch.no_grad():
        rows, _ = stepped(kind, module.program, inputs)
        assert (rows - logits_of(module(**inputs))).abs().max() < 1e-10


def test_gemma3n_has_the_same_altup() -> None:
    """Predictions and corrections of the library's module, with its weights."""
    from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAltUp

    from depthc.ir.body import interpret
    from depthc.ir.types import Type
    from depthc.passes.widen_glue import routed_correct, routed_predict

    torch.manual_seed(0)
    config = Gemma3nTextConfig(hidden_size=16, altup_num_inputs=3, altup_active_idx=1, altup_coef_clip=1e6)
    theirs = Gemma3nTextAltUp(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    states, y = torch.randn(3, 2, 5, 16), torch.randn(2, 5, 16)
    stream = Type(torch.float32, ("b", "s", 16))
    norm, mix = theirs.router_norm.weight, theirs.modality_router.weight
    before = routed_predict(stream, 3, 1, config.rms_norm_eps)
    predicted = interpret(before, [*states, norm, mix, theirs.prediction_coefs.weight])
    torch.testing.assert_close(torch.stack(list(predicted)), theirs.predict(states), rtol=1e-5, atol=1e-5)
    after = routed_correct(stream, 3, 1, config.rms_norm_eps)
    corrected = interpret(after, [*predicted, y, norm, mix, theirs.correction_coefs.weight])
    expected = theirs.correct(torch.stack(list(predicted)), y)
    torch.testing.assert_close(torch.stack(list(corrected)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_tied_layers_have_coefficients_of_their_own() -> None:
    model: nn.Module = seeded(lambda: Stacked(Spec(depth=6)))
    module = depthc.compile(model, 'tie(loops=3, sharing="cycle") | widen()', args=(ids(),))
    tied = depthc.compile(model, 'tie(loops=3, sharing="cycle")', args=(ids(),))
    assert sorted(module.new_parameters()) == sorted(
        f"depth.widen.{layer}.{slot}" for layer in range(6) for slot in ("correct", "predict")
    )
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in tied.parameters()) + 6 * (4 + 2)
    torch.testing.assert_close(module(ids()), tied(ids()), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_printed_parsed_saved(tmp_path: Any) -> None:
    model: nn.Module = seeded(lambda: Stacked(Spec(depth=4)))
    module = depthc.compile(model, "altup", args=(ids(),), coefficients="router").eval()
    depthc.save(module, tmp_path / "saved")
    again = depthc.load(tmp_path / "saved").eval()
    assert str(again.program) == str(module.program)
    assert torch.equal(again(ids()), module(ids()))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("blocks", 1), ("blocks", 2.0), ("active", 2), ("active", True), ("reads", -1), ("compute_on", "new"),
        ("coefficients", "matrix"), ("embedding", "last"), ("eps", -1.0), ("std", float("nan")),
    ],
)  # fmt: skip
def test_options_out_of_range(option: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"option '{option}'"):
        Widen(**{option: value})


def test_layers_that_pass_on_more_are_refused() -> None:
    model: nn.Module = seeded(lambda: Stacked(Spec(depth=4)))
    with pytest.raises(RecipeError, match="rewritten before"):
        depthc.compile(model, Recipe.parse("mod() | widen()"), args=(ids(),))
