"""Linear maps of few rows as an op, for a step of decoding.

Such a map takes as long as reading its matrix does. A library's kernels for products take two to eight times that,
being made for many rows, and a launch for every map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from depthc.codegen.kernels.common import FLOATS, on, runs_on, side_by_side
from depthc.ir.errors import InputError

FEW = 4  # rows, whose sums a program has in registers
MOST = 3  # maps at once: query, key and value
WIDEST = 16384  # features of a row, whose loop is unrolled
_PROGRAMS = 264  # two for each of 132 multiprocessors
_BLOCK = 2048  # features that a program reads at a time, 16 bytes a thread


def few_rows_linear(
    rows: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor] | None = None, added: Tensor | None = None
) -> list[Tensor]:
    """`linear(rows, matrix, bias) + added` for each of some matrices, in one launch; summed in fp32, rounded once.

    The kernel runs where `applies` has nothing against it and no gradient is wanted, else
    `torch.nn.functional.linear` does.

    Args:
        rows: float32, bfloat16 or float16 [..., K], at most `FEW` rows of them.
        matrices: [N, K] each, at most `MOST`.
        biases: [N] each; none, or one a matrix.
        added: [..., N], to the result of a single matrix: a residual stream.

    Returns:
        [..., N] of each matrix.

    Raises:
        InputError: shapes that do not fit.

    Example:
        >>> few_rows_linear(torch.tensor([[1.0, 2.0]]), [torch.eye(2), torch.ones(1, 2)])
        [tensor([[1., 2.]]), tensor([[3.]])]
    """
    given = list(biases or [])
    _check(rows, matrices, given, added)
    inputs = [rows, *matrices, *given, *([] if added is None else [added])]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if wanted or applies(rows, matrices, given):
        each: Sequence[Tensor | None] = given or [None] * len(matrices)
        made = [linear(rows, w, b) for w, b in zip(matrices, each, strict=True)]
        return made if added is None else [y + added for y in made]
    return few_rows_op(rows, list(matrices), given, added)  # type: ignore[no-any-return]


def applies(rows: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> str | None:
    """Why the kernel is not used, in words; None if it is.

    Example:
        >>> applies(torch.zeros(9, 8), [torch.zeros(4, 8)])
        'there are 9 rows, more than 4'
    """
    given, count = (rows, *matrices, *biases), rows.shape[:-1].numel()
    if rows.dtype not in FLOATS or any(t.dtype != rows.dtype for t in given):
        return "the kernel takes float32, bfloat16 and float16, the same for rows, matrices and biases"
    if not 0 < count <= FEW:
        return f"there are {count} rows, more than {FEW}" if count else "there are no rows"
    if not 0 < len(matrices) <= MOST:
        return f"there are {len(matrices)} matrices, and one launch takes {MOST}"
    if rows.shape[-1] > WIDEST:
        return f"rows have {rows.shape[-1]} features, more than {WIDEST}"
    if any(w.stride(1) != 1 for w in matrices) or any(b.stride(0) != 1 for b in biases):
        return "features of a matrix do not lie side by side"
    if any(w.shape[0] >= 2**31 or not w.numel() for w in matrices):
        return "a matrix is empty, or has 2^31 rows or more"
    return runs_on(*given)


def _check(rows: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor], added: Tensor | None) -> None:
    """Shapes that do not fit are errors, since the kernel would read elsewhere."""
    fits = rows.dim() > 0 and all(w.dim() == 2 and w.shape[1] == rows.shape[-1] for w in matrices)
    fits = fits and len(biases) in (0, len(matrices))
    fits = fits and all(b.shape == w.shape[:1] for b, w in zip(biases, matrices, strict=False))
    if fits and added is not None:
        made = [*rows.shape[:-1], matrices[0].shape[0]]
        fits = len(matrices) == 1 and [*added.shape] == made and added.dtype == rows.dtype
    if not fits:
        given = {"rows": [rows], "matrices": matrices, "biases": biases, "added": [] if added is None else [added]}
        raise InputError(
            "shapes of few_rows_linear do not fit together",
            expected="rows [..., K], matrices [N, K], biases [N] or none, added [..., N] to one matrix alone",
            found=", ".join(f"{name} {[list(t.shape) for t in each]}" for name, each in given.items() if each),
            remedy="give a bias a matrix or none, and add a residual to one result",
        )


def tiles_of(rows: int, features: int, columns: int) -> dict[str, int]:
    """How many columns a program makes, as long as there are programs enough, and how many features it reads at a time.

    Example:
        >>> tiles_of(1, 960, 960), tiles_of(3, 2560, 5120)
        ({'ROWS': 1, 'OUT': 2, 'BLOCK': 1024, 'num_warps': 4}, {'ROWS': 4, 'OUT': 2, 'BLOCK': 2048, 'num_warps': 8})
    """
    few = 1 << (rows - 1).bit_length()
    most = (4, 2) if few < FEW else (2,)  # sums of all rows are in registers
    out = next((n for n in most if columns >= n * _PROGRAMS), 1)
    block = max(32, min(1 << (features - 1).bit_length(), _BLOCK))
    return {"ROWS": few, "OUT": out, "BLOCK": block, "num_warps": max(1, block // 256)}


@torch.library.custom_op("depthc::few_rows", mutates_args=())
def few_rows_op(rows: Tensor, matrices: list[Tensor], biases: list[Tensor], added: Tensor | None) -> list[Tensor]:
    """The results by the kernel."""
    import triton

    from depthc.codegen.kernels.few_rows.kernel import products_kernel

    flat = side_by_side(rows.reshape(-1, rows.shape[-1]))
    made, (count, features) = _made(rows, matrices), flat.shape
    columns, strides = [w.shape[0] for w in matrices], [w.stride(0) for w in matrices]
    tiles, none = tiles_of(count, features, sum(columns)), [None] * MOST

    def three(given: Sequence[Any], absent: Sequence[Any] = none) -> list[Any]:
        return [*given, *absent[len(given) :]]

    with on(rows):
        products_kernel[(sum(triton.cdiv(n, tiles["OUT"]) for n in columns),)](
            flat, added if added is None else added.contiguous(),
            *three(matrices), *three(biases), *three(made),
            flat.stride(0), *three(strides, [0] * MOST), *three(columns, [0] * MOST), count,
            MATRICES=len(matrices), K=features, **tiles,
        )  # fmt: skip
    return made


@few_rows_op.register_fake
def _made(rows: Tensor, matrices: list[Tensor], *_: object) -> list[Tensor]:
    return [rows.new_empty((*rows.shape[:-1], w.shape[0])) for w in matrices]
