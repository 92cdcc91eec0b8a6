"""Analyses of a block are made once a body and kept with it: bodies do not change."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from depthc.ir.program import Block

T = TypeVar("T")


def once(block: Block, name: str, make: Callable[[], T], *key: Hashable) -> T:
    """What `make` returns, computed once for a block's body, its number of carries and `key`."""
    kept = block.body.__dict__.setdefault("_analyses", {})
    place = (name, block.carries, *key)
    if place not in kept:
        kept[place] = make()
    return kept[place]
