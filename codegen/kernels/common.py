"""What all kernels ask: whether Triton runs here, and on which device to launch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from depthc.ir.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_HEAD = 256  # features of a head of attention
GRID = 65535  # programs along the second and third dimension of a launch
_INSTALLED = find_spec("triton") is not None


def _constant(function: Callable[P, R]) -> Callable[P, R]:
    """What torch.compiler.assume_constant_result does, which would load Dynamo, and with it triton, on import."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def runs_on(*tensors: Tensor | None) -> str | None:
    """Why a Triton kernel does not run on these tensors; None if it does.

    Tensors on the CPU run under Triton's interpreter only: TRITON_INTERPRET=1, set before triton is imported.

    Example:
        >>> runs_on(torch.empty(2, device="meta"))
        'the tensors are on meta, and Triton runs on cuda'
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        return f"the tensors are on several devices: {', '.join(sorted(map(str, devices)))}"
    device = devices.pop()
    if not _INSTALLED:
        return "triton is not installed"
    if device.type == "cuda":
        return None if is_new(device) else "the GPU is older than compute capability 8.0"
    if device.type == "cpu" and interpreted():
        return None
    return f"the tensors are on {device.type}, and Triton runs on cuda"


@_constant
def is_new(device: torch.device) -> bool:
    """Whether a GPU has bf16 and asynchronous copies."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@_constant
def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def refused_heads(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why no kernel of attention takes such queries, keys and values [batch, head, token, feature]; None if one may.

    Example:
        >>> half = torch.ones(1, 2, 1, 300, dtype=torch.half)
        >>> refused_heads(half, half, half)
        'heads have 300 features, more than 256'
    """
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        return f"queries, keys and values are {q.dtype}, {k.dtype} and {v.dtype}, not all bf16, fp16 or fp32"
    if q.shape[3] > WIDEST_HEAD:
        return f"heads have {q.shape[3]} features, more than {WIDEST_HEAD}"
    if any(x.numel() == 0 for x in (q, k)):
        return "there are no queries or no keys"
    if max(q.shape[:2]) > GRID:
        return f"there are more than {GRID} sequences or heads"
    if any(x.stride(3) != 1 for x in (q, k, v)):
        return "features do not lie side by side"
    return runs_on(q, k, v)


def require_one_of(name: str, value: str, known: Collection[str]) -> None:
    """An error where an option has none of the values that it may have."""
    if value not in known:
        remedy = f"use {next(iter(known))!r}"
        raise InputError(
            f"{name} is {value!r}", expected="one of " + ", ".join(known), found=repr(value), remedy=remedy
        )


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which kernels launch on the device of a tensor, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def precision() -> str:
    """In what tensor cores multiply fp32: in fp32, or in TF32 where torch is allowed to."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def side_by_side(rows: Tensor) -> Tensor:
    """Rows [..., features] whose features lie side by side, as kernels read them."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def warps(features: int) -> dict[str, int]:
    """The block of a program that holds a row of features, and its warps: at most 16 features a thread.

    Example:
        >>> warps(2048), warps(3000)
        ({'BLOCK': 2048, 'num_warps': 4}, {'BLOCK': 4096, 'num_warps': 8})
    """
    block = max(16, 1 << (features - 1).bit_length())
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}
