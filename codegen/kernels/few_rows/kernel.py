"""A program reads some rows of one matrix, once, and multiplies them with all the rows that there are.

There is no reuse to speak of, so no tensor cores: what counts is that loads are wide, and that all of a program's are
on their way at the same time.
"""

# Arguments of kernels have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def products_kernel(
    rows, added, w0, w1, w2, b0, b1, b2, y0, y1, y2,
    row_stride, w0_stride, w1_stride, w2_stride, n0, n1, n2, count,
    MATRICES: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = rows w' + b + added for each of up to three matrices w [n, K]; a program makes OUT columns of one y."""
    tile = tl.program_id(0)
    w, b, y, stride, n = w0, b0, y0, w0_stride, n0
    if MATRICES > 1:
        before = tl.cdiv(n0, OUT)
        if tile >= before:
            w, b, y, stride, n = w1, b1, y1, w1_stride, n1
            tile -= before
            if MATRICES > 2:
                before = tl.cdiv(n1, OUT)
                if tile >= before:
                    w, b, y, stride, n = w2, b2, y2, w2_stride, n2
                    tile -= before
    at = tile * OUT + tl.arange(0, OUT)
    which = tl.arange(0, ROWS)
    w += at.to(tl.int64)[:, None] * stride
    sums = tl.zeros((ROWS, OUT, BLOCK), tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        weights = tl.load(w + cols[None, :], mask=(at < n)[:, None] & (cols < K)[None, :], other=0.0)
        wanted = (which < count)[:, None] & (cols < K)[None, :]
        values = tl.load(rows + which[:, None] * row_stride + cols[None, :], mask=wanted, other=0.0)
        sums += values.to(tl.float32)[:, None, :] * weights.to(tl.float32)[None, :, :]
    made = tl.sum(sums, 2)
    if b is not None:
        made += tl.load(b + at, mask=at < n, other=0.0).to(tl.float32)[None, :]
    wanted = (which < count)[:, None] & (at < n)[None, :]
    place = which.to(tl.int64)[:, None] * n + at[None, :]
    if added is not None:
        made += tl.load(added + place, mask=wanted, other=0.0).to(tl.float32)
    tl.store(y + place, made.to(y.dtype.element_ty), mask=wanted)
