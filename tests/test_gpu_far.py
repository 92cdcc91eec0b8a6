"""Kernels beyond 2^31 numbers: offsets are 64 bits wide. Skipped where a GPU has too little memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from depthc.codegen.kernels.combine import combine, combine_, inverse_of
from depthc.codegen.kernels.decode_attention import decode_attention
from depthc.codegen.kernels.few_rows import few_rows_linear
from depthc.codegen.kernels.gather_norm import gather_norm
from depthc.codegen.kernels.rows import spread_rows, take_rows
from depthc.codegen.kernels.score import score_rows
from depthc.codegen.kernels.shared_attention.op import shared_attention

GIB = 1 << 30
WIDTH, HALF = 2048, torch.bfloat16
TOKENS = 2**31 // WIDTH + 64  # of a sequence; the last 64 lie beyond


def _memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


pytestmark = pytest.mark.skipif(_memory() < 40 * GIB, reason="needs a GPU with 40 GiB of free memory")


@pytest.fixture
def stream() -> Iterator[Tensor]:
    """[1, tokens, features] that is zero but for some rows, near both ends."""
    made = torch.zeros(1, TOKENS, WIDTH, dtype=HALF, device="cuda")
    made[0, :32] = torch.randn(32, WIDTH, device="cuda")
    made[0, -32:] = torch.randn(32, WIDTH, device="cuda")
    yield made
    torch.cuda.empty_cache()


def ends() -> Tensor:
    """Positions of some of these rows."""
    return torch.tensor([[1, 5, TOKENS - 31, TOKENS - 2, TOKENS - 1]], device="cuda")


@torch.no_grad()
def test_rows_out_of_a_stream_and_back(stream: Tensor) -> None:
    at = ends()
    inverse, wanted = inverse_of(at, TOKENS), stream[0, at[0]]
    assert torch.equal(take_rows(stream, at, inverse)[0], wanted)
    spread = spread_rows(wanted[None], at, inverse)
    assert torch.equal(spread[0, at[0]], wanted)
    assert int(spread.count_nonzero()) == int(wanted.count_nonzero())
    found, normed = gather_norm(stream, at)
    assert torch.equal(found[0], wanted)
    torch.testing.assert_close(
        normed[0], torch.nn.functional.rms_norm(wanted, (WIDTH,), eps=1e-6), rtol=2e-2, atol=2e-2
    )


@torch.no_grad()
def test_back_into_a_stream(stream: Tensor) -> None:
    at = ends()
    inverse, rows = inverse_of(at, TOKENS), torch.randn(1, 5, WIDTH, dtype=HALF, device="cuda")
    logits, before = torch.zeros(1, 5, device="cuda"), stream[0, at[0]]
    wanted = (before.float() + 0.05 * rows[0].float()).to(HALF)
    for run in (combine, combine_):
        found = run(stream, rows, logits, at, inverse)
        torch.testing.assert_close(found[0, at[0]], wanted)
        assert not found[0, 32:-32].any()


@torch.no_grad()
def test_scores(stream: Tensor) -> None:
    weight = torch.randn(WIDTH, device="cuda")
    found = score_rows(stream, weight)
    torch.testing.assert_close(found[0, -32:], stream[0, -32:].float() @ weight, rtol=1e-3, atol=1e-3)
    assert not found[0, 32:-32].any()


@torch.no_grad()
def test_attention_to_keys_of_many_sequences() -> None:
    """The last sequence's keys lie beyond."""
    batch, heads, size, features = 2**31 // (8 * 4096 * 128) + 1, 8, 4096, 128
    k, v = (torch.zeros(batch, heads, size, features, dtype=HALF, device="cuda") for _ in range(2))
    k[-1], v[-1] = (torch.randn(heads, size, features, device="cuda") for _ in range(2))
    q = torch.randn(batch, heads, 1, features, dtype=HALF, device="cuda")
    wanted = torch.nn.functional.scaled_dot_product_attention(q[-1:], k[-1:], v[-1:])
    torch.testing.assert_close(decode_attention(q, k, v)[-1:], wanted, rtol=2e-2, atol=2e-3)
    last = torch.full((batch, 1), size - 1, device="cuda")
    torch.testing.assert_close(shared_attention(q, k, v, last)[0][-1:], wanted, rtol=2e-2, atol=2e-3)
    torch.cuda.empty_cache()


@torch.no_grad()
def test_a_matrix_of_many_rows() -> None:
    matrix = torch.zeros(TOKENS, WIDTH, dtype=HALF, device="cuda")
    matrix[-8:] = torch.randn(8, WIDTH, device="cuda")
    row = torch.randn(1, WIDTH, dtype=HALF, device="cuda")
    (found,) = few_rows_linear(row, [matrix])
    torch.testing.assert_close(found[0, -8:], (matrix[-8:].float() @ row[0].float()).to(HALF), rtol=2e-2, atol=5e-2)
    assert not found[0, :-8].any()
    torch.cuda.empty_cache()
