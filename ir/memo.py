"""Analyses are made once a body, or once a program, and kept with it: neither changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from depthc.ir.program import Block, Program

T = TypeVar("T")


def once(block: Block, name: str, make: Callable[[], T], *key: Hashable) -> T:
    """What `make` returns, computed once for a block's body, its number of carries and `key`."""
    if "_analyses" not in block.body.__dict__:  # of what there is for a dictionary, Dynamo knows this
        block.body.__dict__["_analyses"] = {}
    kept = block.body.__dict__["_analyses"]
    place = (name, block.carries, *key)
    if place not in kept:
        kept[place] = make()
    return kept[place]


def once_a_program(program: Program, name: str, make: Callable[[], T]) -> T:
    """What `make` returns, computed once for a program, which does not change either."""
    if name not in program.__dict__:
        program.__dict__[name] = make()
    return program.__dict__[name]  # type: ignore[no-any-return]
