"""Tables in one graph of a whole module are computed once, and layers read them."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from transformers import LlamaConfig, LlamaForCausalLM

import depthc

ONCE = torch.ops.depthc.computed_once.default


def test_rotary_tables_of_a_whole_graph() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    model, ids = LlamaForCausalLM(config).double(), torch.randint(31, (2, 8))
    module = depthc.compile(model, "tie(loops=3) | tokenchoice(balance=0.0)", kwargs={"input_ids": ids}).train()
    module.bounded = True
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, examples: list[Tensor]) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    params = [p for p in module.parameters() if p.requires_grad]
    expected = module(input_ids=ids).logits
    found = torch.compile(module, backend=backend, fullgraph=True)(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected.square().mean(), params)
    torch.testing.assert_close(torch.autograd.grad(found.square().mean(), params), wanted)
    (graph,) = graphs
    once = [node for node in graph.graph.nodes if node.target in (ONCE, ONCE.overloadpacket)]
    assert len(once) == 2  # the cosine and the sine


def test_gradients_of_learned_tables() -> None:
    table = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(torch.ops.depthc.computed_once, table)
    torch.library.opcheck(ONCE, (table,))
