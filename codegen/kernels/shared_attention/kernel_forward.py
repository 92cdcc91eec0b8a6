"""Forward pass: a program attends for a tile of queries of one head, walking over the keys that they see."""

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
    store_rows,
)


@triton.jit
def _attend(
    state, queries, place, k, v, keep,
    k_token, v_token,
    low, first, last, end, window, scale, softcap,
    D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(sum of weighted values, largest score, sum of weights) after the tiles of keys that begin in [first, last)."""
    acc, top, total = state
    for start in range(first, last, KEYS):
        at = start + tl.arange(0, KEYS)
        kept = load_kept(keep, at, low, end, MASKED)
        keys = load_rows(k, start, k_token, kept, D, KEYS, WIDTH)
        values = load_rows(v, start, v_token, kept, D, KEYS, WIDTH)
        scores = scaled(tl.dot(queries, tl.trans(keys), input_precision=PRECISION), scale, softcap)
        scores = masked(scores, place, at, kept, keep, window, MASKED)
        peak = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet has no peak; -inf - -inf would be NaN.
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
        top = peak
    return acc, top, total


@triton.jit
def forward_kernel(
    q, k, v, positions, valid, keep, out, lse,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, out_row, out_head, out_token,
    heads, groups, count, size, window, scale, softcap,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Later queries see more keys: the longest programs start first.
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key_head = head // groups
    at = first_query + tl.arange(0, QUERIES)
    place = load_places(positions + row * count, None if valid is None else valid + row * count, at, count)
    queries = load_rows(q + row * q_row + head * q_head, first_query, q_token, place >= 0, D, QUERIES, WIDTH)
    k += row * k_row + key_head * k_head
    v += row * v_row + key_head * v_head
    if keep is not None:
        keep += row * size

    low, first, whole, partial, end = key_spans(place, size, window, KEYS)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    state = acc, tl.full((QUERIES,), float("-inf"), tl.float32), tl.zeros((QUERIES,), tl.float32)
    given = queries, place, k, v, keep, k_token, v_token, low
    if window is not None:
        state = _attend(state, *given, first, whole, end, window, scale, softcap, D, WIDTH, KEYS, PRECISION, True)
    state = _attend(state, *given, whole, partial, end, window, scale, softcap, D, WIDTH, KEYS, PRECISION, False)
    state = _attend(state, *given, partial, end, end, window, scale, softcap, D, WIDTH, KEYS, PRECISION, True)

    acc, top, total = state
    # In tiles without a mask, queries that are not valid have weights too.
    sees = (total > 0) & (place >= 0)
    total = tl.where(sees, total, 1.0)
    acc = tl.where(sees[:, None], acc / total[:, None], 0.0)
    store_rows(out + row * out_row + head * out_head, first_query, out_token, acc, at < count, D, QUERIES, WIDTH)
    log = tl.where(sees, (top + tl.log2(total)) / LOG2E, float("-inf"))
    tl.store(lse + (row * heads + head) * count + at, log, mask=at < count)
