"""Combine kernels: a token has at most one row, so all of them store and none adds; arithmetic is fp32.

B batch rows, S tokens, k rows a batch row, D features; offsets are 64 bits wide.
"""

# Arguments of kernels have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """tanh; near 0 its series, where 1 - exp(-2|x|) would cancel."""
    square, decay = x * x, tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -large, large))


@triton.jit
def _gate(logit, alpha, GATE: tl.constexpr):
    """(score, its derivative)."""
    score, slope = logit, 1.0
    if GATE == "sigmoid":
        level = tl.sigmoid(logit)
        score, slope = alpha * level, alpha * level * (1.0 - level)
    if GATE == "tanh":
        level = _tanh(logit)
        score, slope = alpha * level, alpha * (1.0 - level * level)
    return score, slope


@triton.jit
def _combined(x, y, score, KIND: tl.constexpr):
    if KIND == "weighted":
        y = x + score * y
    if KIND == "additive":
        y = x + y
    if KIND == "delta":
        y = x + score * (y - x)
    return y


@triton.jit
def forward_kernel(
    stream, rows, logits, inverse, out,  # [B, S, D], [B, k, D], fp32 [B, k], int32 [B, S], [B, S, D]
    S, k, stream_row, stream_token, alpha,
    D: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token of the stream, chosen or not: every row is written once."""
    token, batch = tl.program_id(0).to(tl.int64), (tl.program_id(0) // S).to(tl.int64)
    slot = tl.load(inverse + token)
    chosen, row = slot >= 0, batch * k + slot
    score = 0.0
    if GATED:
        score, _ = _gate(tl.load(logits + row, mask=chosen, other=0.0), alpha, GATE)
    read = stream + batch * stream_row + (token - batch * S) * stream_token
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < D
        y = tl.load(rows + row * D + cols, mask=inside & chosen, other=0.0).to(tl.float32)
        if KIND == "off":  # what is replaced is not read
            x = tl.load(read + cols, mask=inside & (slot < 0), other=0.0).to(tl.float32)
        else:
            x = tl.load(read + cols, mask=inside, other=0.0).to(tl.float32)
        found = tl.where(chosen, _combined(x, y, score, KIND), x)
        tl.store(out + token * D + cols, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def in_place_kernel(
    stream, rows, logits, positions, inverse,  # as above; int64 [B, k]
    S, k, stream_row, stream_token, alpha,
    D: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: the rest of the stream is not touched."""
    row, batch = tl.program_id(0).to(tl.int64), (tl.program_id(0) // k).to(tl.int64)
    position = tl.load(positions + row)
    kept = position >= 0
    kept = kept & (tl.load(inverse + batch * S + position, mask=kept, other=-1) == row - batch * k)
    score = 0.0
    if GATED:
        score, _ = _gate(tl.load(logits + row), alpha, GATE)
    write = stream + batch * stream_row + position * stream_token
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = (cols < D) & kept
        y = tl.load(rows + row * D + cols, mask=inside, other=0.0).to(tl.float32)
        x = y
        if KIND != "off":
            x = tl.load(write + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(write + cols, _combined(x, y, score, KIND).to(stream.dtype.element_ty), mask=inside)


@triton.jit
def rows_backward_kernel(
    grad, stream, rows, logits, positions, inverse,  # as above; grad is [B, S, D] and dense
    grad_rows, grad_logits,  # [B, k, D], fp32 [B, k]
    S, k, stream_row, stream_token, alpha,
    D: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row; one that was not combined has gradients of zero."""
    row, batch = tl.program_id(0).to(tl.int64), (tl.program_id(0) // k).to(tl.int64)
    position = tl.load(positions + row)
    kept = position >= 0
    kept = kept & (tl.load(inverse + batch * S + position, mask=kept, other=-1) == row - batch * k)
    score, slope = 1.0, 0.0
    if GATED:
        score, slope = _gate(tl.load(logits + row, mask=kept, other=0.0), alpha, GATE)
    to_score = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = (cols < D) & kept
        g = tl.load(grad + (batch * S + position) * D + cols, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            y = tl.load(rows + row * D + cols, mask=inside, other=0.0).to(tl.float32)
            if KIND == "delta":
                read = stream + batch * stream_row + position * stream_token + cols
                y -= tl.load(read, mask=inside, other=0.0).to(tl.float32)
            to_score += g * y
        tl.store(grad_rows + row * D + cols, (score * g).to(grad_rows.dtype.element_ty), mask=cols < D)
    if GATED:
        tl.store(grad_logits + row, slope * tl.sum(to_score, 0))


@triton.jit
def stream_backward_kernel(
    grad, logits, inverse, grad_stream,  # as above
    S, k, alpha,
    D: tl.constexpr, GATE: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta: (1 - score) of the gradient reaches a chosen token; off: nothing does. The others take all of it."""
    token, batch = tl.program_id(0).to(tl.int64), (tl.program_id(0) // S).to(tl.int64)
    slot = tl.load(inverse + token)
    passed = 1.0
    if GATED:
        score, _ = _gate(tl.load(logits + batch * k + slot, mask=slot >= 0, other=0.0), alpha, GATE)
        passed = tl.where(slot < 0, 1.0, 1.0 - score)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < D
        reached = inside if GATED else inside & (slot < 0)
        g = tl.load(grad + token * D + cols, mask=reached, other=0.0).to(tl.float32)
        tl.store(grad_stream + token * D + cols, (passed * g).to(grad_stream.dtype.element_ty), mask=inside)
