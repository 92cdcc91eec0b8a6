"""The ops that choose tokens: kernels where they apply, plain torch elsewhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from depthc.codegen.kernels.common import on, runs_on
from depthc.codegen.kernels.select.reference import (
    Ragged,
    Selection,
    select_topk_reference,
    select_where_reference,
)
from depthc.ir.errors import InputError
from depthc.ir.selection import refuse_nan

LONGEST = 8192  # tokens of a row that top-k holds in registers without spilling
ROWS = 4096  # rows whose counts a program of the ragged selection adds up
_STEP = 2048  # tokens of a row that are compacted at once


def applies(score: Tensor, candidates: Tensor | None = None, *, topk: bool = True) -> str | None:
    """Why the kernel is not used, in words; None if it is.

    Example:
        >>> applies(torch.zeros(1, 8, dtype=torch.float64))
        'scores are float64, and the kernel ranks float32'
    """
    name = str(score.dtype).removeprefix("torch.")
    if topk and score.dtype != torch.float32:
        return f"scores are {name}, and the kernel ranks float32"
    if score.dtype not in (torch.float32, torch.int32, torch.int64):
        return f"scores are {name}, and the kernel compares float32, int32 and int64"
    if not score.numel():
        return "there are no tokens"
    if topk and score.shape[1] > LONGEST:
        return f"rows of {score.shape[1]} tokens do not fit in registers; the longest that do are {LONGEST}"
    if not topk and score.shape[0] > ROWS:
        return f"there are {score.shape[0]} rows, and a program adds up the counts of at most {ROWS}"
    return runs_on(score, candidates)


def select_topk(logits: Tensor, k: int, candidates: Tensor | None = None, wanted: Tensor | None = None) -> Selection:
    """The k best candidates of every row by their logits, ties to the lower position (`ir/selection.py`: "topk").

    A row with fewer candidates chooses all of them. The device is not waited for: a NaN fails when the device meets it.

    Args:
        logits: float32 [B, S].
        k: at most S.
        candidates: bool [B, S]; all tokens if not given.
        wanted: int64 [B], how many each row chooses, at most k; k if not given.

    Raises:
        InputError: k is more than a row has.
        RoutingError: a candidate's logit is not a number (on the CPU).

    Example:
        >>> chosen = select_topk(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
        >>> chosen.positions, chosen.inverse
        (tensor([[1, 2]]), tensor([[-1,  0,  1, -1]], dtype=torch.int32))
    """
    if not 0 <= k <= logits.shape[1]:
        raise InputError(
            f"k is {k}, and a row has {logits.shape[1]} tokens",
            expected=f"0 to {logits.shape[1]}",
            found=str(k),
            remedy="choose at most as many tokens as a row has",
        )
    if applies(logits, candidates):
        return select_topk_reference(logits, k, candidates, wanted)
    positions, valid, mask, inverse, fine = select_topk_op(logits.detach(), k, candidates, wanted)
    _refuse(fine, logits, candidates)
    return Selection(positions, None if candidates is None and wanted is None else valid, mask, inverse)


def select_where(score: Tensor, number: float, *, inclusive: bool = False, candidates: Tensor | None = None) -> Ragged:
    """The candidates that score above a number, or at least that number (`ir/selection.py`: "threshold", "atleast").

    Above -inf are all candidates, whatever they score. The device is not waited for.

    Args:
        score: float32, int32 or int64 [B, S].
        inclusive: at least the number, rather than above it.
        candidates: bool [B, S]; all tokens if not given.

    Raises:
        RoutingError: a candidate's score is not a number (on the CPU).

    Example:
        >>> chosen = select_where(torch.tensor([[1.0, -1.0], [2.0, 3.0]]), 0.0)
        >>> chosen.places, chosen.cu_seqlens
        (tensor([ 0,  2,  3, -1]), tensor([0, 1, 3], dtype=torch.int32))
    """
    if applies(score, candidates, topk=False):
        return select_where_reference(score, number, inclusive=inclusive, candidates=candidates)
    mask, counts, cu_seqlens, places, inverse, fine = select_where_op(score.detach(), number, inclusive, candidates)
    _refuse(fine, score, candidates)
    return Ragged(mask, counts, cu_seqlens, places, inverse)


def _refuse(fine: Tensor, score: Tensor, candidates: Tensor | None) -> None:
    """An error where a row has a NaN; only on the CPU is it known at once, and said where."""
    if torch.compiler.is_compiling() or score.device.type != "cpu":
        torch._assert_async(fine.all(), "a token's score is not a number (NaN)")
    elif not bool(fine.all()):
        refuse_nan(score, torch.ones_like(score, dtype=torch.bool) if candidates is None else candidates)


def _strides(candidates: Tensor | None) -> tuple[int, int]:
    return (0, 0) if candidates is None else (candidates.stride(0), candidates.stride(1))


@torch.library.custom_op("depthc::select_topk", mutates_args=())
def select_topk_op(
    logits: Tensor, k: int, candidates: Tensor | None, wanted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(positions, valid, mask, inverse, fine [B]: whether no candidate of the row is NaN) by the kernel."""
    import triton

    from depthc.codegen.kernels.select.kernel import topk_kernel

    wanted = None if wanted is None else wanted.contiguous()
    made = _topk_shapes(logits, k, candidates, wanted)
    block = max(16, triton.next_power_of_2(logits.shape[1]))
    with on(logits):
        topk_kernel[(logits.shape[0],)](
            logits, candidates, wanted, *made, logits.shape[1], k, *logits.stride(), *_strides(candidates),
            HAS_CANDIDATES=candidates is not None, HAS_WANTED=wanted is not None, BLOCK=block,
            STEP=min(block, _STEP), num_warps=4,
        )  # fmt: skip
    return made


@select_topk_op.register_fake
def _topk_shapes(
    logits: Tensor, k: int, candidates: Tensor | None, wanted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, S = logits.shape
    return (
        logits.new_empty((B, k), dtype=torch.int64),
        logits.new_empty((B, k), dtype=torch.bool),
        logits.new_empty((B, S), dtype=torch.bool),
        logits.new_empty((B, S), dtype=torch.int32),
        logits.new_empty((B,), dtype=torch.bool),
    )


@torch.library.custom_op("depthc::select_where", mutates_args=())
def select_where_op(
    score: Tensor, number: float, inclusive: bool, candidates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mask, counts, cu_seqlens, places, inverse, fine [B]) by the kernels."""
    import triton

    from depthc.codegen.kernels.select.kernel import pack_kernel, where_kernel

    made = mask, counts, cu_seqlens, places, inverse, fine = _where_shapes(score, number, inclusive, candidates)
    B, S = score.shape
    rule = "all" if number == -math.inf else "atleast" if inclusive else "above"
    if not score.is_floating_point() and math.isfinite(number):  # compared as integers, exact beyond 2^24
        rule, number = "atleast", math.ceil(number) if inclusive else math.floor(number) + 1
    block = min(_STEP, max(16, triton.next_power_of_2(S)))
    with on(score):
        where_kernel[(B,)](
            score, candidates, mask, counts, fine, number, S, *score.stride(), *_strides(candidates),
            HAS_CANDIDATES=candidates is not None, RULE=rule, BLOCK=block, num_warps=4,
        )  # fmt: skip
        pack_kernel[(B,)](
            mask, counts, cu_seqlens, places, inverse, B, S,
            ROWS=max(16, triton.next_power_of_2(B)), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return made


@select_where_op.register_fake
def _where_shapes(
    score: Tensor, number: float, inclusive: bool, candidates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, S = score.shape
    return (
        score.new_empty((B, S), dtype=torch.bool),
        score.new_empty((B,), dtype=torch.int32),
        score.new_empty((B + 1,), dtype=torch.int32),
        score.new_empty((B * S,), dtype=torch.int64),
        score.new_empty((B, S), dtype=torch.int32),
        score.new_empty((B,), dtype=torch.bool),
    )
