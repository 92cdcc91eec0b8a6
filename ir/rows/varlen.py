"""Attention on packed rows by the library's kernel for sequences of unequal length (`torch.nn.attention.varlen`)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from depthc.ir.axes.ops import argument
from depthc.ir.rows.counted import dtype_of, first
from depthc.ir.rows.fitting import is_plain
from depthc.ir.rows.packing import Packing
from depthc.ir.rows.schedule import Schedule

LARGEST = 256  # features a head


def available(device: torch.device) -> bool:
    """Whether there is such a kernel for a device."""
    return device.type == "cuda"


def fits(schedule: Schedule, node: fx.Node, causal: Sequence[bool]) -> bool:
    """Whether an op is attention among the rows at hand alone that the kernel can express.

    Args:
        causal: of every port, whether its mask is known to be causality and no more.
    """
    axes = schedule.axes
    if axes.kinds.get(node) != "fused":
        return False
    port = schedule.port_of[node]
    masked = argument(node, 3, "attn_mask") is not None and not (causal and causal[port])
    masked = masked or argument(node, 4, "dropout_p", 0.0) != 0.0
    plain = all(is_plain(schedule, source) for source in node.args[:3])  # type: ignore[arg-type]
    return schedule.sources[port] == "own" and not schedule.ports[port].cross and not masked and plain


def runs(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes such tensors: half precision on CUDA, heads of one size, a multiple of 8."""
    size = q.shape[-1]
    fine = size == k.shape[-1] == v.shape[-1] and size % 8 == 0 and size <= LARGEST
    return q.is_cuda and fine and dtype_of(q) in (torch.float16, torch.bfloat16)


def attend(node: fx.Node, rows: Sequence[Tensor], packing: Packing) -> Tensor:
    """What an op that fits makes of packed queries, keys and values, [1, heads, members, features]."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1).to(dtype_of(rows[0])) for x in rows)
    if k.shape[1] != v.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    ends, most = packing.ends, packing.padded.count
    causal = argument(node, 5, "is_causal", False) or argument(node, 3, "attn_mask") is not None
    window = (-1, 0 if causal else -1)
    scale = argument(node, 6, "scale", None)
    if packing.bounded:
        q, k, v = (first(x, packing.members) for x in (q, k, v))
    options: dict[str, Any] = {"enable_gqa": True} if k.shape[1] != q.shape[1] and _asks_for_groups() else {}
    out = varlen_attn(q, k, v, ends, ends, most, most, scale=scale, window_size=window, **options)
    out = first(out, packing.members) if packing.bounded else out  # type: ignore[arg-type]
    return out.transpose(0, 1)[None]  # type: ignore[union-attr]


@cache
def _asks_for_groups() -> bool:
    """Whether the function is to be told that query heads share key heads; that of torch 2.11 need not be."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
