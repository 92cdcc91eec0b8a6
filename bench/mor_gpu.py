"""A routed model on a GPU: equal to the CPU in fp32, within twice the eager model's own error in bf16, and compiled.

python bench/mor_gpu.py --out bench/results/mor_gpu.json [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import depthc


def build(layers: int, width: int, dtype: torch.dtype) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def step(module: torch.nn.Module, ids: Tensor) -> tuple[Tensor, float]:
    """Logits of a training forward and backward, and its seconds."""
    start = time.perf_counter()
    logits = module(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return logits.detach(), time.perf_counter() - start


def off(found: Tensor, expected: Tensor) -> float:
    return (found.double().cpu() - expected.double().cpu()).norm().item() / expected.double().cpu().norm().item()


def agreement(device: str, kv: str) -> dict[str, Any]:
    """The same routed model in fp64 on the CPU, and on the device in fp32 and bf16; top-k choices kept alike."""
    ids = torch.randint(0, 256, (4, 128), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {}
    options = {"kv": kv, "capacities": (1.0, 1.0, 1.0)}  # choices that rounding cannot change
    exact, plain = {}, {}
    for name, dtype, where in (
        ("fp64", torch.float64, "cpu"),
        ("fp32", torch.float32, device),
        ("bf16", torch.bfloat16, device),
    ):
        model = build(8, 128, dtype).to(where)
        routed = depthc.compile(model, "mor", kwargs={"input_ids": ids.to(where)}, **options).train()
        exact[name], plain[name] = step(routed, ids.to(where))[0], step(model.train(), ids.to(where))[0]
    for name in ("fp32", "bf16"):
        found[f"{name}_routed"], found[f"{name}_eager_model"] = (
            off(exact[name], exact["fp64"]),
            off(plain[name], plain["fp64"]),
        )
    return found


def cold(device: str, layers: int) -> dict[str, Any]:
    """Seconds of the first compiled training step (torch.compile, Inductor), each body compiled once."""
    ids = torch.randint(0, 256, (4, 128), generator=torch.Generator().manual_seed(1)).to(device)
    model = build(layers, 128, torch.float32).to(device)
    rows: dict[str, Any] = {"layers": layers, "backend": "inductor"}
    for recipe in ("identity", "tie", "mor"):
        options = {} if recipe == "identity" else {"loops": 3, "sharing": "middle_cycle"}
        compiled = depthc.compile(model, recipe, kwargs={"input_ids": ids}, **options).train()
        expected, _ = step(compiled, ids)
        torch._dynamo.reset()
        compiled.compile()
        logits, rows[f"{recipe}_bodies"] = step(compiled, ids)
        rows[f"{recipe}_error"] = off(logits, expected)
    torch._dynamo.reset()
    rows["untied_whole"] = step(torch.compile(model), ids)[1]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python bench/mor_gpu.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "agreement": {kv: agreement(options.device, kv) for kv in ("recursion", "share_first")},
        "cold": cold(options.device, options.layers),
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
