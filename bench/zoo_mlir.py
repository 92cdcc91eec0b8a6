"""The check of a zoo row that is about MLIR: the program, and what `mor` makes of it, as verified modules."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn
from zoo_checks import Unmet
from zoo_recipes import looped
from zoo_step import Subject

from depthc.ir.errors import RecipeError
from depthc.ir.mlir import module_of, new_context, parse_module
from depthc.ir.program import Program


def mlir(program: Program, model: nn.Module, args: tuple, kwargs: dict) -> str:
    """Which programs of a model print: verified, and the same after reading the text back."""
    programs: dict[str, Program] = {"program": program}
    with suppress(RecipeError):  # its own check says why
        programs["mor"] = Subject(program, model, args, kwargs).rewritten(looped("mor", program)[0])
    for name, each in programs.items():
        _round_trip(name, each, new_context())
    return ", ".join(programs)


def _round_trip(name: str, program: Program, context: Any) -> None:
    text = str(module_of(program, context))
    if str(parse_module(text, context)) != text:
        raise Unmet(f"the module of {name} is another one after parsing")
