"""The ops that combine rows with their stream: kernels where they apply, plain torch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from depthc.codegen.kernels.combine.backward import constants, rows_backward_op, stream_backward_op
from depthc.codegen.kernels.combine.reference import combine_reference
from depthc.codegen.kernels.common import FLOATS, on, require_one_of, runs_on, side_by_side
from depthc.ir.errors import InputError
from depthc.passes.routing_glue import COMBINES, GATES


def applies(stream: Tensor, rows: Tensor, logits: Tensor | None, positions: Tensor, inverse: Tensor) -> str | None:
    """Why the kernels are not used, in words; None if they are.

    Example:
        >>> tokens = torch.zeros(1, 2, dtype=torch.int64)
        >>> applies(torch.zeros(1, 2, 4).double(), torch.zeros(1, 2, 4), None, tokens, tokens.int())
        'stream and rows are float64 and float32; the kernels take float32, bfloat16 and float16, both the same'
    """
    names = [str(t.dtype).removeprefix("torch.") for t in (stream, rows)]
    if stream.dtype not in FLOATS or rows.dtype != stream.dtype:
        kinds = "float32, bfloat16 and float16, both the same"
        return f"stream and rows are {names[0]} and {names[1]}; the kernels take {kinds}"
    if logits is not None and logits.dtype != torch.float32:
        return "logits are not float32"
    if positions.dtype != torch.int64 or inverse.dtype != torch.int32:
        return "positions are not int64, or their inverse is not int32"
    if not rows.numel() or not stream.numel():
        return "there are no rows"
    if inverse.numel() >= 2**31:
        return "there are 2^31 tokens or more"
    return runs_on(stream, rows, logits, positions, inverse)


def combine(
    stream: Tensor,
    rows: Tensor,
    logits: Tensor | None,
    positions: Tensor,
    inverse: Tensor,
    *,
    kind: str = "weighted",
    gate: str = "sigmoid",
    alpha: float = 0.1,
) -> Tensor:
    """What becomes of a stream whose chosen tokens x have rows y: a new stream, [B, S, D].

    weighted: x + s y; additive: x + y; delta: x + s (y - x); off: y; with s = alpha G(logit), or the logit itself
    without a gate (`passes/routing_glue.py`: combine). Other tokens stay as they are, bit for bit. Computed in fp32
    and rounded once. Packed rows are one batch row: `stream.view(1, B * S, D)` with places as positions.

    Args:
        stream: float32, bfloat16 or float16 [B, S, D].
        rows: [B, k, D] in the same dtype.
        logits: float32 [B, k]; not read by "additive" and "off".
        positions: int64 [B, k], distinct in a row.
        inverse: int32 [B, S], of `select_topk`, or of `inverse_of`; a row that it does not name is not combined.
        kind: one of `COMBINES`.
        gate: one of `GATES`.

    Raises:
        InputError: there is no such kind or gate, or no logits where they are read.

    Example:
        >>> stream, rows = torch.ones(1, 3, 1), torch.tensor([[[5.0]]])
        >>> positions, inverse = torch.tensor([[1]]), torch.tensor([[-1, 0, -1]], dtype=torch.int32)
        >>> combine(stream, rows, torch.tensor([[2.0]]), positions, inverse, gate="none").flatten()
        tensor([ 1., 11.,  1.])
    """
    logits = _checked(logits, kind, gate)
    if applies(stream, rows, logits, positions, inverse):
        return combine_reference(stream, rows, logits, positions, inverse, kind=kind, gate=gate, alpha=alpha)
    return combine_op(stream, rows, logits, positions, inverse, kind, gate, alpha)


def combine_(
    stream: Tensor,
    rows: Tensor,
    logits: Tensor | None,
    positions: Tensor,
    inverse: Tensor,
    *,
    kind: str = "weighted",
    gate: str = "sigmoid",
    alpha: float = 0.1,
) -> Tensor:
    """`combine` in place, for inference: writes the chosen rows of the stream alone, and returns the stream.

    Raises:
        InputError: a gradient is wanted, or there is no such kind or gate.
    """
    logits = _checked(logits, kind, gate)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (stream, rows, logits)):
        raise InputError(
            "combine_ has no gradient",
            expected="arguments that take none",
            found="one that requires grad",
            remedy="use combine, or torch.no_grad()",
        )
    if applies(stream, rows, logits, positions, inverse) or stream.stride(2) != 1:
        return stream.copy_(
            combine_reference(stream, rows, logits, positions, inverse, kind=kind, gate=gate, alpha=alpha)
        )
    in_place_op(stream, rows, logits, positions, inverse, kind, gate, alpha)
    return stream


def _checked(logits: Tensor | None, kind: str, gate: str) -> Tensor | None:
    """The logits, if they are read."""
    require_one_of("kind", kind, COMBINES)
    require_one_of("gate", gate, GATES)
    if kind in ("additive", "off"):
        return None
    if logits is None:
        raise InputError(
            f"{kind} needs logits", expected="float32 [B, k]", found="None", remedy="pass them, or use kind='additive'"
        )
    return logits


@torch.library.custom_op("depthc::combine", mutates_args=())
def combine_op(
    stream: Tensor, rows: Tensor, logits: Tensor | None, positions: Tensor, inverse: Tensor,
    kind: str, gate: str, alpha: float,
) -> Tensor:  # fmt: skip
    """The new stream by the kernel; the positions are for the backward."""
    from depthc.codegen.kernels.combine.kernel import forward_kernel

    (B, S, D), k = stream.shape, rows.shape[1]
    stream = side_by_side(stream)
    out = stream.new_empty((B, S, D))
    with on(stream):
        forward_kernel[(B * S,)](
            stream, rows.contiguous(), None if logits is None else logits.contiguous(), inverse.contiguous(), out,
            S, k, stream.stride(0), stream.stride(1), alpha, KIND=kind, **constants(logits, gate, D),
        )  # fmt: skip
    return out


@combine_op.register_fake
def _combine_shape(
    stream: Tensor, rows: Tensor, logits: Tensor | None, positions: Tensor, inverse: Tensor,
    kind: str, gate: str, alpha: float,
) -> Tensor:  # fmt: skip
    return stream.new_empty(stream.shape)


@torch.library.custom_op("depthc::combine_", mutates_args=("stream",))
def in_place_op(
    stream: Tensor, rows: Tensor, logits: Tensor | None, positions: Tensor, inverse: Tensor,
    kind: str, gate: str, alpha: float,
) -> None:  # fmt: skip
    """Combines in place by the kernel."""
    from depthc.codegen.kernels.combine.kernel import in_place_kernel

    (B, S, D), k = stream.shape, rows.shape[1]
    with on(stream):
        in_place_kernel[(B * k,)](
            stream, rows.contiguous(), None if logits is None else logits.contiguous(), positions.contiguous(),
            inverse.contiguous(), S, k, stream.stride(0), stream.stride(1), alpha,
            KIND=kind, **constants(logits, gate, D),
        )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    stream, rows, logits, positions, inverse, *ctx.options = inputs
    kind = ctx.options[0]
    ctx.save_for_backward(
        stream if kind == "delta" else None, None if logits is None else rows, logits, positions, inverse
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    stream, rows, logits, positions, inverse = ctx.saved_tensors
    kind, gate, alpha = ctx.options
    grad_stream = grad_rows = grad_logits = None
    if ctx.needs_input_grad[0]:  # of weighted and additive it is the gradient itself
        grad_stream = stream_backward_op(grad, logits, inverse, gate, alpha) if kind in ("delta", "off") else grad
    if any(ctx.needs_input_grad[1:3]):
        grad_rows, grad_logits = rows_backward_op(grad, stream, rows, logits, positions, inverse, kind, gate, alpha)
    return grad_stream, grad_rows, None if logits is None else grad_logits, *[None] * 5


combine_op.register_autograd(_backward, setup_context=_setup)
