"""The kernel that copies rows; offsets are 64 bits wide."""

# Arguments of kernels have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def copy_kernel(
    source, places, out,  # [B, S, D], int64 or int32 [B, k], [B, k, D]
    k, source_row, source_token, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row; zeros where a place is negative."""
    at = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    place = tl.load(places + at).to(tl.int64)
    read = source + at // k * source_row + place * source_token + cols
    row = tl.load(read, mask=(cols < D) & (place >= 0), other=0)
    tl.store(out + at * D + cols, row, mask=cols < D)
