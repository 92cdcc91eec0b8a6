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
    rows, matrices, biases, added, made,  # a tuple each: [count, K], [n, K], [n], [count, n], [count, n]; or None
    columns, strides, row_stride, count,  # n and the stride of every matrix
    MAPS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x w' + b + added for each of some maps; a program makes OUT columns of one y."""
    program = tl.program_id(0)
    x, w, y, tile = rows[0], matrices[0], made[0], program
    n, stride = tl.cast(columns[0], tl.int32), tl.cast(strides[0], tl.int64)
    if biases is not None:
        b = biases[0]
    if added is not None:
        plus = added[0]
    begin = 0
    for i in tl.static_range(1, MAPS):
        begin += tl.cdiv(columns[i - 1], OUT)
        if program >= begin:
            x, w, y, tile = rows[i], matrices[i], made[i], program - begin
            n, stride = tl.cast(columns[i], tl.int32), tl.cast(strides[i], tl.int64)
            if biases is not None:
                b = biases[i]
            if added is not None:
                plus = added[i]
    at = tile * OUT + tl.arange(0, OUT)
    which = tl.arange(0, ROWS).to(tl.int64)
    w += at.to(tl.int64)[:, None] * stride
    sums = tl.zeros((ROWS, OUT, BLOCK), tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        weights = tl.load(w + cols[None, :], mask=(at < n)[:, None] & (cols < K)[None, :], other=0.0)
        wanted = (which < count)[:, None] & (cols < K)[None, :]
        values = tl.load(x + which[:, None] * row_stride + cols[None, :], mask=wanted, other=0.0)
        sums += values.to(tl.float32)[:, None, :] * weights.to(tl.float32)[None, :, :]
    found = tl.sum(sums, 2)
    if biases is not None:
        found += tl.load(b + at, mask=at < n, other=0.0).to(tl.float32)[None, :]
    wanted = (which < count)[:, None] & (at < n)[None, :]
    place = which[:, None] * n + at[None, :]
    if added is not None:
        found += tl.load(plus + place, mask=wanted, other=0.0).to(tl.float32)
    tl.store(y + place, found.to(y.dtype.element_ty), mask=wanted)
