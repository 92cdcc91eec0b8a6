"""One of several processes that run a part each of staggered models; `test_distributed.py` starts them all.

It is given the text of every program, and of the weights those of its own part alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.moe
import transformers.modeling_outputs  # noqa: F401  what the programs return
from oracles import Wide
from routed import logits_of
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

import depthc
from depthc.ir.errors import StateDictError
from depthc.runtime.distributed import Stage, generate


class Log(TorchDispatchMode):
    """What a process does, in order: ("send", target, shape), ("receive", source), and "layers" at every attention."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []
        self.isend, self.recv = distributed.isend, distributed.recv
        distributed.isend, distributed.recv = self._isend, self._recv

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if "softmax" in str(func) or "attention" in str(func):
            self.events.append("layers")
        return func(*args, **(kwargs or {}))

    def _isend(self, tensor: Tensor, dst: int, *args: Any) -> Any:
        self.events.append(("send", dst, tuple(tensor.shape)))
        return self.isend(tensor, dst, *args)

    def _recv(self, tensor: Tensor, src: int, *args: Any) -> Any:
        self.events.append(("receive", src))
        return self.recv(tensor, src, *args)

    def taken(self) -> list[Any]:
        """What happened since the last call."""
        taken, self.events = self.events, []
        return taken


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def run(job: Mapping[str, Any], log: Log) -> dict[str, Any]:
    """A prompt and further tokens, some a step; then generation."""
    program = depthc.parse(job["text"]).with_weights(job["weights"])
    stage, fixed, tokens, prompt = Stage(program), job["fixed"], job["tokens"], job["prompt"]
    width = job["at_once"]
    log.taken()  # what an earlier generation did
    with Wide(), log:
        out, past = stage.start(**fixed, **{n: v[:, :prompt] for n, v in tokens.items()})
        outputs, events = [out], [log.taken()]
        for t in range(prompt, next(iter(tokens.values())).shape[1], width):
            out, past = stage.step(past, **{n: v[:, t : t + width] for n, v in tokens.items()})
            outputs.append(out)
            events.append(log.taken())
        generated = [generate(program, job["ids"], 5, **options) for options in job["generations"]]
    first, *others = job["weights"]
    with pytest.raises(StateDictError, match=re.escape(first)):
        Stage(program.with_weights({n: job["weights"][n] for n in others}))
    return {
        "logits": torch.cat([logits_of(out) for out in outputs], 1) if stage.last else outputs,
        "events": events,
        "generated": generated,
        "weight_bytes": bytes_of(stage.program.weights.values()),
        "cache_bytes": past.cache_bytes,
    }


def main(rank: int, folder: Path) -> None:
    jobs, ranks = torch.load(folder / f"{rank}.pt", weights_only=False)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    log = Log()
    with torch.no_grad():
        found = {name: run(job, log) for name, job in jobs.items()}
    distributed.destroy_process_group()
    torch.save(found, folder / f"found{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
