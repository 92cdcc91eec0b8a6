"""Gather and norm kernels: a row is read once; offsets are 64 bits wide; all arithmetic is fp32.

B batch rows, S tokens, k positions a row, D features; D is a constant, so that rows keep their 16-byte alignment.
"""

# Arguments of kernels have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    stream, positions, weight, bias,  # [B, S, D], int64 [B, k], [D], [D]
    rows, normed, mean, rstd,  # [B, k, D], [B, k, D], fp32 [B, k], fp32 [B, k]
    k, stream_row, stream_token, eps,
    D: tl.constexpr, LAYER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    batch = (tl.program_id(0) // k).to(tl.int64)
    at = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    position = tl.load(positions + at)
    read = stream + batch * stream_row + position * stream_token + cols
    row = tl.load(read, mask=inside & (position >= 0), other=0.0)
    tl.store(rows + at * D + cols, row, mask=inside)

    x = row.to(tl.float32)
    if LAYER:
        centre = tl.sum(x, 0) / D
        tl.store(mean + at, centre)
        x = tl.where(inside, x - centre, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(rstd + at, scale)
    y = x * scale
    if HAS_WEIGHT:
        y *= tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at * D + cols, y.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_rows, grad_normed, rows, positions, weight, mean, rstd,  # as above
    grad_stream, weight_parts, bias_parts,  # zeros [B, S, D], fp32 [programs, D], fp32 [programs, D]
    n, k, S, programs,
    D: tl.constexpr, LAYER: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every program takes rows at a fixed distance: its sums for weight and bias are added in the same order always.

    A token stands in at most one row: gradients are stored, not added up.
    """
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    weight_part, bias_part = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for step in range(tl.program_id(0), n, programs):
        batch, at = tl.cast(step // k, tl.int64), tl.cast(step, tl.int64)
        position, scale = tl.load(positions + at), tl.load(rstd + at)
        x = tl.load(rows + at * D + cols, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_normed + at * D + cols, mask=inside, other=0.0).to(tl.float32)
        if LAYER:
            x -= tl.load(mean + at)
        y = x * scale  # whatever it is beyond D: the gradient there is 0
        weight_part += g * y
        bias_part += g
        if HAS_WEIGHT:
            g *= tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
        grad = g - y * (tl.sum(g * y, 0) / D)
        if LAYER:
            grad -= tl.sum(g, 0) / D
        grad *= scale
        if HAS_ROWS:
            grad += tl.load(grad_rows + at * D + cols, mask=inside, other=0.0).to(tl.float32)
        write = grad_stream + (batch * S + position) * D + cols
        tl.store(write, grad.to(grad_stream.dtype.element_ty), mask=inside & (position >= 0))
    if HAS_WEIGHT:
        tl.store(weight_parts + tl.program_id(0).to(tl.int64) * D + cols, weight_part, mask=inside)
    if HAS_BIAS:
        tl.store(bias_parts + tl.program_id(0).to(tl.int64) * D + cols, bias_part, mask=inside)
