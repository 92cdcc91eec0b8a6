"""Parameter expressions as Python: the function that makes a program's parameters of the captured model's."""

from __future__ import annotations

import torch

from depthc.codegen.python.pieces import entry, folded
from depthc.ir.params import Expr, Init, Mean, Param, Ref, Shuffle, Svd, Tile
from depthc.ir.program import Program
from depthc.ir.text.fold import Piece, joined, line, number
from depthc.ir.text.printer import wrap
from depthc.ir.types import Type

_SVD = '''
def svd_{side}(delta, rank):
    """The {what} of a matrix, cut to a rank."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return {value}
'''
# What expressions call, printed where one does.
DEFINITIONS: dict[str, str] = {
    "normal": '''
def normal(shape, std, seed, dtype):
    """A fresh tensor from a seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)
''',
    "shuffle": '''
def shuffle(tensor, seed):
    """A fresh draw by the law of a tensor: its own entries in another order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.flatten()[order].view(tensor.shape)
''',
    "svd_left": _SVD.format(side="left", what="left factor U S", value="u[:, :rank] * s[:rank]"),
    "svd_right": _SVD.format(side="right", what="right factor V^T", value="vh[:rank]"),
}


def parameter_lines(program: Program) -> list[str]:
    """The function `parameters` and what it calls."""
    used: dict[str, None] = {}
    statements = [line(*entry("w", name), " = ", *_value(name, param, used)) for name, param in program.params.items()]
    body, _ = folded(statements, {"w", "weights"}, set())
    lines = [part for name in used for part in (*DEFINITIONS[name].strip().splitlines(), "", "")]
    lines += [
        "@torch.no_grad()",
        "def parameters(weights):",
        '    """The program\'s parameters by name, from the captured model\'s: its state dict and unsaved buffers."""',
        "    w = {}",
        *(part for text in body for part in wrap(f"    {text}")),
        "    return w",
    ]
    return lines


def _value(name: str, param: Param, used: dict[str, None]) -> list[Piece]:
    return _expr(param.expr or Ref(name), param.type.dtype, used)


def _expr(expr: Expr, dtype: torch.dtype, used: dict[str, None]) -> list[Piece]:
    """An expression of tensors of one dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    cast = f".to({wide})" if wide != dtype else ""
    back = f".to({dtype})" if wide != dtype else ""
    match expr:
        case Ref(name=name):
            return entry("weights", name)
        case Mean(terms=terms):
            stacked = joined([[*_expr(term, dtype, used), cast] for term in terms])
            return ["torch.stack([", *stacked, f"]).mean(0){back}"]
        case Svd(side=side, a=a, b=b, rank=rank):
            used[f"svd_{side}"] = None
            delta = [*_expr(a, dtype, used), f"{cast} - ", *_expr(b, dtype, used), cast]
            return [f"svd_{side}(", *delta, ", ", number(rank), f"){back}"]
        case Shuffle(term=term, seed=seed):
            used["shuffle"] = None
            return ["shuffle(", *_expr(term, dtype, used), ", seed=", number(seed), ")"]
        case Tile(term=term, count=count, over=over):
            divided: list[Piece] = [" / ", number(over)] if over != 1 else []
            return [*_expr(term, dtype, used), ".repeat(1, ", number(count), ")", *divided]
        case Init(type=type, law=law, seed=seed):
            return _init(type, law, seed, used)
    raise TypeError(f"not a parameter expression: {expr!r}")


def _init(type: Type, law: str, seed: int, used: dict[str, None]) -> list[Piece]:
    shape = str(type.sizes({}))
    if law in ("zeros", "ones"):
        return [f"torch.{law}({shape}, dtype={type.dtype})"]
    if law == "eye":
        return [f"torch.eye(*{shape}, dtype={type.dtype})"]
    if law == "last":
        return [f"torch.eye({type.sizes({})[-1]}, dtype={type.dtype})[-1].expand({shape}).clone()"]
    used["normal"] = None
    std = float(law.removeprefix("normal(").removesuffix(")"))
    return [f"normal({shape}, {std!r}, seed=", number(seed), f", dtype={type.dtype})"]
