"""How far a routed model is from exact: on a device in fp32 and bf16, beside the eager original model's own error.

    python bench/agreement.py --out bench/results/agreement.json [--device cpu]

Errors are relative, of the logits, against the same module in fp64 on the CPU. All capacities are 1, so that rounding
changes no choice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from cold import build
from machine import provenance, save
from torch import Tensor

import depthc

CASES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def off(found: Tensor, exact: Tensor) -> float:
    """The relative error."""
    return ((found.double().cpu() - exact).norm() / exact.norm()).item()


@torch.no_grad()
def agreement(device: str, kv: str) -> dict[str, Any]:
    """The errors of the routed module and of the model, in each precision."""
    ids = torch.randint(0, 256, (4, 128), generator=torch.Generator().manual_seed(1))
    routed, plain = {}, {}
    for name, dtype in CASES.items():
        where = "cpu" if name == "fp64" else device
        model, given = build(8).to(where, dtype).train(), ids.to(where)
        module = depthc.compile(model, "mor", kwargs={"input_ids": given}, kv=kv, capacities=(1.0, 1.0, 1.0))
        routed[name], plain[name] = module(input_ids=given).logits, model(input_ids=given).logits
    return {
        name: {"routed": off(routed[name], routed["fp64"]), "model": off(plain[name], plain["fp64"])}
        for name in ("fp32", "bf16")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cases = {kv: agreement(options.device, kv) for kv in ("recursion", "share_first")}
    save(provenance(options.device) | {"cases": cases}, options.out)
    return int(any(row["routed"] > 2 * row["model"] for case in cases.values() for row in case.values()))


if __name__ == "__main__":
    sys.exit(main())
