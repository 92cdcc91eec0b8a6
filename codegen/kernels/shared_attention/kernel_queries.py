"""Backward pass, gradients of queries: a program walks over the keys of a tile of queries, as the forward pass does."""

# Arguments of kernels have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from depthc.codegen.kernels.shared_attention.kernel_common import (
    LOG2E,
    key_spans,
    load_kept,
    load_places,
    load_rows,
    masked,
    scaled,
    slope,
    store_rows,
)


@triton.jit
def _collect(
    dq, queries, douts, log, delta, place, k, v, keep,
    k_token, v_token,
    low, first, last, end, window, scale, softcap,
    D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries, without the scale, after the tiles of keys that begin in [first, last)."""
    for start in range(first, last, KEYS):
        at = start + tl.arange(0, KEYS)
        kept = load_kept(keep, at, low, end, MASKED)
        keys = load_rows(k, start, k_token, kept, D, KEYS, WIDTH)
        values = load_rows(v, start, v_token, kept, D, KEYS, WIDTH)
        scores = scaled(tl.dot(queries, tl.trans(keys), input_precision=PRECISION), scale, softcap)
        weights = tl.exp2(masked(scores, place, at, kept, keep, window, MASKED) - log[:, None])
        dweights = tl.dot(douts, tl.trans(values), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        if softcap is not None:
            dscores *= slope(scores, softcap)
        dq = tl.dot(dscores.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@triton.jit
def queries_kernel(
    q, k, v, positions, valid, keep, out, lse, dout, dlse, delta, dq,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, out_row, out_head, out_token, dout_row,
    dout_head, dout_token, dq_row, dq_head, dq_token,
    heads, groups, count, size, window, scale, softcap,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dq, and delta[batch, head, query], the mean gradient of the weights, for the gradients of the keys."""
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key_head = head // groups
    at = first_query + tl.arange(0, QUERIES)
    place = load_places(positions + row * count, None if valid is None else valid + row * count, at, count)
    wanted = place >= 0
    queries = load_rows(q + row * q_row + head * q_head, first_query, q_token, wanted, D, QUERIES, WIDTH)
    outs = load_rows(out + row * out_row + head * out_head, first_query, out_token, wanted, D, QUERIES, WIDTH)
    douts = load_rows(dout + row * dout_row + head * dout_head, first_query, dout_token, wanted, D, QUERIES, WIDTH)

    flat = (row * heads + head) * count + at
    log = tl.load(lse + flat, mask=wanted, other=float("-inf"))
    sees = log > float("-inf")
    log = tl.where(sees, log * LOG2E, float("inf"))  # so that weights are 0
    mean = tl.sum(outs.to(tl.float32) * douts.to(tl.float32), 1)
    if dlse is not None:
        mean -= tl.load(dlse + flat, mask=sees, other=0.0)
    tl.store(delta + flat, mean, mask=at < count)

    k += row * k_row + key_head * k_head
    v += row * v_row + key_head * v_head
    if keep is not None:
        keep += row * size
    low, first, whole, partial, end = key_spans(place, size, window, KEYS)
    given = queries, douts, log, mean, place, k, v, keep, k_token, v_token, low
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    if window is not None:
        acc = _collect(acc, *given, first, whole, end, window, scale, softcap, D, WIDTH, KEYS, PRECISION, True)
    acc = _collect(acc, *given, whole, partial, end, window, scale, softcap, D, WIDTH, KEYS, PRECISION, False)
    acc = _collect(acc, *given, partial, end, end, window, scale, softcap, D, WIDTH, KEYS, PRECISION, True)
    store_rows(dq + row * dq_row + head * dq_head, first_query, dq_token, acc * scale, at < count, D, QUERIES, WIDTH)
