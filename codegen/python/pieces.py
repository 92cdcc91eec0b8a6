"""Pieces of folded Python lines: values by name, and by number where a loop writes or reads them so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from depthc.ir.text.fold import Linear, Piece, Statement, Words, fold, words, write


def entry(name: str, key: str) -> list[Piece]:
    """`name["key"]`."""
    return [f"{name}[", words("string", key), "]"]


def folded(statements: Sequence[Statement], taken: set[str], loops: set[str]) -> tuple[list[str], set[str]]:
    """(lines, the values that are kept by number): runs of equal statements as loops.

    A value that a loop names by its index is an entry of the dict `v` wherever it is read or written.

    Args:
        taken: names that no index may have.
        loops: the indices of the program's own loops.
    """
    rows = fold(statements, taken)
    numbered = set(_numbered(rows, {}))
    return list(write([_placed(s, numbered) for s in rows], loops)), numbered


_RANGE = re.compile(r"for (\w+) in range\(([-\d, ]+)\):")


def _numbered(statements: Iterable[Statement], scope: Mapping[str, range]) -> Iterator[str]:
    """Every value that is named by the index of a fold, in every iteration."""
    for statement in statements:
        for item in statement.line:
            if isinstance(item, Words) and item.kind == "value" and _varies(item):
                yield from _names(item, scope)
        head = _RANGE.fullmatch(statement.line[0]) if len(statement.line) == 1 else None  # type: ignore[arg-type]
        inner = {**scope, head[1]: range(*map(int, head[2].split(",")))} if head else scope
        yield from _numbered(statement.body, inner)


def _varies(item: Words) -> bool:
    return any(isinstance(part, Linear) and part.terms for part in item.parts)


def _names(item: Words, scope: Mapping[str, range]) -> Iterator[str]:
    """A value's name at every index that it depends on."""
    free = next((index for part in item.parts if isinstance(part, Linear) for index, _ in part.terms), None)
    if free is None:
        yield "".join(map(str, item.parts))
        return
    for at in scope[free]:
        parts = [_at(part, free, at) if isinstance(part, Linear) else part for part in item.parts]
        yield from _names(replace(item, parts=tuple(parts)), scope)


def _at(number: Linear, index: str, value: int) -> Linear:
    by = dict(number.terms).get(index, 0)
    return Linear(number.const + by * value, tuple(term for term in number.terms if term[0] != index))


def _placed(statement: Statement, numbered: set[str]) -> Statement:
    """A statement with its values as Python has them."""

    def piece(item: Piece) -> Piece:
        if isinstance(item, str) or item.kind != "value" or _varies(item):
            return item
        name = "".join(map(str, item.parts))
        return f'v["{name}"]' if name in numbered else name

    return Statement(tuple(map(piece, statement.line)), tuple(_placed(s, numbered) for s in statement.body))
