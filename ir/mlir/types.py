"""Types of values as MLIR has them: `!torch.vtensor` with `?` for every size that is not an integer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from depthc.ir.errors import MlirError
from depthc.ir.types import Scalar, ValueType

ROW_DIMS = (0, 1)  # batch and tokens of a stream: what a region on a set changes
_TENSOR = re.compile(r"!torch\.vtensor<\[(?P<shape>[\d?,]*)\],(?P<dtype>[^,>]+(?:<[^>]*>)?)>")
_SCALARS = {"int": "!torch.int", "float": "!torch.float"}


@dataclass(frozen=True)
class TensorType:
    """A tensor type of the torch dialect: sizes, None where unknown, and the dtype as MLIR spells it.

    Example:
        >>> TensorType.read("!torch.vtensor<[?,16],f32>")
        TensorType(shape=(None, 16), dtype='f32')
        >>> TensorType((None, 16), "f32").fits(TensorType((4, 16), "f32"))
        True
    """

    shape: tuple[int | None, ...]
    dtype: str

    @classmethod
    def read(cls, type: Any) -> TensorType | None:
        """What an MLIR type says; None if it is no tensor of the torch dialect."""
        found = _TENSOR.fullmatch(str(type))
        if found is None:
            return None
        sizes = [size for size in found["shape"].split(",") if size]
        return cls(tuple(None if size == "?" else int(size) for size in sizes), found["dtype"])

    def __str__(self) -> str:
        return f"!torch.vtensor<[{','.join(self._sizes())}],{self.dtype}>"

    def _sizes(self) -> list[str]:
        return ["?" if size is None else str(size) for size in self.shape]

    @property
    def builtin(self) -> str:
        """The type after the torch dialect: signless integers."""
        dtype = re.sub(r"^[su]i", "i", self.dtype)
        return f"tensor<{'x'.join([*self._sizes(), dtype])}>"

    def fits(self, other: TensorType) -> bool:
        """Whether one value can have both types: no two known sizes differ."""
        ranks = self.dtype == other.dtype and len(self.shape) == len(other.shape)
        return ranks and all(a is None or b is None or a == b for a, b in zip(self.shape, other.shape, strict=True))

    def loosened(self, dims: Sequence[int]) -> TensorType:
        """The type without what it says about some dimensions."""
        return TensorType(tuple(None if d in dims else s for d, s in enumerate(self.shape)), self.dtype)

    def join(self, other: TensorType) -> TensorType:
        """The type of a value that has either type; the sizes on which they differ are unknown."""
        pairs = zip(self.shape, other.shape, strict=True)
        return TensorType(tuple(a if a == b else None for a, b in pairs), self.dtype)


def parts(type: Any) -> list[str]:
    """The types of several values that travel as one: the elements of a tuple of the torch dialect.

    Example:
        >>> parts("!torch.tuple<vtensor<[?,16],f32>, int>"), parts("!torch.int")
        (['!torch.vtensor<[?,16],f32>', '!torch.int'], ['!torch.int'])
    """
    text = str(type)
    if not text.startswith("!torch.tuple<"):
        return [text]
    found = re.findall(r"(\w+(?:<[^<>]*(?:<[^<>]*>[^<>]*)*>)?)(?:, |$)", text.removeprefix("!torch.tuple<")[:-1])
    return [f"!torch.{part}" for part in found]


def tuple_text(types: Sequence[Any]) -> str:
    """The type of several values that travel as one."""
    return f"!torch.tuple<{', '.join(str(type).removeprefix('!torch.') for type in types)}>"


def is_set(type: Any) -> bool:
    """Whether a value can be a token set: a mask over batch and tokens."""
    found = TensorType.read(type)
    return found is not None and found.dtype == "i1" and len(found.shape) == 2


def fits(a: Any, b: Any) -> bool:
    """Whether a value of one MLIR type can be used where another one stands."""
    first, second = TensorType.read(a), TensorType.read(b)
    return first.fits(second) if first and second else str(a) == str(b)


def type_text(type: ValueType) -> str:
    """The MLIR type of a value of a program.

    Raises:
        MlirError: the torch dialect has no such dtype.

    Example:
        >>> from depthc.ir.types import Type
        >>> type_text(Type(torch.float32, ("b", "s", 16)))
        '!torch.vtensor<[?,?,16],f32>'
    """
    if isinstance(type, Scalar):
        return _SCALARS[type.name]
    return str(TensorType(tuple(s if isinstance(s, int) else None for s in type.shape), dtype_text(type.dtype)))


def dtype_text(dtype: torch.dtype) -> str:
    """A dtype as MLIR spells it.

    Raises:
        MlirError: the torch dialect has no such dtype.
    """
    from torch_mlir.extras.fx_importer import TORCH_DTYPE_TO_MLIR_TYPE_ASM as known

    if dtype not in known:
        raise MlirError(f"MLIR's torch dialect has no dtype {dtype}", expected=", ".join(map(str, known)))
    return str(known[dtype])


def dtype_of(text: str) -> torch.dtype:
    """The dtype that MLIR spells so."""
    from torch_mlir.extras.fx_importer import TORCH_DTYPE_TO_MLIR_TYPE_ASM as known

    return next(dtype for dtype, name in known.items() if name == text)
