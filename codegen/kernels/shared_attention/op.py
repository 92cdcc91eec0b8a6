"""Shared-KV attention as an op: selected tokens attend to the keys and values of all tokens, by their positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from depthc.codegen.kernels.common import on, refused_heads, side_by_side
from depthc.codegen.kernels.shared_attention.reference import reference
from depthc.ir.errors import InputError

FARTHEST = 1 << 23  # numbers from a token to the next: offsets inside a tile are 32-bit


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    valid: Tensor | None = None,
    keep: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of selected tokens to the keys of all tokens, causal by position.

    The query at position p sees the keys j <= p; with a window, those with j > p - window. A query that is not valid or
    sees no key has output 0 and logsumexp -inf, and gives and takes no gradient. The kernels run where `applies` has
    nothing against them, else the reference does.

    Args:
        q: [batch, head, query, feature].
        k: [batch, key head, key, feature]; query heads are a multiple of key heads.
        v: like `k`.
        positions: int64[batch, query], where each query stands among the keys. Any order is right; the kernels are fast
            where positions ascend.
        valid: bool[batch, query], which queries there are; all by default.
        keep: bool[batch, key], which keys are no padding; all by default.
        scale: factor on the products of queries and keys; 1 over the root of the features by default.
        window: how many keys a query sees at most, its own position the last of them.
        softcap: c in `c * tanh(scores / c)`.

    Returns:
        Output like `q`, and logsumexp[batch, head, query] in fp32 (in fp64 for fp64). Both have gradients.

    Example:
        >>> q, k = torch.ones(1, 2, 1, 16), torch.ones(1, 1, 3, 16)
        >>> v = torch.arange(3.0)[None, None, :, None].expand(k.shape)
        >>> out, lse = shared_attention(q, k, v, torch.tensor([[1]]))
        >>> out[0, :, 0, 0]  # of the values 0 and 1; key 2 comes later
        tensor([0.5000, 0.5000])
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, positions, valid, keep)
    kind = q.device.type
    # The meta device has no autocast. Dynamo of torch 2.11 cannot trace `torch.amp.is_autocast_available`.
    if kind != "meta" and torch.is_autocast_enabled(kind):
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
        with torch.autocast(kind, enabled=False):
            return _attend(q, k, v, positions, valid, keep, scale, window, softcap)
    return _attend(q, k, v, positions, valid, keep, scale, window, softcap)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, valid: Tensor | None, keep: Tensor | None, *scores: Any
) -> tuple[Tensor, Tensor]:
    """By the kernels or by the reference."""
    if applies(q, k, v) is not None:
        return reference(q, k, v, positions, valid, keep, *scores)
    return _forward(q, k, v, positions, valid, keep, *scores)


def applies(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels do not take such queries, keys and values; None if they do.

    Example:
        >>> half = torch.ones(1, 2, 1, 300, dtype=torch.half)
        >>> applies(half, half, half)
        'heads have 300 features, more than 256'
    """
    if any(x.stride(2) > FARTHEST for x in (q, k, v)):
        return f"tokens lie more than {FARTHEST} numbers apart"
    return refused_heads(q, k, v)


def _check(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, valid: Tensor | None, keep: Tensor | None) -> None:
    """Shapes that do not fit are errors, since kernels would read elsewhere."""
    (batch, heads, count, features), (_, key_heads, size, _) = q.shape, k.shape
    fits = k.shape == v.shape == (batch, key_heads, size, features) and heads % key_heads == 0
    fits = fits and positions.shape == (batch, count) and (valid is None or valid.shape == (batch, count))
    if not (fits and (keep is None or keep.shape == (batch, size))):
        given = {"q": q, "k": k, "v": v, "positions": positions, "valid": valid, "keep": keep}
        raise InputError(
            "shapes of shared_attention do not fit together",
            expected="q [B, H, K, d]; k, v [B, Hkv, S, d], H a multiple of Hkv; positions, valid [B, K]; keep [B, S]",
            found=", ".join(f"{name} {list(x.shape)}" for name, x in given.items() if x is not None),
            remedy="give one position a query, and one entry of keep a key",
        )


def _dense(*given: Tensor | None) -> list[Any]:
    """Tensors as the kernels read them. Here and not before the op: a trace sees other strides than a run."""
    return [x if x is None else x.contiguous() for x in given]


@torch.library.custom_op("depthc::shared_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    valid: Tensor | None,
    keep: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    # Imported when first needed: `applies` answers where there is no triton.
    from depthc.codegen.kernels.shared_attention import launch

    q, k, v = map(side_by_side, (q, k, v))
    positions, valid, keep = _dense(positions, valid, keep)
    with on(q):
        return launch.forward(launch.Inputs(q, k, v, positions, valid, keep, scale, window, softcap))


@_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("depthc::shared_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    valid: Tensor | None,
    keep: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from depthc.codegen.kernels.shared_attention import launch

    q, k, v = map(side_by_side, (q, k, v))
    positions, valid, keep = _dense(positions, valid, keep)
    given = launch.Inputs(q, k, v, positions, valid, keep, scale, window, softcap)
    with on(q):
        dq, delta = launch.gradient_of_queries(given, out, lse, dout, dlse)
        return dq, *launch.gradients_of_keys(given, lse, dout, delta)


@_backward.register_fake
def _(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:6])
    ctx.rest = inputs[6:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *inputs = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    # The gradient of a sum is expanded: its features do not lie side by side.
    dout = dout if dout.stride(3) == 1 and dout.stride(2) <= FARTHEST else dout.contiguous()
    dlse = dlse if dlse is None else dlse.contiguous()
    return *_backward(dout, dlse, out, lse, *inputs, *ctx.rest), None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
