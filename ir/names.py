"""Unique Python identifiers: names are for people, and never decide anything."""

from __future__ import annotations

import difflib
import keyword
import re
from collections.abc import Iterable

RESERVED = ("w", "c", "device", "training")


class Names:
    """Hands out identifiers that are not taken yet.

    Example:
        >>> names = Names()
        >>> names.new("mask"), names.new("mask"), names.new("2 b")
        ('mask', 'mask_1', '_2_b')
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.taken = {*RESERVED, *taken}

    def new(self, wish: str) -> str:
        """`wish` as an identifier, with a number behind it if it is taken."""
        name = re.sub(r"\W", "_", wish) or "value"
        name = f"_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name
        count, base = 1, name
        while name in self.taken:
            name, count = f"{base}_{count}", count + 1
        self.taken.add(name)
        return name


def closest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`; "" if none is known."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff=0)), "")
