"""Types of values: a dtype and a shape of sizes, or one of the scalar types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from depthc.ir import sizes
from depthc.ir.sizes import Size

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint64: "u64",
    torch.uint32: "u32",
    torch.uint16: "u16",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Type:
    """A tensor type; prints as `f32[b, s, 64]`.

    Example:
        >>> str(Type(torch.float32, ("b", "s", 64)))
        'f32[b, s, 64]'
    """

    dtype: torch.dtype
    shape: tuple[Size, ...]

    def __str__(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}[{', '.join(map(str, self.shape))}]"

    def size_names(self) -> set[str]:
        """Names of the dynamic sizes in the shape."""
        return {n for size in self.shape if isinstance(size, str) for n in sizes.names(sizes.read(size))}

    def sizes(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """The shape as integers, given a value for every size name."""
        return tuple(sizes.evaluate(size, values) for size in self.shape)


@dataclass(frozen=True)
class Scalar:
    """A Python number that flows between parts of a program: `int` or `float`."""

    name: str

    def __str__(self) -> str:
        return self.name


ValueType = Type | Scalar
INT = Scalar("int")
FLOAT = Scalar("float")
