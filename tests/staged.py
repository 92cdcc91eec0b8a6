"""One of several processes that run a part each of staggered models; `test_distributed.py` starts them all.

It is given the text of every program, and of the weights those of its own part alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from oracles import Wide
from torch import Tensor, distributed

import depthc
from depthc.runtime.distributed import Stage, generate


class Sent:
    """Counts what this process sends: (target, shape) of every message."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, tuple[int, ...]]] = []
        self.isend = distributed.isend
        distributed.isend = self  # type: ignore[assignment]

    def __call__(self, tensor: Tensor, dst: int, *args: Any) -> Any:
        self.messages.append((dst, tuple(tensor.shape)))
        return self.isend(tensor, dst, *args)

    def taken(self) -> list[tuple[int, tuple[int, ...]]]:
        """What was sent since the last call."""
        taken, self.messages = self.messages, []
        return taken


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def run(job: dict[str, Any], sent: Sent) -> dict[str, Any]:
    """A prompt and further tokens one by one; then generation."""
    program = depthc.parse(job["text"]).with_weights(job["weights"])
    stage, fixed, tokens, prompt = Stage(program), job["fixed"], job["tokens"], job["prompt"]
    length = next(iter(tokens.values())).shape[1]
    out, past = stage.start(**fixed, **{n: v[:, :prompt] for n, v in tokens.items()})
    outputs, messages = [out], [sent.taken()]
    for t in range(prompt, length):
        out, past = stage.step(past, **{n: v[:, t : t + 1] for n, v in tokens.items()})
        outputs.append(out)
        messages.append(sent.taken())
    return {
        "outputs": outputs,
        "messages": messages,
        "weights": bytes_of(stage.program.weights.values()),
        "layers": len(stage.part.layers),
        "cache_bytes": past.cache_bytes,
        "caches": {site: [tuple(t.shape) for c in kept.caches for t in c or ()] for site, kept in past.caches.items()},
        "generated": [generate(program, job["ids"], 5, **options) for options in job["generations"]],
    }


def main(rank: int, folder: Path) -> None:
    jobs = torch.load(folder / f"jobs{rank}.pt", weights_only=False)
    ranks = int((folder / "ranks").read_text())
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    sent = Sent()
    with torch.no_grad():
        found = {}
        for name, job in jobs.items():
            with Wide():
                found[name] = run(job, sent)
            sent.taken()
    distributed.destroy_process_group()
    torch.save(found, folder / f"found{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
