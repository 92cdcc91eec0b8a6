"""Cost: what a program holds, runs and keeps, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import sympy

from depthc.ir.cost.layers import owner_of
from depthc.ir.cost.walk import as_written, walk_of
from depthc.ir.errors import IncrementalError, InputError
from depthc.ir.names import closest
from depthc.ir.plans import plan_of
from depthc.ir.program import Program


@dataclass(frozen=True)
class Figures:
    """A cost at some sizes.

    Attributes:
        parameters, parameter_bytes: as in `Cost`.
        flops: floating-point operations of one forward.
        cache_bytes: bytes that attention keeps for later tokens; None where there is no generation token by token.
        at_most: whether sets whose sizes only the data decide were taken to be as large as they can be.
    """

    parameters: int
    parameter_bytes: int
    flops: int
    cache_bytes: int | None
    at_most: bool


@dataclass(frozen=True)
class Cost:
    """What a program holds, runs and keeps.

    Attributes:
        parameters: numbers in trained and frozen parameters, those that are shared once.
        parameter_bytes: their bytes.
        flops: operations of one forward, over the size names of the inputs, a symbol for every capacity below 1
            ("c_active_1"), and one for every set whose size only the data decide; see `depthc.ir.cost.flops`.
        cache_bytes: bytes that attention keeps after as many tokens, over the same; None where the program does not go
            token by token.
        no_cache: why it does not.
        capacities: the values of the capacities.
        unknown: for every set whose size only the data decide, the most that it can hold.
    """

    parameters: int
    parameter_bytes: int
    flops: sympy.Expr
    cache_bytes: sympy.Expr | None
    no_cache: str
    capacities: Mapping[str, sympy.Rational]
    unknown: Mapping[str, sympy.Expr]

    @property
    def names(self) -> set[str]:
        """The sizes that it depends on, its capacities, and the sets whose size only the data decide."""
        forms = (self.flops, self.cache_bytes or sympy.S.Zero, *self.unknown.values())
        return {symbol.name for form in forms for symbol in form.free_symbols} | self.capacities.keys()

    def among(self, sizes: Mapping[str, float]) -> dict[str, float]:
        """Those of some sizes that it depends on."""
        return {name: size for name, size in sizes.items() if name in self.names}

    def at(self, **sizes: float) -> Figures:
        """The cost at some sizes: `cost.at(b=1, s=2048)`; capacities and sets may be given by their names, too.

        Raises:
            InputError: a size is missing, or there is no such name.
        """
        names = self.names
        for name in sizes.keys() - names:
            expected = ", ".join(sorted(names)) or "no sizes"
            remedy = f"use {closest(name, names)!r}" if names else "leave it out"
            raise InputError(f"the cost has no size {name!r}", expected=expected, found=name, remedy=remedy)
        given = dict(self.capacities) | sizes
        unknown = [name for name in self.unknown if name not in sizes]
        for name in sorted(names - given.keys() - set(unknown)):
            raise InputError(f"the size {name!r} is missing", found=", ".join(given), remedy=f"give {name}=...")
        for name in unknown:  # in the order of execution: later sets are within earlier ones
            given[name] = _number(self.unknown[name], given)
        cache = None if self.cache_bytes is None else int(_number(self.cache_bytes, given))
        flops = int(_number(self.flops, given))
        return Figures(self.parameters, self.parameter_bytes, flops, cache, bool(unknown))


def _number(cost: sympy.Expr, given: Mapping[str, float]) -> sympy.Expr:
    return cost.subs({sympy.Symbol(name): value for name, value in given.items()}, simultaneous=True)


def cost_of(program: Program, *, selection: str = "training") -> Cost:
    """The cost of a program, from its structure alone; weights are not needed.

    Args:
        selection: whether sets are as large as the rules of "training" make them, or those of "inference", which only
            the data decide.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> cost = cost_of(depthc.capture(model, (torch.ones(2, 5, 4),)))
        >>> cost.parameters, cost.flops, cost.at(b=2, s=5).flops
        (60, 96*b*s, 960)
    """
    costs = program.__dict__.setdefault("_costs", {})
    if selection not in costs:
        costs[selection] = _cost_of(program, selection)
    return costs[selection]  # type: ignore[no-any-return]


def _cost_of(program: Program, selection: str) -> Cost:
    reason, plan = "", None
    try:
        plan = plan_of(program)
    except IncrementalError as error:
        reason = error.what
    walk = walk_of(program, selection=selection, symbolic=True, kinds=plan.kinds if plan else None)
    owned = {owner_of(program, name): p for name, p in program.params.items() if p.kind in ("parameter", "frozen")}
    counts = {owner: (prod(param.type.sizes({})), param.type.dtype.itemsize) for owner, param in owned.items()}
    return Cost(
        sum(count for count, _ in counts.values()),
        sum(count * size for count, size in counts.values()),
        as_written(sympy.Add(*walk.terms)),
        None if reason else as_written(sympy.Add(*walk.kept.values())),
        reason,
        walk.capacities,
        {name: as_written(bound) for name, bound in walk.unknown.items()},
    )
