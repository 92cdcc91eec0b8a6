"""Decoding in CUDA graphs: the logits of the whole sequence evaluated at once, sections side by side too."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import depthc

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),
]


SECTIONS = {"identity": (), "tie(loops=2)": (), "stagger(window=1)": (3, 3), "stagger(stacks=3)": (2, 2, 2)}


@pytest.mark.parametrize("recipe", SECTIONS)
@pytest.mark.parametrize(("compile", "graph"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("prompt", [2, 5])
def test_steps(recipe: str, compile: bool, graph: bool, prompt: int) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    model, tokens = LlamaForCausalLM(config).cuda().eval(), torch.randint(97, (3, 24)).cuda()
    module = depthc.compile(model, recipe, kwargs={"input_ids": tokens}).eval()
    with torch.no_grad():  # cross-attention starts at zero
        for param in module.parameters():
            param.add_(0.05 * torch.randn_like(param))
        expected = module(input_ids=tokens).logits
    decoder = depthc.Decoder(module, tokens[:, :prompt], 24, compile=compile, graph=graph)
    assert (decoder._graph is not None) == graph
    assert decoder.sections == SECTIONS[recipe]
    for at in range(prompt, 24):
        found = decoder.step(tokens[:, at : at + 1])
        assert (found - expected[:, at]).norm() <= 1e-4 * expected[:, at].norm()
