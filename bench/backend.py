"""The backend of torch.compile against Inductor on the whole model: the first compiled step, and numbers against eager.

    python bench/backend.py --out bench/results/backend.json [--device cpu] [--layers 32] [--rounds 2]

Each row is a process of its own without any compiler cache; the two backends take turns. `first` is `torch.compile` and
a training forward and backward, with everything compiled on the way; `cpu` are the processor seconds that it took,
workers included, which other work on the machine changes less. Then five models are compared with eager: outputs and
all gradients.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from architectures import ZOO
from architectures.base import perturb
from cold import BATCH, LENGTH, build, step
from compare import difference, gradients, without_cache
from machine import in_a_process, provenance, save
from torch._inductor.async_compile import shutdown_compile_workers

LIMIT = 1500  # seconds for a row
BACKENDS = ("inductor", "depthc")
MODELS = ("llama", "gpt2", "bert", "vit", "nanogpt")


class OnlyByDepth(logging.Handler):
    """Fails where the backend says that it gave a graph to Inductor as it is: that would measure Inductor twice."""

    def emit(self, record: logging.LogRecord) -> None:
        if "compiled as it is" in record.getMessage():
            raise RuntimeError(record.getMessage())


def cpu_seconds() -> float:
    """Processor seconds of this process and of the compilers that it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(backend: str, device: str, layers: int) -> dict[str, Any]:
    """One row: first and later compiled step, an eager one, and the relative error of the logits."""
    ids = torch.randint(0, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    model: Any = build(layers).to(device).train()
    step(model, ids)  # the device is warm
    expected, eager = step(model, ids)
    before, start = cpu_seconds(), time.perf_counter()
    compiled = torch.compile(model, backend=backend)  # depthc begins here with what Dynamo need not precede
    found, _ = step(compiled, ids)
    first = time.perf_counter() - start
    shutdown_compile_workers()  # only then is what they used counted
    used = cpu_seconds() - before
    later = min(step(compiled, ids)[1] for _ in range(3))
    error = ((found - expected).norm() / expected.norm()).item()
    return {"first": first, "cpu": used, "later": later, "eager": eager, "error": error}


class Compiled(torch.nn.Module):
    """A compiled model under the names of its parameters."""

    def __init__(self, model: torch.nn.Module, backend: str) -> None:
        super().__init__()
        self.model, self.call = model, torch.compile(model, backend=backend)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.named_parameters(*args, **kwargs)


def errors(name: str, device: str) -> dict[str, Any]:
    """The largest error of the outputs of a model, and of its gradients relative to the norm of each.

    Norms below a thousandth of the largest count as that: the gradient of a bias of keys is zero but for rounding.
    """
    entry = ZOO[name]
    model = perturb(entry.build()).to(device).eval()  # dropout off: Inductor draws by its own law
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), entry.example())
    kwargs = without_cache(model, kwargs)
    row: dict[str, Any] = {"layers": sum(entry.depths)}
    expected, wanted = gradients(model, args, kwargs)
    least = 1e-3 * max(g.norm().item() for g in wanted.values())
    for backend in BACKENDS:
        torch.compiler.reset()
        found, grads = gradients(Compiled(model, backend), args, kwargs)
        gaps = [(grads[n] - g).norm() / g.norm().clamp(min=least) for n, g in wanted.items()]
        row[backend] = {"outputs": difference(found, expected), "gradients": max(gaps).item()}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row or options.model:
        log = logging.getLogger("depthc.backend")
        log.setLevel(logging.INFO)
        log.addHandler(OnlyByDepth())
        row, device = options.row, options.device
        print(json.dumps(measure(row, device, options.layers) if row else errors(options.model, device)))
        return 0
    common = ["--device", options.device, "--layers", str(options.layers)]
    report = provenance(options.device) | {"layers": options.layers, "rows": [], "models": []}
    for _ in range(options.rounds):
        for backend in BACKENDS:
            row = in_a_process(__file__, ["--row", backend, *common], LIMIT)
            report["rows"].append({"backend": backend, **row})
            save(report, options.out)
    for name in MODELS:
        report["models"].append({"model": name, **in_a_process(__file__, ["--model", name, *common], LIMIT)})
        save(report, options.out)
    return int(any("failed" in row for row in (*report["rows"], *report["models"])))


if __name__ == "__main__":
    sys.exit(main())
