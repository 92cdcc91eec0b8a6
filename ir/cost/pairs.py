"""Pairs: how many queries and keys a mask lets through, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from depthc.ir.masks.factors import Factor


def pairs(factors: Sequence[Factor], length: sympy.Expr) -> sympy.Expr:
    """The pairs among `length` tokens that relations of positions allow.

    Conditions that arguments decide (padding, documents) take nothing away: they count as if all tokens were real and
    of one document.

    Example:
        >>> s = sympy.Symbol("s", integer=True, positive=True)
        >>> pairs([Factor("causal")], s)
        s*(s + 1)/2
        >>> pairs([Factor("causal"), Factor("window", (4,))], sympy.Integer(10))
        34
    """
    for factor in factors:
        if factor.kind == "chunk":
            rest = [f for f in factors if f is not factor]
            size = sympy.Integer(factor.of[0])
            return sympy.floor(length / size) * pairs(rest, size) + pairs(rest, sympy.Mod(length, size))
    before, after = _reach(factors)
    sides = (_side(length, reach) for reach in (before, after))
    return sympy.factor(length + sympy.Add(*sides))


def _reach(factors: Sequence[Factor]) -> tuple[int | None, int | None]:
    """How many places before and after a query its keys may be; None: any number."""
    bounds: list[tuple[int | None, int | None]] = []
    for factor in factors:
        match factor.kind:
            case "causal":
                bounds.append((None, 0))
            case "window":
                bounds.append((factor.of[0] - 1, None))
            case "band":
                bounds.append((factor.of[0], factor.of[0]))
            case "span":
                low, high = factor.of
                bounds.append((None if low is None else max(0, -low), None if high is None else max(0, high)))
    return _least(b for b, _ in bounds), _least(a for _, a in bounds)


def _least(reaches: object) -> int | None:
    known = [r for r in reaches if r is not None]  # type: ignore[attr-defined]
    return min(known) if known else None


def _side(length: sympy.Expr, reach: int | None) -> sympy.Expr:
    """Pairs at distances 1 to `reach`: length - d at each distance d."""
    far = length - 1 if reach is None else sympy.Min(reach, length - 1)
    return far * length - far * (far + 1) / 2
