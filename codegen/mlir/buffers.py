"""Buffers: torch tensors as the memory descriptors that compiled functions take, and back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_GLOBAL = 0xDEADBEEF  # what MLIR calls the allocation of a constant, which nobody frees
_libc = ctypes.CDLL(None)
_libc.free.argtypes = [ctypes.c_void_p]


@cache
def descriptor_type(rank: int) -> type[ctypes.Structure]:
    """The descriptor of a buffer: where it was allocated, where it starts, an offset, sizes and strides."""
    fields: list[Any] = [("allocated", ctypes.c_void_p), ("aligned", ctypes.c_void_p), ("offset", ctypes.c_int64)]
    if rank:
        fields += [("sizes", ctypes.c_int64 * rank), ("strides", ctypes.c_int64 * rank)]
    return type(f"Descriptor{rank}", (ctypes.Structure,), {"_fields_": fields})


def descriptor(tensor: Tensor) -> ctypes.Structure:
    """A contiguous tensor as a descriptor; it must outlive it."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    made = descriptor_type(tensor.dim())()
    made.allocated = made.aligned = tensor.data_ptr() or None
    if tensor.dim():
        made.sizes, made.strides = type(made.sizes)(*tensor.shape), type(made.strides)(*tensor.stride())
    return made


class Results:
    """Room for what a function returns."""

    def __init__(self, types: Sequence[tuple[int, torch.dtype]]) -> None:
        self.types = types
        fields = [(f"_{n}", descriptor_type(rank)) for n, (rank, _) in enumerate(types)]
        self.room = type("Results", (ctypes.Structure,), {"_fields_": fields})()

    def tensors(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """The results as tensors of their own; the buffers are given back, unless they are an argument's."""
        found = [getattr(self.room, f"_{n}") for n in range(len(self.types))]
        tensors = [_tensor(each, dtype) for each, (_, dtype) in zip(found, self.types, strict=True)]
        owned = {each.allocated for each in found} - {a.data_ptr() for a in arguments} - {None, _GLOBAL}
        for address in owned:
            _libc.free(address)
        return tensors


def _tensor(found: Any, dtype: torch.dtype) -> Tensor:
    """A copy of a buffer."""
    sizes, strides = list(getattr(found, "sizes", ())), list(getattr(found, "strides", ()))
    if not all(sizes):
        return torch.empty(sizes, dtype=dtype)
    extent = found.offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
    raw = (ctypes.c_uint8 * (extent * dtype.itemsize)).from_address(found.aligned)
    return (
        torch.frombuffer(raw, dtype=dtype)
        .as_strided(sizes, strides, found.offset)
        .clone(memory_format=torch.contiguous_format)
    )
