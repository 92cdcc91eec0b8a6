"""Attention of one token as an op: kernels where they apply, plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from depthc.codegen.kernels.common import GRID, on, precision, refused_heads
from depthc.codegen.kernels.decode_attention.reference import reference
from depthc.codegen.kernels.decode_attention.tiles import QUERIES, options_of, queries_of, tiles_of, width_of
from depthc.ir.errors import InputError


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    place: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one query a head to all rows of a cache, as in a step of decoding.

    Like `scaled_dot_product_attention`, but that a query that sees no row has output 0. There is no backward pass.
    The kernels run where `applies` has nothing against them, else the reference does.

    Args:
        q: [batch, head, 1, feature].
        k, v: [batch, key head, row, feature]; query heads are a multiple of key heads.
        mask: bool, which rows are seen, or floats that are added to scores; broadcast to [batch, head, 1, row].
        place: int64[1, 1], where the query's token is; caches are rings (`depthc.ir.rows.rings`), and only rows of
            tokens up to it count. None: all rows do.
        scale: factor on the products of queries and keys; 1 over the root of the features by default.

    Returns:
        Output [batch, head, 1, feature].

    Raises:
        InputError: shapes that do not fit together.

    Example:
        >>> q, k = torch.ones(1, 2, 1, 16), torch.ones(1, 1, 4, 16)
        >>> v = torch.arange(4.0)[None, None, :, None].expand(k.shape)
        >>> decode_attention(q, k, v, place=torch.tensor([[1]]))[0, :, 0, 0]  # of the values 0 and 1
        tensor([0.5000, 0.5000])
    """
    _check(q, k, v, mask, place)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run = reference if applies(q, k, v) else decode_attention_op
    return run(q, k, v, mask, place, scale)  # type: ignore[no-any-return]


def applies(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels do not take such queries, keys and values; None if they do.

    Example:
        >>> half = torch.ones(1, 2, 1, 300, dtype=torch.half)
        >>> applies(half, half, half)
        'heads have 300 features, more than 256'
    """
    if reason := refused_heads(q, k, v):
        return reason
    if (held := queries_of(q, k) * width_of(q) * q.element_size()) > QUERIES:
        return f"the queries of a key head take {held} bytes, more than {QUERIES}"
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return "gradients are wanted, and the kernels have no backward pass" if wanted else None


def attend(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor] | None:
    """The op for such queries, keys and values; None where no kernel takes them (`depthc.ir.rows.rings`)."""
    fits = k.shape == v.shape and k.shape[3] == q.shape[3] and q.shape[1] % k.shape[1] == 0 and q.shape[2] == 1
    return decode_attention if fits and applies(q, k, v) is None else None


@torch.library.custom_op("depthc::decode_attention", mutates_args=())
def decode_attention_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, place: Tensor | None, scale: float
) -> Tensor:
    """The output by the kernels."""
    import triton

    from depthc.codegen.kernels.decode_attention.kernel import share_kernel, sum_kernel

    (batch, heads, _, features), (key_heads, size) = q.shape, k.shape[1:3]
    if max(batch, heads) > GRID:  # a compiler asks `applies` about other sizes than a run has
        return reference(q, k, v, mask, place, scale)
    width, out = width_of(q), _like(q)
    tiles = tiles_of(batch, key_heads, size, width * q.element_size())
    parts = (batch, heads, tiles.splits)
    whole = tiles.splits == 1
    acc, top, total = (q.new_empty(shape, dtype=torch.float32) for shape in ((*parts, features), parts, parts))
    told = mask if mask is None else mask.expand(batch, heads, 1, size)
    layout = [*q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *_layout(told)]
    constants: dict[str, Any] = {
        "ADDED": mask is not None and mask.dtype is not torch.bool,
        "WHOLE": whole,
        "D": features,
        "WIDTH": width,
        "QUERIES": queries_of(q, k),
        "KEYS": tiles.keys,
        **options_of(features),
        "PRECISION": precision(),
    }
    with on(q):
        share_kernel[tiles.splits, key_heads, batch](
            q, k, v, told, place, acc, top, total, out, *layout,
            heads, heads // key_heads, size, tiles.share, scale, **constants,
        )  # fmt: skip
        if not whole:
            splits = triton.next_power_of_2(tiles.splits)
            sum_kernel[(batch * heads,)](acc, top, total, out, tiles.splits, D=features, WIDTH=width, SPLITS=splits)
    return out


@decode_attention_op.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return _like(q)


def _like(q: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _layout(mask: Tensor | None) -> tuple[int, int, int]:
    """From sequence to sequence, from head to head, and from row to row."""
    return (0, 0, 0) if mask is None else (mask.stride(0), mask.stride(1), mask.stride(3))


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, place: Tensor | None) -> None:
    """Shapes that do not fit are errors, since kernels would read elsewhere."""
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape[1] > 0
    if fits:
        (batch, heads, count, features), (_, key_heads, size, _) = q.shape, k.shape
        fits = k.shape == v.shape == (batch, key_heads, size, features) and heads % key_heads == 0 and count == 1
    fits = fits and (place is None or place.shape == (1, 1))
    if fits and mask is not None:
        fits = mask.dtype is torch.bool or mask.is_floating_point()
        wanted = (batch, heads, 1, size)[4 - mask.dim() :]
        fits = fits and mask.dim() <= 4 and all(n in (1, m) for n, m in zip(mask.shape, wanted, strict=True))
    if not fits:
        given = {"q": q, "k": k, "v": v, "mask": mask, "place": place}
        raise InputError(
            "shapes of decode_attention do not fit together",
            expected="q [B, H, 1, d]; k, v [B, Hkv, R, d], Hkv dividing H; mask [B, H, 1, R]; place [1, 1]",
            found=", ".join(f"{name} {x.dtype} {list(x.shape)}" for name, x in given.items() if x is not None),
            remedy="give one query a head",
        )
