"""What a pass is: a frozen dataclass whose fields are its options, and a pure function of programs."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from depthc.ir.errors import RecipeError
from depthc.ir.names import closest
from depthc.ir.program import Program

if TYPE_CHECKING:
    from depthc.passes.recipe import Recipe

PASSES: dict[str, type[Pass]] = {}
"""Every pass by the name that recipes call it by."""


@dataclass(frozen=True)
class Pass:
    """A rewrite of programs. A subclass is a frozen dataclass; its name in recipes is that of the class in lower case.

    `preserves_numerics`: whether the rewritten program computes the same, bit for bit on the CPU.
    `chooses`: whether layers run on some of their tokens, which is done once in a stack.

    Example:
        >>> from depthc.passes.tie import Tie
        >>> str(Tie(loops=3, sharing="middle_cycle"))
        'tie(loops=3, sharing="middle_cycle")'
    """

    preserves_numerics: ClassVar[bool] = False
    chooses: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        PASSES[cls.__name__.lower()] = cls

    def apply(self, program: Program) -> Program:
        """The rewritten program.

        Raises:
            RecipeError: the program has not what the pass needs.
        """
        raise NotImplementedError

    def __or__(self, other: Pass | Recipe) -> Recipe:
        from depthc.passes.recipe import Recipe

        return Recipe((self,)) | other

    def __str__(self) -> str:
        """The pass as recipes write it: its name and the options that are not the default ones."""
        shown = [f"{f.name}={text_of(v)}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]
        return f"{self.title}({', '.join(shown)})"

    @property
    def title(self) -> str:
        """What recipes call it."""
        return type(self).__name__.lower()

    def refuse(self, what: str, *, where: str = "", expected: str = "", found: str = "", remedy: str) -> RecipeError:
        """The error of a program or an option that this pass cannot take."""
        return RecipeError(f"{self.title}: {what}", where=where, expected=expected, found=found, remedy=remedy)

    def require_one_of(self, option: str, values: tuple[Any, ...]) -> None:
        """Refuse an option that has none of the values."""
        value = getattr(self, option)
        if value not in values:
            near = closest(str(value), map(str, values))
            known = ", ".join(map(text_of, values))
            raise self.refuse(f"option {option!r}", expected=known, found=text_of(value), remedy=f"use {near!r}")

    def require_whole(self, option: str, least: int) -> None:
        """Refuse an option that is not an integer of at least `least`."""
        value = getattr(self, option)
        if type(value) is not int or value < least:
            expected, remedy = f"an integer of at least {least}", f"give {option}={least} or more"
            raise self.refuse(f"option {option!r}", expected=expected, found=text_of(value), remedy=remedy)

    def require_weight(self, option: str) -> None:
        """Refuse an option that is no finite number from 0 on."""
        value = getattr(self, option)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            remedy = f"give {option}=0 to leave it out, or a small number"
            raise self.refuse(f"option {option!r}", expected="a number from 0 on", found=text_of(value), remedy=remedy)


def make(name: str, options: dict[str, Any]) -> Pass:
    """The pass of a name with some options.

    Raises:
        RecipeError: there is no such pass, or it has no such option; names the nearest.
    """
    if name not in PASSES:
        near = closest(name, PASSES)
        known = ", ".join(sorted(PASSES))
        raise RecipeError(f"there is no pass {name!r}", expected=known, found=name, remedy=f"use {near!r}")
    cls = PASSES[name]
    known_options = [f.name for f in fields(cls)]
    for option in options:
        if option not in known_options:
            near = closest(option, known_options)
            raise RecipeError(
                f"{name} has no option {option!r}",
                expected=", ".join(known_options) or "no options",
                found=option,
                remedy=f"use {near!r}" if near else "leave it out",
            )
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in options]
    if missing:
        raise RecipeError(f"{name} needs the option {missing[0]!r}", remedy=f"write {name}({missing[0]}=...)")
    return cls(**options)


def text_of(value: Any) -> str:
    """An option's value as recipes write it."""
    return json.dumps(value) if isinstance(value, str) else repr(value)
