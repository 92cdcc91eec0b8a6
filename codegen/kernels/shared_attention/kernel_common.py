"""What the kernels of shared-KV attention have in common: rows, positions, ranges of keys, scores.

Positions decide what is loaded and what is masked, tile by tile. Most pairs of tiles need no mask at all, so every loop
over tiles runs in spans: masked, whole, masked. Offsets of tiles are 64-bit, those inside a tile 32-bit.
"""

# Arguments of kernels have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

# exp2 is one instruction, exp is two: scores are kept in units of ln 2.
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_of(base, first, stride, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to rows from `first` on, whose features lie side by side."""
    inside = tl.arange(0, COUNT)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return base + tl.cast(first, tl.int64) * stride + inside


@triton.jit
def load_rows(base, first, stride, wanted, D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Rows from `first` on; zeros for rows that are not wanted and for features behind the last."""
    mask = wanted[:, None]
    if D != WIDTH:
        mask = mask & (tl.arange(0, WIDTH) < D)[None, :]
    return tl.load(tile_of(base, first, stride, COUNT, WIDTH), mask=mask, other=0.0)


@triton.jit
def store_rows(base, first, stride, rows, wanted, D: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Store rows from `first` on."""
    tile = tile_of(base, first, stride, COUNT, WIDTH)
    mask = wanted[:, None] & (tl.arange(0, WIDTH) < D)[None, :]
    tl.store(tile, rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_places(positions, valid, at, count):
    """Where queries stand among the keys; -1, from where no key is seen, for queries that are not valid."""
    inside = at < count
    place = tl.load(positions + at, mask=inside, other=-1).to(tl.int32)
    if valid is not None:
        place = tl.where(tl.load(valid + at, mask=inside, other=0) != 0, place, -1)
    return place


@triton.jit
def key_spans(place, size, window, KEYS: tl.constexpr):
    """(low, first, whole, partial, end) of a tile of queries.

    Its keys lie in [low, end). Tiles of keys that all its queries see begin in [whole, partial); those in
    [first, whole) and [partial, end) need a mask. Queries that are not valid take no part in this.
    """
    most = tl.max(place, 0)
    least = tl.min(tl.where(place >= 0, place, most), 0)
    end = tl.minimum(most + 1, size)
    low = 0
    first = 0
    whole = 0
    if window is not None:
        low = tl.maximum(least - window + 1, 0)
        first = low // KEYS * KEYS
        whole = tl.minimum(tl.cdiv(tl.maximum(most - window + 1, 0), KEYS) * KEYS, end)
    partial = tl.maximum(tl.minimum(least + 1, size) // KEYS * KEYS, whole)
    return low, first, whole, partial, end


@triton.jit
def load_kept(keep, at, low, end, MASKED: tl.constexpr):
    """Which keys take part. What no query may see is not loaded: it may be anything, NaN too."""
    kept = tl.full(at.shape, True, tl.int1)  # a constant that the compiler removes from loads
    if MASKED:
        kept = (at >= low) & (at < end)
    if keep is not None:
        kept = tl.load(keep + at, mask=kept, other=0) != 0
    return kept


@triton.jit
def visible(place, at, window):
    """Whether the query at `place` sees the key at `at`."""
    seen = at <= place
    if window is not None:
        seen = seen & (at > place - window)
    return seen


@triton.jit
def masked(scores, place, at, kept, keep, window, MASKED: tl.constexpr):
    """Scores of queries by keys, -inf where the query does not see the key or the key does not take part."""
    if MASKED:
        # A query may stand behind the last key: `kept` ends there.
        seen = visible(place[:, None], at[None, :], window) & kept[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    elif keep is not None:
        scores = tl.where(kept[None, :], scores, float("-inf"))
    return scores


@triton.jit
def scaled(products, scale, softcap):
    """Scores in units of ln 2."""
    if softcap is None:
        scores = products * (scale * LOG2E)
    else:
        # tanh(x) = 1 - 2 / (1 + exp(2x)), which is right at both ends
        grown = tl.exp2(products * (2.0 * LOG2E * scale / softcap))
        scores = softcap * LOG2E * (1.0 - 2.0 / (1.0 + grown))
    return scores


@triton.jit
def slope(scores, softcap):
    """Derivative of the softcap, of the scores that came out of it before they were masked."""
    bent = scores / (softcap * LOG2E)
    return 1.0 - bent * bent
