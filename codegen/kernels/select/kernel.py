"""Selection kernels: one program a batch row; no atomics, so a result is the same at every run.

At most 4 warps everywhere: `cumsum` beside `sum` in one kernel has crashed on Hopper with 8 (triton 3.6).
"""

# Arguments of kernels have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def _sort_key(x, among):
    """uint32 keys in the order of the floats; NaN is above all, and what is no candidate is below all.

    As in `depthc.ir.selection.ranked`, -inf is the lowest number, and -0.0 is 0.0.
    """
    x = tl.where(x == float("-inf"), -3.4028234663852886e38, x)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    flipped = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    flipped = tl.where(x == x, flipped, 0xFFC00000)
    return tl.where(among, flipped, 0).to(tl.uint32)


@triton.jit
def _kth_largest(key, count):
    """The largest t such that at least `count` keys are >= t: two bits a round, from the highest.

    The three counts of a round share one 64-bit sum, 21 bits each: a reduction over the block is what a round costs.
    """
    found, step = tl.full((), 0, tl.uint32), tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        votes = (key >= found + step).to(tl.int64)
        votes += (key >= found + 2 * step).to(tl.int64) << 21
        votes += (key >= found + 3 * step).to(tl.int64) << 42
        sums = tl.sum(votes, 0)
        digit = ((sums & 0x1FFFFF) >= count).to(tl.uint32)
        digit += (((sums >> 21) & 0x1FFFFF) >= count).to(tl.uint32)
        digit += ((sums >> 42) >= count).to(tl.uint32)
        found += digit * step
        step = step >> 2
    return found


@triton.jit
def _load_keys(
    logits, candidates, row, at, S, logits_row, logits_token, candidates_row, candidates_token, HAS_CANDIDATES
):
    """(keys, whether it is a candidate, whether it is a candidate that is NaN) of some tokens of a row."""
    among = at < S
    x = tl.load(logits + row * logits_row + at.to(tl.int64) * logits_token, mask=among, other=0.0)
    if HAS_CANDIDATES:
        given = candidates + row * candidates_row + at.to(tl.int64) * candidates_token
        among = among & (tl.load(given, mask=among, other=0) != 0)
    return _sort_key(x, among), among, among & (x != x)


@triton.jit
def topk_kernel(
    logits, candidates, wanted,  # fp32 [B, S], bool [B, S], int64 [B]
    positions, valid, mask, inverse, fine,  # int64 [B, k], bool [B, k], bool [B, S], int32 [B, S], bool [B]
    S, k, logits_row, logits_token, candidates_row, candidates_token,
    HAS_CANDIDATES: tl.constexpr, HAS_WANTED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    key, among, nan = _load_keys(
        logits, candidates, row, tl.arange(0, BLOCK), S, logits_row, logits_token,
        candidates_row, candidates_token, HAS_CANDIDATES,
    )  # fmt: skip
    count = tl.minimum(tl.sum(among.to(tl.int32), 0), k)
    if HAS_WANTED:
        count = tl.minimum(count, tl.maximum(tl.load(wanted + row), 0).to(tl.int32))
    tl.store(fine + row, tl.sum(nan.to(tl.int32), 0) == 0)
    least = _kth_largest(key, count)
    ties = count - tl.sum((key > least).to(tl.int32), 0)  # how many of those that tie for the last places are in

    # The row is read again, from the cache, in steps: a scan of all of it beside its keys would spill.
    above_before, ties_before = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, S, STEP):
        at = start + tl.arange(0, STEP)
        inside = at < S
        own, _, _ = _load_keys(
            logits, candidates, row, at, S, logits_row, logits_token,
            candidates_row, candidates_token, HAS_CANDIDATES,
        )  # fmt: skip
        above, tie = (own > least).to(tl.int32), (own == least).to(tl.int32)
        both = above | (tie << 16)  # one scan for both counts, 16 bits each
        upto = tl.cumsum(both, 0)
        ties_upto = ties_before + (upto >> 16)
        chosen = (above != 0) | ((tie != 0) & (ties_upto <= ties))
        chosen_upto = above_before + (upto & 0xFFFF) + tl.minimum(ties_upto, ties)
        # A short row is filled up with its first other tokens: its positions stay distinct.
        others_upto = at + 1 - chosen_upto
        slot = chosen_upto + tl.minimum(others_upto, k - count) - 1
        taken = inside & (chosen | (others_upto <= k - count))
        tl.store(positions + row * k + slot, at.to(tl.int64), mask=taken)
        tl.store(valid + row * k + slot, chosen, mask=taken)
        tl.store(mask + row * S + at, chosen, mask=inside)
        tl.store(inverse + row * S + at, tl.where(chosen, slot, -1), mask=inside)
        sums = tl.sum(both, 0)
        above_before += sums & 0xFFFF
        ties_before += sums >> 16


@triton.jit
def where_kernel(
    score, candidates,  # fp32, int32 or int64 [B, S], bool [B, S]
    mask, counts, fine,  # bool [B, S], int32 [B], bool [B]
    number, S, score_row, score_token, candidates_row, candidates_token,
    HAS_CANDIDATES: tl.constexpr, RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mask and the count of every row."""
    row = tl.program_id(0).to(tl.int64)
    count, strange = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, S, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < S
        among = inside
        if HAS_CANDIDATES:
            given = candidates + row * candidates_row + at.to(tl.int64) * candidates_token
            among = inside & (tl.load(given, mask=inside, other=0) != 0)
        chosen = among
        if RULE != "all":
            x = tl.load(score + row * score_row + at.to(tl.int64) * score_token, mask=inside, other=0)
            chosen = among & (x >= number if RULE == "atleast" else x > number)
            strange += tl.sum((among & (x != x)).to(tl.int32), 0)
        tl.store(mask + row * S + at, chosen, mask=inside)
        count += tl.sum(chosen.to(tl.int32), 0)
    tl.store(counts + row, count)
    tl.store(fine + row, strange == 0)


@triton.jit
def pack_kernel(
    mask, counts,  # bool [B, S], int32 [B]
    cu_seqlens, places, inverse,  # int32 [B + 1], int64 [B * S], int32 [B, S]
    B, S, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the chosen tokens of every row go, after those of all rows before it."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, ROWS)
    sizes = tl.load(counts + rows, mask=rows < B, other=0)
    total = tl.sum(sizes, 0)
    base = tl.sum(tl.where(rows < row, sizes, 0), 0)
    if row == 0:
        tl.store(cu_seqlens, 0)
    tl.store(cu_seqlens + row + 1, base + tl.load(counts + row))
    for start in range(0, S, BLOCK):
        at = start + tl.arange(0, BLOCK)
        place, inside = row * S + at, at < S
        chosen = tl.load(mask + place, mask=inside, other=0) != 0
        slot = base + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(places + slot, place, mask=inside & chosen)
        tl.store(inverse + place, tl.where(chosen, slot, -1), mask=inside)
        # Every row closes its own share of what lies beyond the last chosen token.
        tl.store(places + place, tl.full((BLOCK,), -1, tl.int64), mask=inside & (place >= total))
        base += tl.sum(chosen.to(tl.int32), 0)
