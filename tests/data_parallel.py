"""One of two processes that train together; `test_training.py` starts both and compares what they leave."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from models import Spec, Stacked, ids, seeded
from torch import Tensor, distributed, nn

import depthc
from depthc.runtime.balance import update
from depthc.runtime.telemetry import report


class Labelled(nn.Module):
    """A language model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stacked(Spec(depth=5, dtype=torch.float64))

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.stack(ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def gradients(module: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    module(tokens, tokens)["loss"].backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in module.named_parameters()}


def moved(rank: int) -> dict[str, Tensor]:
    """How many tokens of a half chose each depth, and the bias that balances both halves after a step."""
    half = ids(4, 9, seed=22)[2 * rank : 2 * rank + 2]  # neither half moves the bias as both together do
    options = {"bias": True, "balance": 0.0, "std": 1.0}
    chooser = depthc.compile(seeded(Labelled).train(), "mor_token", args=(ids(2, 9), ids(2, 9)), **options)
    _, aux = chooser.forward_with_aux(half, half)
    update(chooser, aux, rate=0.25)
    return {"load": torch.tensor(report(aux).tokens_per_depth[1:]), "bias": chooser.parameter_of("depth.r.bias")}


def main(rank: int, folder: Path) -> None:
    """Compile under a seed of the rank's own, then compare a step alone with a step of both."""
    model = seeded(Labelled).train()
    torch.manual_seed(rank)
    noise = torch.rand(()).item()
    options = {"add_losses": True, "loss": 0.5, "init": "random"}
    compiled = depthc.compile(model, "mor", args=(ids(2, 9), ids(2, 9)), **options)
    left = {"noise": noise, "weights": copy.deepcopy(compiled.state_dict())}
    half = ids(4, 9)[2 * rank : 2 * rank + 2]
    left["alone"] = gradients(compiled, half)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    both = nn.parallel.DistributedDataParallel(compiled)
    left["plain"] = gradients(both, half)
    compiled.activation_checkpointing_enable()
    left["checkpointed"] = gradients(both, half)
    left["balance"] = moved(rank)
    distributed.destroy_process_group()
    torch.save(left, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
