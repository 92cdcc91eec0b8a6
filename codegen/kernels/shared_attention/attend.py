"""Shared-KV attention in the place of an attention op of a block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from depthc.codegen.kernels.shared_attention.op import applies, shared_attention


def attend(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor] | None:
    """The function for such queries, keys and values; None where no kernel takes them (`depthc.ir.rows.fitting`)."""
    fits = k.shape[1] == v.shape[1] and k.shape[3] == v.shape[3] == q.shape[3] and q.shape[1] % k.shape[1] == 0
    return _attention if fits and applies(q, k, v) is None else None


def _attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, valid: Tensor | None, keep: Tensor | None, scale: float | None
) -> Tensor:
    out, _ = shared_attention(q, k, v, positions, valid=valid, keep=keep, scale=scale)
    return out
