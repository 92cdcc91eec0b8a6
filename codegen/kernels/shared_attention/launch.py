"""Launches of the kernels: grids, strides, outputs. Nothing here waits for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from depthc.codegen.kernels.common import precision
from depthc.codegen.kernels.shared_attention.kernel_forward import forward_kernel
from depthc.codegen.kernels.shared_attention.kernel_keys import keys_kernel, spans_kernel
from depthc.codegen.kernels.shared_attention.kernel_queries import queries_kernel
from depthc.codegen.kernels.shared_attention.tiles import Plan, Tiles, plan_of, width_of

CHUNK = 1024  # positions that the kernel of spans reads at a time


class Inputs(NamedTuple):
    """What forward and backward have in common."""

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    valid: Tensor | None
    keep: Tensor | None
    scale: float
    window: int | None
    softcap: float | None

    @property
    def plan(self) -> Plan:
        return plan_of(self.q.shape[3], self.q.dtype.itemsize)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Query heads, query heads a key head, queries, keys."""
        heads, count = self.q.shape[1:3]
        return heads, heads // self.k.shape[1], count, self.k.shape[2]

    @property
    def scores(self) -> tuple[int | None, float, float | None]:
        return self.window, self.scale, self.softcap

    def constants(self, tiles: Tiles) -> dict[str, object]:
        """What a kernel is compiled for."""
        return {
            "D": self.q.shape[3],
            "WIDTH": width_of(self.q.shape[3]),
            "QUERIES": tiles.queries,
            "KEYS": tiles.keys,
            "PRECISION": precision(),
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }


def strides(*tensors: Tensor) -> list[int]:
    """Strides of [batch, head, token] of each; features lie side by side."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def forward(given: Inputs, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """Output, laid out as the queries are, and logsumexp."""
    tiles = tiles or given.plan.forward
    q, k, v, positions, valid, keep = given[:6]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    grid = triton.cdiv(q.shape[2], tiles.queries), q.shape[1], q.shape[0]
    tensors = q, k, v, positions, valid, keep, out, lse
    forward_kernel[grid](*tensors, *strides(q, k, v, out), *given.sizes, *given.scores, **given.constants(tiles))
    return out, lse


def gradient_of_queries(
    given: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """dq, and the mean gradient of the weights of every query."""
    tiles = tiles or given.plan.queries
    q, k, v, positions, valid, keep = given[:6]
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    grid = triton.cdiv(q.shape[2], tiles.queries), q.shape[1], q.shape[0]
    tensors = q, k, v, positions, valid, keep, out, lse, dout, dlse, delta, dq
    layout = strides(q, k, v, out, dout, dq)
    queries_kernel[grid](*tensors, *layout, *given.sizes, *given.scores, **given.constants(tiles))
    return dq, delta


def gradients_of_keys(
    given: Inputs, lse: Tensor, dout: Tensor, delta: Tensor, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """dk and dv."""
    tiles = tiles or given.plan.keys
    q, k, v, positions, valid, keep = given[:6]
    batch, count, cuts = q.shape[0], q.shape[2], triton.cdiv(k.shape[2], tiles.keys)
    spans = torch.empty((batch, cuts, 4), dtype=torch.int32, device=q.device)
    cut = {"QUERIES": tiles.queries, "KEYS": tiles.keys, "CHUNK": CHUNK}
    spans_kernel[cuts, batch](positions, valid, spans, count, given.window, **cut)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    tensors = q, k, v, positions, valid, keep, spans, lse, dout, delta, dk, dv
    layout = strides(q, k, v, dout, dk, dv)
    grid = cuts, k.shape[1], batch
    keys_kernel[grid](*tensors, *layout, *given.sizes, *given.scores, **given.constants(tiles))
    return dk, dv
