"""Linear maps of few rows as an op, for a step of decoding.

Such a map takes as long as reading its matrix does. A library's kernels for products take two to eight times that,
being made for many rows, and a launch for every map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from depthc.codegen.kernels.common import FLOATS, on, runs_on, side_by_side
from depthc.ir.errors import InputError

FEW = 4  # rows of a map, whose sums a program has in registers
MOST = 3  # maps at once: query, key and value
SECTIONS = 8  # at once
WIDEST = 32768  # bytes of a row, whose loop is unrolled
_PROGRAMS = 264  # two for each of 132 multiprocessors
_BLOCK = 1024  # features that a program reads at a time
_WHOLE = 2048  # features of a row that it reads at once


def few_rows_linear(
    rows: Tensor,
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    added: Tensor | None = None,
    sections: int = 1,
) -> list[Tensor]:
    """`linear(rows, matrix, bias) + added` for each of some maps, in one launch; summed in fp32, rounded once.

    The kernel runs where `applies` has nothing against it and no gradient is wanted, else
    `torch.nn.functional.linear` does.

    Args:
        rows: float32, bfloat16 or float16 [..., K], at most `FEW` rows a section.
        matrices: [N, K] each; of at most `MOST` maps, those of a map's sections one after the other.
        biases: [N] each; none, or one a matrix.
        added: [..., N], to the result of a single map: a residual stream.
        sections: equal parts of the rows, one behind the other, each of which has matrices and biases of its own.

    Returns:
        [..., N] of each map.

    Raises:
        InputError: shapes that do not fit.

    Example:
        >>> few_rows_linear(torch.tensor([[1.0, 2.0]]), [torch.eye(2), torch.ones(1, 2)])
        [tensor([[1., 2.]]), tensor([[3.]])]
        >>> few_rows_linear(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [torch.eye(2), 2 * torch.eye(2)], sections=2)
        [tensor([[1., 2.],
                [6., 8.]])]
    """
    given = list(biases or [])
    _check(rows, matrices, given, added, sections)
    inputs = [rows, *matrices, *given, *([] if added is None else [added])]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    run = reference if wanted else few_rows_op
    return run(rows, list(matrices), given, added, sections)  # type: ignore[no-any-return]


def reference(
    rows: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor], added: Tensor | None, sections: int
) -> list[Tensor]:
    """The same by torch, map by map and section by section."""
    parts = rows.flatten(0, -2).chunk(sections) if sections > 1 else [rows]
    each: Sequence[Tensor | None] = biases or [None] * len(matrices)
    own = [linear(parts[i % sections], w, b) for i, (w, b) in enumerate(zip(matrices, each, strict=True))]
    maps = [torch.cat(own[at : at + sections]) for at in range(0, len(own), sections)] if sections > 1 else own
    made = [y.view(*rows.shape[:-1], y.shape[-1]) for y in maps]
    return made if added is None else [y + added for y in made]


def applies(rows: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor] = (), sections: int = 1) -> str | None:
    """Why the kernel is not used, in words; None if it is.

    Example:
        >>> applies(torch.zeros(9, 8), [torch.zeros(4, 8)])
        'there are 9 rows, more than 4'
    """
    given, count, maps = (rows, *matrices, *biases), rows.shape[:-1].numel() // sections, len(matrices) // sections
    if rows.dtype not in FLOATS or any(t.dtype != rows.dtype for t in given):
        return "the kernel takes float32, bfloat16 and float16, the same for rows, matrices and biases"
    if not 0 < count <= FEW:
        return f"there are {count} rows, more than {FEW}" if count else "there are no rows"
    if not 0 < maps <= MOST or sections > SECTIONS:
        return f"there are {maps} maps of {sections} sections, and one launch takes {MOST} of {SECTIONS}"
    if (size := rows.shape[-1] * rows.element_size()) > WIDEST:
        return f"a row has {size} bytes, more than {WIDEST}"
    if any(w.stride(1) != 1 for w in matrices) or any(b.stride(0) != 1 for b in biases):
        return "features of a matrix do not lie side by side"
    if any(w.shape[0] >= 2**31 or not w.numel() for w in matrices):
        return "a matrix is empty, or has 2^31 rows or more"
    return runs_on(*given)


def _check(
    rows: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor], added: Tensor | None, sections: int
) -> None:
    """Shapes that do not fit are errors, since the kernel would read elsewhere."""
    fits = rows.dim() > 0 and all(w.dim() == 2 and w.shape[1] == rows.shape[-1] for w in matrices)
    fits = fits and sections > 0 and rows.shape[:-1].numel() % sections == len(matrices) % sections == 0
    fits = fits and all(w.shape == matrices[i - i % sections].shape for i, w in enumerate(matrices))
    fits = fits and len(biases) in (0, len(matrices))
    fits = fits and all(b.shape == w.shape[:1] for b, w in zip(biases, matrices, strict=False))
    if fits and added is not None:
        made = [*rows.shape[:-1], matrices[0].shape[0]]
        fits = len(matrices) == sections and [*added.shape] == made and added.dtype == rows.dtype
    if not fits:
        given = {"rows": [rows], "matrices": matrices, "biases": biases, "added": [] if added is None else [added]}
        raise InputError(
            "shapes of few_rows_linear do not fit together",
            expected="rows [..., K], matrices [N, K] a map and section, biases [N] or none, added [..., N] to one map",
            found=f"sections {sections}, "
            + ", ".join(f"{name} {[list(t.shape) for t in each]}" for name, each in given.items() if each),
            remedy="give a bias a matrix or none, and add a residual to one result",
        )


def tiles_of(rows: int, features: int, columns: int) -> dict[str, int]:
    """How many columns a program makes, if there are programs enough, and how many features it reads at a time.

    A few warps with much to read each have all loads on their way at once. Registers limit it: they hold the sums of
    all rows, and what was read.

    Example:
        >>> tiles_of(1, 960, 960), tiles_of(3, 2560, 5120)
        ({'ROWS': 1, 'OUT': 2, 'BLOCK': 1024, 'num_warps': 2}, {'ROWS': 4, 'OUT': 2, 'BLOCK': 1024, 'num_warps': 4})
    """
    few, wide = 1 << (rows - 1).bit_length(), 1 << (features - 1).bit_length()
    block = max(32, wide if wide <= (_WHOLE if few < FEW else _BLOCK) else _BLOCK)
    warps = 2 if few < FEW and features <= 6 * _BLOCK else 4
    return {"ROWS": few, "OUT": 2 if columns >= 2 * _PROGRAMS else 1, "BLOCK": block, "num_warps": warps}


@torch.library.custom_op("depthc::few_rows", mutates_args=())
def few_rows_op(
    rows: Tensor, matrices: list[Tensor], biases: list[Tensor], added: Tensor | None, sections: int = 1
) -> list[Tensor]:
    """The results by the kernel where it applies."""
    if applies(rows, matrices, biases, sections):
        return reference(rows, matrices, biases, added, sections)
    import triton

    from depthc.codegen.kernels.few_rows.kernel import products_kernel

    flat = side_by_side(rows.reshape(-1, rows.shape[-1]))
    made, (total, features) = _made(rows, matrices, biases, added, sections), flat.shape
    columns, strides = tuple(w.shape[0] for w in matrices), tuple(w.stride(0) for w in matrices)
    tiles = tiles_of(total // sections, features, sum(columns))

    def parts(x: Tensor) -> tuple[Tensor, ...]:
        return x.view(total, -1).chunk(sections)

    with on(rows):
        products_kernel[(sum(triton.cdiv(n, tiles["OUT"]) for n in columns),)](
            parts(flat) * (len(matrices) // sections), tuple(matrices), tuple(biases) or None,
            added if added is None else parts(added.contiguous()),
            tuple(part for y in made for part in parts(y)),
            columns, strides, flat.stride(0), total // sections,
            MAPS=len(matrices), K=features, **tiles,
        )  # fmt: skip
    return made


@few_rows_op.register_fake
def _made(
    rows: Tensor, matrices: list[Tensor], biases: list[Tensor], added: Tensor | None, sections: int = 1
) -> list[Tensor]:
    return [rows.new_empty((*rows.shape[:-1], w.shape[0])) for w in matrices[::sections]]
