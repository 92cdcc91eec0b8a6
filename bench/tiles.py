"""Tile sizes of shared attention: the candidates of each kernel, compiled side by side, then timed one after the other.

    python bench/tiles.py --features 128 --heads 16 --key-heads 8 --out bench/results/tiles-128.json

On a GPU, a minute each. `codegen/kernels/shared_attention/tiles.py` has the fastest. Inputs are those of
`bench/routing.py`: bf16, a batch of 16, 682 of 2048 tokens at random positions.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from machine import provenance, save
from rich.progress import track
from routing_ops import inputs_of
from routing_plan import ONE_IN_THREE, Sizes
from torch import Tensor

from depthc.codegen.kernels.shared_attention.tiles import Tiles

KERNELS = ("forward", "queries", "keys")
PRODUCTS = {"forward": 4, "queries": 6, "keys": 8}  # operations a pair of query and key, feature and head
LARGEST = 128 * 128  # scores that a tile holds
Job = tuple[str, Tiles]


def candidates() -> Iterator[Job]:
    """Every kernel with all tiles that may be fast."""
    for kernel in KERNELS:
        stages = (1, 2, 3) if kernel == "keys" else (2, 3, 4)
        for queries, keys, warps, depth in product((32, 64, 128), (32, 64, 128), (4, 8), stages):
            if queries * keys <= LARGEST and not (kernel == "forward" and queries == 32):
                yield kernel, Tiles(queries, keys, warps, depth)


@cache
def _inputs(sizes: Sizes) -> dict[str, Any]:
    """What the kernels take."""
    from depthc.codegen.kernels.shared_attention import launch

    x = inputs_of(sizes, max(1, int(ONE_IN_THREE * sizes.tokens)), "cuda", 0)
    given = launch.Inputs(x.q, x.k, x.v, x.positions, None, None, x.q.shape[3] ** -0.5, None, None)
    out, lse = launch.forward(given)
    dout = torch.randn_like(out)
    _, delta = launch.gradient_of_queries(given, out, lse, dout, None)
    return {"given": given, "out": out, "lse": lse, "dout": dout, "delta": delta}


def _run(job: Job, sizes: Sizes) -> tuple[Tensor, ...]:
    """One launch."""
    from depthc.codegen.kernels.shared_attention import launch

    (kernel, tiles), x = job, _inputs(sizes)
    if kernel == "forward":
        return launch.forward(x["given"], tiles)
    if kernel == "queries":
        return launch.gradient_of_queries(x["given"], x["out"], x["lse"], x["dout"], None, tiles)
    return launch.gradients_of_keys(x["given"], x["lse"], x["dout"], x["delta"], tiles)


def _compiled(job: Job, sizes: Sizes) -> str | None:
    """Why a candidate does not run, after it is in Triton's cache."""
    try:
        _run(job, sizes)
        torch.cuda.synchronize()
    except Exception as error:  # what compilers and devices raise has no common base
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def measure(sizes: Sizes) -> list[dict[str, Any]]:
    """A row a candidate, the fastest of each kernel first."""
    import triton

    jobs, context = list(candidates()), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        reasons = list(pool.map(_compiled, jobs, [sizes] * len(jobs)))
    positions, rows = _inputs(sizes)["given"].positions, []
    pairs = int((positions + 1).sum()) * sizes.width
    for (kernel, tiles), reason in track(list(zip(jobs, reasons, strict=True)), "timing"):
        row: dict[str, Any] = {"kernel": kernel, "tiles": asdict(tiles)}
        if reason is None:
            time = triton.testing.do_bench(lambda job=(kernel, tiles): _run(job, sizes), return_mode="median") / 1e3
            row |= {"seconds": time, "tflops": PRODUCTS[kernel] * pairs / time / 1e12}
        rows.append(row if reason is None else row | {"failed": reason})
    return sorted(rows, key=lambda row: (KERNELS.index(row["kernel"]), row.get("seconds", float("inf"))))


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=128, help="of a head (default: 128)")
    parser.add_argument("--heads", type=int, default=16, help="default: 16")
    parser.add_argument("--key-heads", type=int, default=8, help="default: 8")
    parser.add_argument("--out", type=Path, help="where results go")
    options = parser.parse_args(given)
    sizes = Sizes(options.features * options.heads, options.heads, options.key_heads)
    save(provenance("cuda") | {"sizes": asdict(sizes), "rows": measure(sizes)}, options.out)


if __name__ == "__main__":
    main()
