"""Routed modules with their kernels on a GPU: captured in CUDA graphs, compiled, in half precision."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import depthc
from depthc.codegen.module import DepthModule
from depthc.codegen.routing import KERNELS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings(
        "ignore:TensorFloat32",
        "ignore:.*AccumulateGrad node's stream",
        "ignore:The .grad attribute of a Tensor that is not a leaf",
    ),
]
KEYS = ("recursion", "share_first")


def routed(kv: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> DepthModule:
    """Two recursions of two layers, the second one on a quarter of the tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    model = LlamaForCausalLM(config).to("cuda", dtype)
    options = {"loops": 2, "capacities": [1.0, 0.25], "std": 0.5, **options}
    module = depthc.compile(model, "mor", kwargs={"input_ids": tokens(0)}, kv=kv, **options).train()
    module.kernels = KERNELS
    return module


def tokens(seed: int, length: int = 256) -> Tensor:
    return torch.randint(97, (4, length), generator=torch.Generator().manual_seed(seed)).cuda()


def step(module: Callable[..., Any], ids: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Logits and gradients of a training step."""
    logits = module(input_ids=ids).logits
    return [logits, *torch.autograd.grad(logits.float().square().mean(), params)]


def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of `run`, and where its replays write: a wait for the device is an error in here."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    return graph, made


@pytest.mark.parametrize("kv", KEYS)
def test_a_training_step_in_a_graph(kv: str) -> None:
    module = routed(kv)
    params, ids = [p for p in module.parameters() if p.requires_grad], tokens(0)
    graph, made = captured(lambda: step(module, ids, params))
    for seed in (1, 2):
        ids.copy_(tokens(seed))
        graph.replay()
        for found, wanted in zip(made, step(module, tokens(seed), params), strict=True):
            assert (found - wanted).norm() <= 1e-2 * wanted.norm()  # the library adds gradients of queries as they come


@pytest.mark.parametrize("kv", KEYS)
def test_inference_in_a_graph(kv: str) -> None:
    module = routed(kv).eval()
    module.selection = "training"  # k tokens a row
    ids = tokens(0)
    with torch.no_grad():
        graph, made = captured(lambda: [module(input_ids=ids).logits])
        for seed in (1, 2):
            ids.copy_(tokens(seed))
            graph.replay()
            assert torch.equal(made[0], module(input_ids=tokens(seed)).logits)


def choosing(dtype: torch.dtype = torch.bfloat16) -> DepthModule:
    """Token choice: three depths, of which tokens take any."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    model = LlamaForCausalLM(config).to("cuda", dtype)
    return depthc.compile(model, "mor_token", kwargs={"input_ids": tokens(0)}, sharing="cycle", std=2.0, balance=0.0)


@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_the_host_waits_once_for_all_depths(batch: int) -> None:
    module, ids = choosing().eval(), tokens(0)[:batch]
    module(input_ids=ids)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            module(input_ids=ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("called a synchronizing" in str(warning.message) for warning in said) == 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["eager", "whole"])
def test_depths_that_tokens_choose_in_a_graph(training: bool, form: str) -> None:
    """Nothing waits for how many there are; the library's products and attention leave the others out."""
    torch.compiler.reset()
    module, ids = choosing().train(training), tokens(0)
    params = [p for p in module.parameters() if p.requires_grad]
    module.bounded, run = True, module

    def once(run: Callable[..., Any], ids: Tensor) -> list[Tensor]:
        if training:
            return step(run, ids, params)
        with torch.no_grad():
            return [run(input_ids=ids).logits]

    once(module, ids)  # rows are traced before the whole is
    if form == "whole":
        run = torch.compile(module, fullgraph=True)  # type: ignore[assignment]
    graph, made = captured(lambda: once(run, ids))
    for seed in (1, 2):
        ids.copy_(tokens(seed))
        graph.replay()
        module.bounded = False
        for found, wanted in zip(made, once(module, tokens(seed)), strict=True):
            assert (found - wanted).norm() <= 3e-2 * wanted.norm()
        module.bounded = True


@pytest.mark.parametrize("kv", KEYS)
@pytest.mark.parametrize("form", ["eager", "bodies", "whole"])
def test_errors_are_at_most_twice_those_of_plain_torch(kv: str, form: str) -> None:
    """Against the same weights in fp64; where both choose the same tokens."""
    torch.compiler.reset()
    module, exact = routed(kv), routed(kv, torch.float64)
    exact.load_state_dict({name: t.double() for name, t in module.state_dict().items()})
    exact.kernels = ()
    params = [[p for p in one.parameters() if p.requires_grad] for one in (module, exact)]
    right = step(exact, tokens(1), params[1])
    module.kernels = ()
    plain = step(module, tokens(1), params[0])
    module.kernels = KERNELS
    if form == "bodies":
        module.compile()
    if form == "whole":
        step(module, tokens(1), params[0])  # rows are traced before the whole is
        module = torch.compile(module, fullgraph=True)  # type: ignore[assignment]
    found = step(module, tokens(1), params[0])
    for one, other, wanted in zip(found, plain, right, strict=True):
        assert (one - wanted).norm() <= 2 * (other - wanted).norm() + 1e-6 * wanted.norm()


def test_activations_scale_with_the_chosen_tokens() -> None:
    """What a step keeps beyond what all its tokens need."""

    def kept(capacity: float) -> int:
        module = routed("recursion", capacities=[1.0, capacity])
        ids = tokens(0, 1024)
        gc.collect()  # what earlier models hold is not freed meanwhile
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = module(input_ids=ids)
        found = torch.cuda.memory_allocated() - before
        del out
        return found

    most, half, least = kept(3 / 4), kept(1 / 2), kept(1 / 4)  # all tokens are a case of their own
    assert (half - least) / (most - least) == pytest.approx(0.5, abs=0.02)
    assert most - least <= (kept(1.0) - least) * 0.75  # all that two layers keep goes with their tokens
