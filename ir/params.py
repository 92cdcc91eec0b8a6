"""Parameter expressions: how a program's parameters follow from the weights of the model that was captured.

They are data, evaluated only at lowering, so a model on the meta device can be rewritten and inspected. Tying is
one `Ref` bound twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from depthc.ir.errors import StateDictError
from depthc.ir.types import Type

STEP = "depth.step"  # the buffer that holds the optimizer steps taken, of programs with a schedule


@dataclass(frozen=True)
class Ref:
    """The weight of this name."""

    name: str

    def evaluate(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The tensor itself, not a copy."""
        if self.name not in weights:
            raise StateDictError(f"there is no weight {self.name!r}", remedy="give the weights of the captured model")
        return weights[self.name]


@dataclass(frozen=True)
class Mean:
    """The elementwise mean of several expressions."""

    terms: tuple[Expr, ...]

    def evaluate(self, weights: Mapping[str, Tensor]) -> Tensor:
        """A new tensor in the dtype of the terms, summed in their order in fp32 or better."""
        tensors = [t.evaluate(weights) for t in self.terms]
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        return torch.stack([t.detach().to(wide) for t in tensors]).mean(0).to(tensors[0].dtype)


@dataclass(frozen=True)
class Svd:
    """One factor of the rank-`rank` truncated SVD of `a - b` (U S and V^T: RRT, arXiv 2410.20672, section 2.3)."""

    side: Literal["left", "right"]
    a: Expr
    b: Expr
    rank: int

    def evaluate(self, weights: Mapping[str, Tensor]) -> Tensor:
        """[rows, rank] for the left factor (U S), [rank, columns] for the right one (V^T)."""
        a, b = self.a.evaluate(weights).detach(), self.b.evaluate(weights).detach()
        wide = torch.promote_types(a.dtype, torch.float32)
        u, s, vh = torch.linalg.svd(a.to(wide) - b.to(wide), full_matrices=False)
        factor = u[:, : self.rank] * s[: self.rank] if self.side == "left" else vh[: self.rank]
        return factor.to(a.dtype)


@dataclass(frozen=True)
class Init:
    """A fresh tensor: `law` is "zeros", "ones", "eye", "last" (zeros but for the last entry, 1) or "normal(std)".

    It is drawn from `seed` alone, on the CPU.
    """

    type: Type
    law: str
    seed: int = 0

    def evaluate(self, weights: Mapping[str, Tensor]) -> Tensor:
        """A tensor of the type's shape and dtype, equal on every rank."""
        shape = self.type.sizes({})
        if self.law == "zeros":
            return torch.zeros(shape, dtype=self.type.dtype)
        if self.law == "ones":
            return torch.ones(shape, dtype=self.type.dtype)
        if self.law == "eye":
            return torch.eye(*shape, dtype=self.type.dtype)
        if self.law == "last":
            found = torch.zeros(shape, dtype=self.type.dtype)
            found[..., -1] = 1
            return found
        std = float(self.law.removeprefix("normal(").removesuffix(")"))
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(self.type.dtype)


@dataclass(frozen=True)
class Shuffle:
    """A fresh draw by the law that a weight was drawn by: its own entries in another order, from `seed` alone."""

    term: Expr
    seed: int = 0

    def evaluate(self, weights: Mapping[str, Tensor]) -> Tensor:
        """A new tensor; what all entries have in common (ones of a norm, zeros of a bias) stays."""
        tensor = self.term.evaluate(weights).detach()
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return tensor.flatten()[order].view(tensor.shape)


@dataclass(frozen=True)
class Tile:
    """A matrix several times side by side, each divided by a number: [W / over, ..., W / over]."""

    term: Expr
    count: int
    over: int = 1

    def evaluate(self, weights: Mapping[str, Tensor]) -> Tensor:
        """[rows, count * columns] in the dtype of the term; a new tensor."""
        return self.term.evaluate(weights).detach().repeat(1, self.count) / self.over


Expr = Ref | Mean | Svd | Init | Shuffle | Tile
ParamKind = Literal["parameter", "frozen", "buffer", "constant"]


@dataclass(frozen=True)
class Param:
    """A parameter or buffer of the program, under its name in the state dict.

    `kind` is "parameter", "buffer", "constant" (a buffer that is not saved) or "frozen" (a parameter that takes no
    gradient). `expr` is None where the parameter is the weight of the same name.
    """

    type: Type
    kind: ParamKind = "parameter"
    expr: Expr | None = None


def drawn(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, std: float, seed: int) -> dict[str, Param]:
    """Fresh parameters by name: normal draws, each from a seed of its own."""
    law = f"normal({std})" if std else "zeros"
    types = {name: Type(dtype, shape) for name, shape in shapes.items()}
    return {name: Param(type, expr=Init(type, law, seed + n)) for n, (name, type) in enumerate(types.items())}


def steps_taken() -> dict[str, Param]:
    """The buffer that a schedule reads: no optimizer step was taken yet."""
    count = Type(torch.int64, ())
    return {STEP: Param(count, "buffer", Init(count, "zeros"))}


def value_of(name: str, param: Param, weights: Mapping[str, Tensor]) -> Tensor:
    """The tensor of a parameter, from the weights of the captured model."""
    return (param.expr or Ref(name)).evaluate(weights)
