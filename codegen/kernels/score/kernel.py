"""Router kernels: the stream is read once; offsets are 64 bits wide; sums are fp32, in the same order at every run.

n = B S tokens of D features; a program takes ROWS of them at a time.
"""

# Arguments of kernels have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def _load_tokens(stream, at, inside, cols, S, stream_row, stream_token, D: tl.constexpr):
    """fp32 [ROWS, BLOCK]: some tokens; zeros beyond the last token and feature."""
    start = at // S * stream_row + at % S * stream_token
    mask = inside[:, None] & (cols < D)[None, :]
    return tl.load(stream + start[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    stream, weight, logits,  # [B, S, D], fp32 [D], fp32 [n]
    n, S, stream_row, stream_token, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    x = _load_tokens(stream, at, at < n, cols, S, stream_row, stream_token, D)
    w = tl.load(weight + cols, mask=cols < D, other=0.0)
    tl.store(logits + at, tl.sum(x * w[None, :], 1), mask=at < n)


@triton.jit
def weight_kernel(
    grad, stream, parts,  # fp32 [n], [B, S, D], fp32 [programs, D]
    n, S, stream_row, stream_token, programs, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The share of every program in the weight's gradient: that of tokens at a fixed distance."""
    cols = tl.arange(0, BLOCK)
    part = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(tl.program_id(0), tl.cdiv(n, ROWS), programs):
        at = tl.cast(step, tl.int64) * ROWS + tl.arange(0, ROWS)
        g = tl.load(grad + at, mask=at < n, other=0.0)
        part += g[:, None] * _load_tokens(stream, at, at < n, cols, S, stream_row, stream_token, D)
    tl.store(parts + tl.program_id(0).to(tl.int64) * D + cols, tl.sum(part, 0), mask=cols < D)
