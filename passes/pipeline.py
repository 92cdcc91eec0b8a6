"""The one place where passes are applied: verified, timed, logged and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from depthc.ir.errors import RecipeError, VerifyError
from depthc.ir.names import closest
from depthc.ir.program import Program
from depthc.ir.text.functions import walk
from depthc.ir.text.printer import expr_text
from depthc.ir.verify import verify
from depthc.passes.base import Pass
from depthc.passes.logs import tell
from depthc.passes.recipe import Recipe


@dataclass(frozen=True)
class Step:
    """What one pass did.

    Attributes:
        number: its place in the recipe, from 1.
        text: the pass with its options.
        before, after: depth ops in the program.
        seconds: how long it took, verification included.
        made: parameters that the pass made or bound anew, by name, with the expression of their values.
        dropped: parameters that the program no longer has.
        source, result: the program before and after, without weights; None where they were not kept.

    Example:
        >>> print(Step(3, "loop()", 24, 9, 0.01))
        3. loop(): 24 ops -> 9
    """

    number: int
    text: str
    before: int
    after: int
    seconds: float = field(compare=False)
    made: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()
    source: Program | None = field(default=None, compare=False, repr=False)
    result: Program | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.number}. {self.text}: {self.before} ops -> {self.after}"


def run_recipe(
    program: Program, recipe: Recipe, skip: Collection[str] = (), observe: Callable[[Step], None] | None = None
) -> tuple[Program, tuple[Step, ...]]:
    """Apply the passes of a recipe from left to right, leaving out those named in `skip`.

    `observe` is told what each pass did before the next one starts.

    Raises:
        RecipeError: a pass does not apply, or `skip` names none of the recipe.
        VerifyError: a pass broke a rule of the IR; names the pass.
    """
    names = [p.title for p in recipe.passes]
    for name in skip:
        if name not in names:
            remedy = f"skip {closest(name, names)!r}" if names else "skip nothing"
            raise RecipeError(f"the recipe has no pass {name!r}", expected=", ".join(names), found=name, remedy=remedy)
    history = []
    tell("00_capture", program)
    for number, (name, one) in enumerate(zip(names, recipe.passes, strict=True), 1):
        if name not in skip:
            program, step = _applied(program, one, number)
            tell(f"{number:02}_{name}", program, f"{step} ({1000 * step.seconds:.0f} ms)")
            history.append(step)
            if observe:
                observe(step)
    return program, tuple(history)


def _applied(program: Program, one: Pass, number: int) -> tuple[Program, Step]:
    start = time.perf_counter()
    after = one.apply(program)
    try:
        verify(after)
    except VerifyError as error:
        where = f"after pass {number}, {one}; {error.where}"
        raise VerifyError(
            error.what, where=where, expected=error.expected, found=error.found, remedy=error.remedy
        ) from error
    old, new = program.params, after.params
    made = tuple((name, expr_text(p.expr)) for name, p in new.items() if p.expr is not None and old.get(name) != p)
    dropped = tuple(name for name in old if name not in new)
    seconds = time.perf_counter() - start
    source, result = (p.with_weights({}) for p in (program, after))
    return after, Step(number, str(one), _count(program), _count(after), seconds, made, dropped, source, result)


def _count(program: Program) -> int:
    return sum(1 for _ in walk(tuple(op for stack in program.stacks for op in stack.ops)))
