"""Products of packed rows of which only the first are there: how many, the device alone knows.

The library's product of groups of rows takes where groups end as a tensor: with one group, rows behind it cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from depthc.ir.axes.analysis import Axes
from depthc.ir.axes.ops import op_name

_ROWS = {"linear": 0, "mm": 0, "addmm": 1}  # which operand has the rows
_ALIGNED = 8  # numbers in half precision that the library reads at once


def fits(axes: Axes, node: fx.Node) -> bool:
    """Whether an op is a product of rows, one a token, by a matrix that is the same for all."""
    at = _ROWS.get(op_name(node))
    if at is None or node.kwargs or node.args[at] not in axes.moving:  # addmm may scale what it adds
        return False
    others = (n for n in node.all_input_nodes if n is not node.args[at])
    *rows, last = axes.labels[node.args[at]]  # type: ignore[index]
    found = [atom for dim in rows for atom in dim]
    apart = found == [axes.batch, axes.token] and not {*last} & {axes.batch, axes.token}
    return apart and not any(n in axes.moving for n in others)


def runs(args: list[Any], name: str) -> bool:
    """Whether the library's product takes such operands: bf16, sizes that are aligned, and a GPU for which it is made.

    On others it waits for the data; so it does on a CPU, where nothing else waits.
    """
    rows, matrix, _ = _operands(args, name)
    if dtype_of(rows) is not torch.bfloat16 or rows.device.type not in ("cuda", "cpu"):
        return False
    made = not rows.is_cuda or torch.cuda.get_device_capability(rows.device)[0] in (9, 10)
    return made and all(size % _ALIGNED == 0 for size in matrix.shape)


def product(args: list[Any], name: str, count: Tensor) -> Tensor:
    """What the op makes of the first rows, int32 `count` [1] of them; zeros behind, and no gradient from there."""
    rows, matrix, bias = _operands(args, name)
    dtype = dtype_of(rows)
    flat, matrix = first(rows.flatten(0, -2).to(dtype), count), matrix.to(dtype)
    made = F.grouped_mm(flat, matrix[None], offs=count)
    if bias is not None:
        made = made + bias.to(dtype)
    return first(made, count).unflatten(0, rows.shape[:-1])


def first(rows: Tensor, count: Tensor) -> Tensor:
    """The first rows, and zeros behind: what is there may be anything, NaN too, and so may its gradient."""
    inside = torch.arange(rows.shape[0], device=rows.device) < count
    return torch.where(inside.reshape(-1, *(1,) * (rows.dim() - 1)), rows, rows.new_zeros(()))


def dtype_of(rows: Tensor) -> torch.dtype:
    """What ops compute in: autocast knows the op that was captured, and not what is in its place."""
    kind = rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype


def _operands(args: list[Any], name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows, the matrix [features, columns], and the bias."""
    if name == "addmm":
        return args[1], args[2], args[0]
    return (args[0], args[1].T, args[2] if len(args) > 2 else None) if name == "linear" else (args[0], args[1], None)
