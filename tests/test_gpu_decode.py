"""Decoding in CUDA graphs: the logits of the whole sequence evaluated at once, sections side by side too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import depthc
from depthc.codegen.module import DepthModule
from depthc.ir.recurrent import Recurrent

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),
]


SHARED = "stagger(shared=True, window=5)"
SECTIONS = {
    "identity": (),
    "tie(loops=2)": (),
    "stagger(window=1)": (3, 3),
    "stagger(stacks=3)": (2, 2, 2),
    SHARED: (6, 6),
}


def staggered(recipe: str) -> tuple[DepthModule, Tensor]:
    """A model all of whose parameters count, and tokens."""
    torch.compiler.reset()
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    model, tokens = LlamaForCausalLM(config).cuda().eval(), torch.randint(97, (3, 24)).cuda()
    module = depthc.compile(model, recipe, kwargs={"input_ids": tokens}).eval()
    with torch.no_grad():  # cross-attention starts at zero
        for param in module.parameters():
            param.add_(0.05 * torch.randn_like(param))
    return module, tokens


def assert_steps(decoder: depthc.Decoder, tokens: Tensor, expected: Tensor) -> None:
    """Steps up to the end of the tokens, against the logits behind each."""
    for at in range(decoder.place, tokens.shape[1]):
        found = decoder.step(tokens[:, at : at + 1])
        assert (found - expected[:, at]).norm() <= 1e-4 * expected[:, at].norm()


@pytest.mark.parametrize("recipe", SECTIONS)
@pytest.mark.parametrize(("compile", "graph"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("prompt", [2, 5])
@torch.no_grad()
def test_steps(recipe: str, compile: bool, graph: bool, prompt: int) -> None:
    module, tokens = staggered(recipe)
    decoder = depthc.Decoder(module, tokens[:, :prompt], 24, compile=compile, graph=graph, together=True)
    assert (decoder._graph is not None) == graph
    assert decoder.sections == SECTIONS[recipe]
    assert decoder.together == ("stagger" in recipe)
    assert_steps(decoder, tokens, module(input_ids=tokens).logits)


@torch.no_grad()
def test_what_is_one_batch_by_itself() -> None:
    shared, tokens = staggered(SHARED)
    assert depthc.Decoder(shared, tokens[:, :5], 24).together
    assert not depthc.Decoder(shared, tokens[:, :5].repeat(2, 1), 24).together  # six sequences
    assert not depthc.Decoder(staggered("stagger(stacks=3)")[0], tokens[:, :5], 24).together


@pytest.mark.parametrize("recipe", [SHARED, "stagger(stacks=3)"])
@pytest.mark.parametrize("compile", [False, True])
@torch.no_grad()
def test_stacks_as_branches(recipe: str, compile: bool) -> None:
    module, tokens = staggered(recipe)
    decoder = depthc.Decoder(module, tokens[:, :5], 24, compile=compile, together=False)
    assert not decoder.together
    assert_steps(decoder, tokens, module(input_ids=tokens).logits)


@pytest.mark.parametrize("compile", [False, True])
@torch.no_grad()
def test_the_last_stack_alone(compile: bool) -> None:
    module, tokens = staggered(SHARED)
    decoding = Recurrent(module.program)
    out, past = decoding.start(input_ids=tokens[:, :5])
    expected = [out.logits]
    for at in range(5, 24):
        out, past = decoding.step(past, input_ids=tokens[:, at : at + 1])
        expected.append(out.logits)
    decoder = depthc.Decoder(module, tokens[:, :5], 24, compile=compile, recurrent=True)
    assert_steps(decoder, tokens, torch.cat(expected, 1))
