"""Cold compilation: seconds of the first compiled training step, for each recipe and each door of torch.compile.

    python bench/cold.py --out bench/results/cold.json [--device cpu] [--layers 32]

Doors: `bodies` is `compiled.compile()`, which compiles every body once; `whole` is `torch.compile(module)`. Each row
runs in a process of its own with an empty compiler cache, after one eager step, so nothing is warm but the device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import in_a_process, provenance, save
from torch import Tensor

WIDTH, BATCH, LENGTH = 128, 4, 128
LIMIT = 150  # seconds for a row
RECIPES: dict[str, dict[str, Any]] = {
    "identity": {},
    "tie": {"loops": 3, "sharing": "middle_cycle"},
    "mor": {"loops": 3},
}
ROWS = [("model", "whole"), *((recipe, "bodies") for recipe in RECIPES), ("tie", "whole"), ("mor", "whole")]


def build(layers: int) -> torch.nn.Module:
    """A Llama of the given depth."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=WIDTH // 32,
        num_key_value_heads=WIDTH // 64,
    )
    return transformers.LlamaForCausalLM(config)


def step(module: Any, ids: Tensor) -> tuple[Tensor, float]:
    """Logits of a training forward and backward, and its seconds."""
    start = time.perf_counter()
    logits = module(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return logits.detach(), time.perf_counter() - start


def measure(recipe: str, door: str, device: str, layers: int) -> dict[str, Any]:
    """One row: first and second compiled step, an eager one, graphs compiled, and the relative error."""
    import depthc

    ids = torch.randint(0, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    module: Any = build(layers).to(device).train()
    if recipe != "model":
        module = depthc.compile(module, recipe, kwargs={"input_ids": ids}, **RECIPES[recipe])
    step(module, ids)  # rows are traced, the device is warm
    expected, eager = step(module, ids)
    compiled = module
    if door == "bodies":
        module.compile()
    else:
        compiled = torch.compile(module)
    found, first = step(compiled, ids)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    _, second = step(compiled, ids)
    error = ((found - expected).norm() / expected.norm()).item()
    return {"first": first, "second": second, "eager": eager, "graphs": graphs, "error": error}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(*options.row, options.device, options.layers)))
        return 0
    report = provenance(options.device) | {"backend": "inductor", "layers": options.layers, "rows": []}
    for recipe, door in ROWS:
        arguments = ["--row", recipe, door, "--device", options.device, "--layers", str(options.layers)]
        row = {"recipe": recipe, "door": door, **in_a_process(__file__, arguments, LIMIT)}
        report["rows"].append(row)
        save(report, options.out)
    return int(any("failed" in row for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
