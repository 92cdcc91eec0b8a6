"""The rules of parameters: types of numbers alone, and expressions of weights that are there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from depthc.ir.errors import VerifyError
from depthc.ir.params import Expr, Init, Mean, Ref, Shuffle, Svd, Tile
from depthc.ir.program import Program
from depthc.ir.types import Type

_KINDS = ("parameter", "frozen", "buffer", "constant")


def check_params(program: Program) -> None:
    """Check the parameters of a program.

    Raises:
        VerifyError: the first rule that one of them breaks.
    """
    for name, param in program.params.items():
        where = f"parameter {name!r}"
        if param.kind not in _KINDS:
            _fail(where, "unknown kind of parameter", expected=", ".join(_KINDS), found=param.kind)
        if not isinstance(param.type, Type) or param.type.size_names():
            _fail(where, "a parameter has a size that is not a number", expected="integers", found=str(param.type))
        for expr in _inner(param.expr):
            if isinstance(expr, Ref) and program.weights and expr.name not in program.weights:
                _fail(where, f"there is no weight {expr.name!r}", expected="a name among the weights", found=expr.name)
            if isinstance(expr, Mean) and not expr.terms:
                _fail(where, "the mean of nothing", expected="at least one term", found="mean()")
            if isinstance(expr, Svd) and (expr.rank < 1 or expr.side not in ("left", "right")):
                found = f"{expr.side} {expr.rank}"
                _fail(where, "this is no SVD factor", expected="left or right, rank >= 1", found=found)
            if isinstance(expr, Tile) and (expr.count < 1 or expr.over < 1):
                found = f"{expr.count}, over={expr.over}"
                _fail(where, "this is no row of copies", expected="numbers of at least 1", found=found)
            if isinstance(expr, Init) and not _is_law(expr.law):
                _fail(where, "unknown law", expected="zeros, ones, eye, last or normal(std)", found=expr.law)


def _inner(expr: Expr | None) -> Iterable[Expr]:
    if expr is None:
        return
    yield expr
    inner = (expr.a, expr.b) if isinstance(expr, Svd) else (expr.term,) if isinstance(expr, Shuffle | Tile) else ()
    for term in (*getattr(expr, "terms", ()), *inner):
        yield from _inner(term)


def _is_law(law: str) -> bool:
    return law in ("zeros", "ones", "eye", "last") or _number(law.removeprefix("normal(").removesuffix(")")) is not None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _fail(where: str, what: str, *, expected: str, found: str) -> NoReturn:
    remedy = "correct the pass or the text that made this"
    raise VerifyError(what, where=where, expected=expected, found=found, remedy=remedy)
