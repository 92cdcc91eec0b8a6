"""A program attends to a share of the rows, for all query heads of a key head; another kernel adds the shares up.

With one query a head, products have as many rows as a key head has query heads: 16 at least, some of them empty.
"""

# Arguments of kernels have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

# exp2 is one instruction, exp is two: scores are kept in units of ln 2.
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _shift(top):
    """What is taken off scores. A query that has seen no key yet has none: -inf - -inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def share_kernel(
    q, k, v, mask, place, acc, top, total, out,
    q_row, q_head, k_row, k_head, k_token, v_row, v_head, v_token, mask_row, mask_head, mask_key,
    heads, groups, size, share, scale,
    ADDED: tl.constexpr, WHOLE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split, key_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    member, features = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    head = key_head * groups + member
    inside = (member < groups)[:, None] & (features < D)[None, :]
    queries = tl.load(q + row * q_row + head[:, None] * q_head + features[None, :], mask=inside, other=0.0)
    k += row * k_row + key_head * k_head
    v += row * v_row + key_head * v_head

    start, end = split * share, tl.minimum((split + 1) * share, size)
    if place is not None:  # rows behind it are not written yet; from the second round on, all are
        end = tl.minimum(end, tl.load(place).to(tl.int32) + 1)
    sums = tl.zeros((QUERIES, WIDTH), tl.float32)
    best = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    for first in range(start, end, KEYS):
        at = (first + tl.arange(0, KEYS)).to(tl.int64)
        kept = at < end
        wanted = kept[:, None] & (features < D)[None, :]
        keys = tl.load(k + at[:, None] * k_token + features[None, :], mask=wanted, other=0.0)
        values = tl.load(v + at[:, None] * v_token + features[None, :], mask=wanted, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        seen = kept[None, :] & (member < groups)[:, None]
        if mask is not None:
            told = mask + row * mask_row + head[:, None] * mask_head + at[None, :] * mask_key
            if ADDED:
                added = tl.load(told, mask=seen, other=0.0).to(tl.float32)
                seen &= added > float("-inf")
                scores += tl.maximum(added, -1e38) * LOG2E  # the lowest number of fp32 would become infinite
            else:
                seen = tl.load(told, mask=seen, other=0) != 0
        scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - _shift(peak)[:, None])
        fade = tl.exp2(best - _shift(peak))
        weight = weight * fade + tl.sum(weights, 1)
        # A row that nobody sees may hold anything, NaN too.
        values = tl.where((tl.max(weights, 0) > 0)[:, None], values, 0.0)
        sums = sums * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        best = peak

    which = row * heads + head
    if WHOLE:
        sums /= tl.where(weight > 0, weight, 1.0)[:, None]
        tl.store(out + which[:, None] * D + features[None, :], sums.to(out.dtype.element_ty), mask=inside)
    else:
        part = which * tl.num_programs(0) + split
        tl.store(acc + part[:, None] * D + features[None, :], sums, mask=inside)
        tl.store(top + part, best, mask=member < groups)
        tl.store(total + part, weight, mask=member < groups)


@triton.jit
def sum_kernel(acc, top, total, out, splits, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """The shares of a head, each by the weight of its keys."""
    head = tl.program_id(0).to(tl.int64)
    split, features = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    inside = split < splits
    tops = tl.load(top + head * splits + split, mask=inside, other=float("-inf"))
    weights = tl.exp2(tops - _shift(tl.max(tops, 0)))
    weight = tl.sum(weights * tl.load(total + head * splits + split, mask=inside, other=0.0), 0)
    wanted = inside[:, None] & (features < D)[None, :]
    at = (head * splits + split)[:, None] * D + features[None, :]
    sums = tl.sum(weights[:, None] * tl.load(acc + at, mask=wanted, other=0.0), 0)
    sums /= tl.where(weight > 0, weight, 1.0)
    tl.store(out + head * D + features, sums.to(out.dtype.element_ty), mask=features < D)
