"""Backward pass, gradients of keys and values: a program walks over the queries that may see a tile of keys.

It does so for all query heads that share the key head, so nothing is added atomically. Scores are computed as K Q^T:
on Hopper, Triton from 3.4 to 3.7.0 may multiply by a transposed product wrongly.
"""

# Arguments of kernels have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from depthc.codegen.kernels.shared_attention.kernel_common import (
    LOG2E,
    load_places,
    load_rows,
    scaled,
    slope,
    store_rows,
    visible,
)


@triton.jit
def spans_kernel(
    positions, valid, spans, count, window, QUERIES: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr
):
    """Writes spans[batch, tile of keys, 4]: (first, whole, partial, last) of the queries that see the tile.

    They lie in [first, last). Tiles of queries that see all its keys begin in [whole, partial); those in [first, whole)
    and [partial, last) need a mask. All queries are looked at, so this holds in whatever order they come.
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    low = tile * KEYS
    high = low + KEYS - 1
    first, behind, ahead, last = count, 0, count, 0
    for start in range(0, count, CHUNK):
        at = start + tl.arange(0, CHUNK)
        place = load_places(positions + row * count, None if valid is None else valid + row * count, at, count)
        sees = place >= low
        if window is not None:
            sees &= place - window < high
            ahead = tl.minimum(ahead, tl.min(tl.where((place >= 0) & (place - window >= low), at, count), 0))
        first = tl.minimum(first, tl.min(tl.where(sees, at, count), 0))
        last = tl.maximum(last, tl.max(tl.where(sees, at + 1, 0), 0))
        behind = tl.maximum(behind, tl.max(tl.where((place >= 0) & (place < high), at + 1, 0), 0))
    first = first // QUERIES * QUERIES
    whole = tl.minimum(tl.maximum(tl.cdiv(behind, QUERIES) * QUERIES, first), last)
    partial = tl.maximum(tl.where(ahead >= last, last, ahead // QUERIES * QUERIES), whole)
    spans += (row * tl.num_programs(0) + tile) * 4
    tl.store(spans, first)
    tl.store(spans + 1, whole)
    tl.store(spans + 2, partial)
    tl.store(spans + 3, last)


@triton.jit
def _collect(
    state, keys, values, key_at, q, dout, lse, delta, positions, valid,
    q_head, q_token, dout_head, dout_token,
    groups, count, first, last, window, scale, softcap,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, without the scale, and values after the tiles of queries that begin in [first, last)."""
    dk, dv = state
    tiles = tl.cdiv(tl.maximum(last - first, 0), QUERIES)
    # One loop for tiles and heads: a loop in a loop takes more registers, and fills its pipeline once a head.
    for step in range(0, groups * tiles):
        member = tl.cast(step // tiles, tl.int64)
        start = first + step % tiles * QUERIES
        at = start + tl.arange(0, QUERIES)
        wanted = at < count
        if valid is not None:
            wanted = tl.load(valid + at, mask=wanted, other=0) != 0
        queries = load_rows(q + member * q_head, start, q_token, wanted, D, QUERIES, WIDTH)
        douts = load_rows(dout + member * dout_head, start, dout_token, wanted, D, QUERIES, WIDTH)
        log = tl.load(lse + member * count + at, mask=wanted, other=float("-inf"))
        log = tl.where(log > float("-inf"), log * LOG2E, float("inf"))  # queries that see nothing have weights 0
        mean = tl.load(delta + member * count + at, mask=wanted, other=0.0)
        scores = scaled(tl.dot(keys, tl.trans(queries), input_precision=PRECISION), scale, softcap)
        weights = tl.exp2(scores - log[None, :])
        if MASKED:
            seen = visible(load_places(positions, valid, at, count)[None, :], key_at[:, None], window)
            weights = tl.where(seen, weights, 0.0)
        dv = tl.dot(weights.to(douts.dtype), douts, dv, input_precision=PRECISION)
        dweights = tl.dot(values, tl.trans(douts), input_precision=PRECISION)
        dscores = weights * (dweights - mean[None, :])
        if softcap is not None:
            dscores *= slope(scores, softcap)
        if MASKED:
            dscores = tl.where(seen, dscores, 0.0)  # a key that nobody sees may be NaN, its gradient is 0
        dk = tl.dot(dscores.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def keys_kernel(
    q, k, v, positions, valid, keep, spans, lse, dout, delta, dk, dv,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, dout_row, dout_head, dout_token, dk_row,
    dk_head, dk_token, dv_row, dv_head, dv_token,
    heads, groups, count, size, window, scale, softcap,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Earlier keys are seen by more queries: the longest programs start first.
    tile, key_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tile * KEYS
    at = start + tl.arange(0, KEYS)
    kept = at < size
    if keep is not None:
        kept = tl.load(keep + row * size + at, mask=kept, other=0) != 0
    keys = load_rows(k + row * k_row + key_head * k_head, start, k_token, kept, D, KEYS, WIDTH)
    values = load_rows(v + row * v_row + key_head * v_head, start, v_token, kept, D, KEYS, WIDTH)
    positions += row * count
    if valid is not None:
        valid += row * count
    spans += (row * tl.num_programs(0) + tile) * 4
    first, whole, partial, last = tl.load(spans), tl.load(spans + 1), tl.load(spans + 2), tl.load(spans + 3)

    head = key_head * groups
    flat = (row * heads + head) * count
    q += row * q_row + head * q_head
    dout += row * dout_row + head * dout_head
    rows = q, dout, lse + flat, delta + flat, positions, valid, q_head, q_token, dout_head, dout_token, groups, count
    state = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    state = _collect(
        state, keys, values, at, *rows, first, whole, window, scale, softcap, D, WIDTH, QUERIES, PRECISION, True
    )
    state = _collect(
        state, keys, values, at, *rows, whole, partial, window, scale, softcap, D, WIDTH, QUERIES, PRECISION, False
    )
    if window is not None:
        state = _collect(
            state, keys, values, at, *rows, partial, last, window, scale, softcap, D, WIDTH, QUERIES, PRECISION, True
        )
    acc_k, acc_v = state
    # Rows of keys that do not take part hold anything: they are zeros only now.
    acc_k, acc_v = tl.where(kept[:, None], acc_k * scale, 0.0), tl.where(kept[:, None], acc_v, 0.0)
    inside = at < size
    store_rows(dk + row * dk_row + key_head * dk_head, start, dk_token, acc_k, inside, D, KEYS, WIDTH)
    store_rows(dv + row * dv_row + key_head * dv_head, start, dv_token, acc_v, inside, D, KEYS, WIDTH)
