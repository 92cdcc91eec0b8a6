"""Staggered stacks on two GPUs, a process each, with NCCL: as one process, from the weights of a part alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import Tensor, distributed
from transformers import LlamaConfig, LlamaForCausalLM

import depthc
from depthc.codegen.module import DepthModule
from depthc.runtime.distributed import Stage, generate
from depthc.runtime.split import split

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PROMPT, LENGTH, NEW = 5, 12, 8


def staggered(recipe: str) -> tuple[DepthModule, Tensor]:
    """A model all of whose parameters count, and tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    model, tokens = LlamaForCausalLM(config).eval(), torch.randint(97, (3, LENGTH))
    module = depthc.compile(model, recipe, kwargs={"input_ids": tokens}).eval()
    with torch.no_grad():  # cross-attention starts at zero
        for param in module.parameters():
            param.add_(0.05 * torch.randn_like(param))
    return module, tokens


@pytest.mark.parametrize("recipe", ["stagger()", "stagger(shared=True, window=3)"])
def test_two_gpus(recipe: str, tmp_path: Path) -> None:
    module, tokens = staggered(recipe)
    for part in split(module.program).parts:
        own = {name: module.program.weights[name].detach().clone() for name in part.weights}
        torch.save((str(module.program), own, tokens), tmp_path / f"{part.number}.pt")
    run_ranks(__file__, 2, tmp_path, limit=200)
    found: list[dict[str, Any]] = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
    module, tokens = module.cuda(), tokens.cuda()
    expected = module(input_ids=tokens).logits.cpu()
    assert (found[1]["logits"] - expected).norm() <= 1e-4 * expected.norm()
    wanted = depthc.generate(module, tokens[:, :PROMPT], NEW).cpu()
    assert all(torch.equal(rank["generated"], wanted) for rank in found)
    assert [rank["device"] for rank in found] == ["cuda:0", "cuda:1"]


def run(rank: int, folder: Path) -> None:
    """One of the processes."""
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    text, own, tokens = torch.load(folder / f"{rank}.pt")
    tokens, program = tokens.cuda(), depthc.parse(text).with_weights({name: t.cuda() for name, t in own.items()})
    stage = Stage(program)
    with torch.no_grad():
        out, past = stage.start(input_ids=tokens[:, :PROMPT])
        outputs = [out]
        for at in range(PROMPT, LENGTH):
            out, past = stage.step(past, input_ids=tokens[:, at : at + 1])
            outputs.append(out)
    made = generate(program, tokens[:, :PROMPT], NEW)
    logits = torch.cat([one.logits for one in outputs], 1).cpu() if stage.last else None
    device = str(next(iter(program.weights.values())).device)
    torch.save({"logits": logits, "generated": made.cpu(), "device": device}, folder / f"found{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]))
