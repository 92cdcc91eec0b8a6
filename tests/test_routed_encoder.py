"""The encoder of an encoder-decoder routed: states are the oracle's, and what decodes from them goes token by token."""

from __future__ import annotations

from functools import cache

import oracles
import pytest
import torch
from oracles import Wide, expert, token
from oracles.encoder_decoder import T5Encoder
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.ir.plans import plan_of
from depthc.ir.program import Program
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipe import Recipe

from .routed import FORWARD, forward, logits_of, stepped

TIE = 'tie(loops=3, sharing="middle_cycle", stack=0)'
RECIPES = {
    "expert": Recipe.parse(f"{TIE} | route(stack=0)"),
    "token": Recipe.parse(f"{TIE} | tokenchoice(stack=0)"),
}
REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()


@cache
def captured() -> tuple[nn.Module, Program, dict[str, Tensor]]:
    model = oracles.build("encoder_decoder", layers=2, num_layers=8)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        name: torch.randint(1, oracles.VOCAB, shape, generator=generator)
        for name, shape in (("input_ids", REAL.shape), ("decoder_input_ids", (2, 6)))
    } | {"attention_mask": REAL.long()}
    with Wide():
        return model, depthc.capture(model, kwargs=inputs), inputs


def routed(form: str) -> DepthModule:
    module = lower(run_recipe(captured()[1], RECIPES[form])[0])
    with torch.no_grad():
        for r, router in enumerate(routers(form)):
            name = f"depth.r.{r}.router.weight" if form == "expert" else "depth.r.router.weight"
            module.parameter_of(name).copy_(router["weight"].view_as(module.parameter_of(name)))
    return module


def routers(form: str) -> list[dict[str, Tensor]]:
    return expert.make_routers(expert.Settings()) if form == "expert" else [token.make_router_of(token.Settings())]


def expected(form: str, causal: bool) -> Tensor:
    """The library's decoder on the oracle's states of the encoder."""
    model, _, inputs = captured()
    with Wide():
        if form == "expert":
            settings = expert.Settings(causal=causal)
            states = expert.route(T5Encoder(model), settings, routers(form), inputs, REAL).logits
        else:
            states = token.route(T5Encoder(model), token.Settings(), routers(form)[0], inputs, REAL).logits
        encoded = BaseModelOutput(states.nan_to_num())  # of padding, which the decoder does not see
        given = {name: inputs[name] for name in ("attention_mask", "decoder_input_ids")}
        return logits_of(model(encoder_outputs=encoded, **given))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "causal"), [("expert", False), pytest.param("expert", True, marks=pytest.mark.thorough), ("token", True)]
)
def test_states_are_the_oracles(form: str, causal: bool) -> None:
    module = routed(form)
    found, aux = forward(module, captured()[2], causal)
    wanted = expected(form, causal)
    assert (found - wanted).abs().max() < FORWARD
    chosen = [int(route.chosen.sum()) for route in aux.routes]
    assert chosen[0] == REAL.sum() > chosen[1]
    if form == "expert" and causal:
        assert (wanted - expected(form, causal=False)).abs().max() > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("form", RECIPES)
def test_the_encoder_runs_once(form: str) -> None:
    """Decoding goes token by token; what encodes is computed with the prompt and kept."""
    module, inputs = routed(form), captured()[2]
    whole, _ = forward(module, inputs, causal=True)
    logits, past = stepped("encoder_decoder", module.program, inputs, prompt=2)
    assert (logits - whole).abs().max() < FORWARD
    encoder, decoder = module.program.stacks
    kinds = plan_of(module.program).kinds
    assert {kinds[op.write] for op in encoder.ops if hasattr(op, "write")} == {"fixed"}
    assert not any(site.startswith(encoder.name) for site in past.caches)
    assert any(site.startswith(decoder.name) for site in past.caches)


@pytest.mark.slow
def test_top_k_in_a_decoder_is_still_refused() -> None:
    keep = Recipe.parse("keep(capacities=(1.0, 0.5), stack=1)")
    module = lower(run_recipe(captured()[1], keep)[0])
    with pytest.raises(depthc.IncrementalError, match="compares tokens with later ones"):
        stepped("encoder_decoder", module.program, captured()[2])
