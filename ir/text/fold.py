"""Folding: runs of statements that differ only in numbers that grow evenly become a `for` over a range.

A statement is a line whose names, strings and numbers are kept apart from the rest, every number inside them as a
linear form over the indices of the loops around it. Folding looks at nothing else, so it is lossless by construction:
the reader writes the loop out again and finds every statement as it was.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from depthc.ir.text.syntax import is_identifier, is_value_name

_LONGEST_PERIOD = 512


@dataclass(frozen=True)
class Linear:
    """`const + sum(coefficient * index)`."""

    const: int
    terms: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        parts = [index if by == 1 else f"{by} * {index}" for index, by in self.terms]
        if self.const or not parts:
            parts.append(str(self.const))
        return " + ".join(parts).replace("+ -", "- ")


@dataclass(frozen=True)
class Words:
    """A part of a line that may vary: a "string", a "value" name, a parameter "slot", or a "number".

    `parts` alternate between text and linear forms. A number that is not an integer is one text; numbers that vary
    without a rule are a table, one text an iteration of `index`.
    """

    kind: Literal["string", "value", "slot", "number"]
    parts: tuple[str | Linear, ...]
    index: str = ""


@dataclass(frozen=True)
class Statement:
    """A line and, for a compound statement, the statements below it."""

    line: tuple[str | Words, ...]
    body: tuple[Statement, ...] = ()


Piece = str | Words


def line(*pieces: Piece) -> Statement:
    """A statement of one line."""
    return Statement(tuple(pieces))


def joined(parts: Iterable[Sequence[Piece]], trailing: bool = False) -> list[Piece]:
    """Parts with commas between them; `trailing`: one behind a single part, as in a tuple."""
    every = list(parts)
    found = [piece for at, part in enumerate(every) for piece in (*([", "] if at else []), *part)]
    return [*found, ","] if trailing and len(every) == 1 else found


def words(kind: Literal["string", "value", "slot"], text: str) -> Words:
    """A name or string with its numbers found; numbers with leading zeros are text."""
    parts = re.split(r"((?<![0-9])(?:0|[1-9][0-9]*)(?![0-9]))", text)
    return Words(kind, tuple(Linear(int(p)) if i % 2 else p for i, p in enumerate(parts) if p))


def number(value: int | float) -> Words:
    """A number; only integers grow evenly."""
    whole = type(value) is int
    return Words("number", (Linear(value) if whole else repr(value),))  # type: ignore[arg-type]


# folding


def fold(statements: Sequence[Statement], taken: set[str]) -> list[Statement]:
    """The same statements with repeated stretches as loops; `taken` are names that no index may have."""
    numbers: dict[Statement, int] = {}
    shapes = [numbers.setdefault(_shape(s), len(numbers)) for s in statements]
    result: list[Statement] = []
    at = 0
    while at < len(statements):
        period, count = _best_run(statements, shapes, at)
        if count > 1:
            rows = [statements[at + k * period : at + (k + 1) * period] for k in range(count)]
            index, bounds, merged = _merge(rows, taken)
            result.append(Statement((f"for {index} in range({bounds}):",), tuple(fold(merged, {*taken, index}))))
            at += period * count
        else:
            result.append(replace(statements[at], body=tuple(fold(statements[at].body, taken))))
            at += 1
    return result


def _indices() -> Iterator[str]:
    yield from "lkji"
    count = 1
    while True:
        yield f"l{count}"
        count += 1


def _best_run(statements: Sequence[Statement], shapes: Sequence[int], at: int) -> tuple[int, int]:
    """(period, count) of the repetition from `at` that covers most statements, the shortest period first."""
    best, covered = (1, 1), 1
    for period in range(1, min((len(statements) - at) // 2, _LONGEST_PERIOD) + 1):
        if shapes[at] != shapes[at + period] or shapes[at : at + period] != shapes[at + period : at + 2 * period]:
            continue
        count = _repetitions(statements, shapes, at, period)
        saves = period * count > period + 1
        if count > 1 and saves and period * count > covered:
            best, covered = (period, count), period * count
    return best


def _repetitions(statements: Sequence[Statement], shapes: Sequence[int], at: int, period: int) -> int:
    """How often the period repeats with numbers that grow evenly."""

    def numbers(k: int) -> list[int]:
        start = at + k * period
        return [h.const for s in statements[start : start + period] for h in _holes(s) if isinstance(h, Linear)]

    count, step = 1, None
    rows = [numbers(0)]
    while at + (count + 1) * period <= len(statements):
        start = at + count * period
        if shapes[start : start + period] != shapes[at : at + period]:
            break
        rows.append(numbers(count))
        grown = [b - a for a, b in zip(rows[-2], rows[-1], strict=True)]
        if step is not None and grown != step:
            break
        step, count = grown, count + 1
    # Any two numbers grow evenly: names of values that differ must do so three times.
    stretches = [statements[at + k * period : at + (k + 1) * period] for k in range(2)]
    return 1 if count == 2 and len({tuple(map(_values, s)) for s in stretches}) > 1 else count


def _values(statement: Statement) -> tuple[object, ...]:
    """The value names in a statement."""
    own = [w for w in statement.line if isinstance(w, Words) and w.kind == "value"]
    return (*own, *map(_values, statement.body))


def _merge(rows: Sequence[Sequence[Statement]], taken: set[str]) -> tuple[str, str, list[Statement]]:
    """Equal stretches as one, in terms of a new index: (index, arguments of its range, statements)."""
    columns = list(zip(*([h for s in row for h in _holes(s)] for row in rows), strict=True))
    varying = [c for c in columns if len(set(c)) > 1]
    index = next(i for i in _indices() if i not in taken) if varying else "_"
    growing = [(c[0].const, c[1].const - c[0].const) for c in varying if isinstance(c[0], Linear)]
    start, step = _range(growing) if len(growing) == len(varying) else (0, 1)
    stop = start + step * len(rows)
    bounds = f"{start}, {stop}, {step}" if step != 1 else f"{start}, {stop}" if start else str(stop)
    merged = iter([_merge_hole(column, index, start, step) for column in columns])
    return index, bounds, [_fill(s, lambda _: next(merged)) for s in rows[0]]


def _range(growing: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Start and step of an index in which all growing numbers are whole, most of them the index itself."""
    steps = sorted({by for _, by in growing}, key=abs)
    for step in steps:
        if all(by % step == 0 for by in steps):
            return Counter(start for start, by in growing if by == step).most_common(1)[0][0], step
    return 0, 1


def _merge_hole(column: Sequence[Linear | Words], index: str, start: int, step: int) -> Linear | Words:
    first, second = column[0], column[1]
    if isinstance(first, Linear) and isinstance(second, Linear):
        by = (second.const - first.const) // step
        return Linear(first.const - by * start, (*first.terms, (index, by))) if by else first
    if len(set(column)) == 1:
        return first
    return Words("number", tuple(str(w.parts[0]) for w in column), index)  # type: ignore[union-attr]


def _holes(statement: Statement) -> Iterator[Linear | Words]:
    """What may differ between repetitions: the integers of a statement, and its other numbers as a whole."""
    holes: list[Linear | Words] = []
    _fill(statement, lambda hole: holes.append(hole) or hole)  # type: ignore[func-returns-value]
    return iter(holes)


def _fill(statement: Statement, hole: Callable[[Linear | Words], Linear | Words]) -> Statement:
    """A statement with every hole replaced."""

    def piece(item: str | Words) -> str | Words:
        if isinstance(item, str):
            return item
        if item.kind == "number" and not isinstance(item.parts[0], Linear):
            return item if item.index else hole(item)  # type: ignore[return-value]
        parts: list[Any] = [p if isinstance(p, str) else hole(p) for p in item.parts]
        return replace(item, parts=tuple(parts))

    return Statement(tuple(map(piece, statement.line)), tuple(_fill(s, hole) for s in statement.body))


def _shape(statement: Statement) -> Statement:
    """A statement without what may differ between repetitions."""
    return _fill(
        statement, lambda h: Linear(0, h.terms) if isinstance(h, Linear) else replace(h, parts=("",), index="")
    )


# writing


def write(statements: Sequence[Statement], loops: set[str], indent: str = "") -> Iterator[str]:
    """Statements as lines; `loops` are the indices of the program's own loops."""
    for statement in statements:
        yield indent + "".join(p if isinstance(p, str) else words_text(p, loops) for p in statement.line)
        yield from write(statement.body, loops, indent + "    ")


def words_text(item: Words, loops: set[str]) -> str:
    """One varying part as Python."""
    if item.kind == "number":
        if not item.index:
            return str(item.parts[0])
        return f"({', '.join(map(str, item.parts))})[{item.index}]"
    text, formatted = _string(item.parts, loops)
    if item.kind == "string":
        return text
    plain = "".join(map(str, item.parts))
    if not formatted and item.kind == "value" and is_value_name(plain):
        return plain
    if not formatted and item.kind == "slot" and all(map(is_identifier, plain.split("."))):
        return f"w.{plain}"
    return f"{'v' if item.kind == 'value' else 'w'}[{text}]"


def _string(parts: Sequence[str | Linear], loops: set[str]) -> tuple[str, bool]:
    """(text of a string or f-string, whether it is an f-string)."""
    varies = any(isinstance(p, Linear) and p.terms for p in parts)
    if not varies:
        whole = "".join(map(str, parts))
        pieces = re.split(r"(\{[^{}]*\})", whole)
        if any(_is_index(p, loops) for p in pieces):
            return 'f"' + "".join(p if _is_index(p, loops) else _escaped(p) for p in pieces) + '"', True
        return _quoted(whole), False
    texts = [_escaped(p) if isinstance(p, str) else f"{{{p}}}" if p.terms else str(p) for p in parts]
    return 'f"' + "".join(texts) + '"', True


def _is_index(piece: str, loops: set[str]) -> bool:
    """Whether "{r + 1}" means the same in an f-string: an expression over loop indices, spelled as Python spells it."""
    if not (piece.startswith("{") and piece.endswith("}")):
        return False
    try:
        tree = ast.parse(piece[1:-1], mode="eval").body
    except SyntaxError:
        return False
    found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    quotes = any(isinstance(n, ast.Constant) and not isinstance(n.value, int) for n in ast.walk(tree))
    return bool(found) and found <= loops and not quotes and ast.unparse(tree) == piece[1:-1]


def _escaped(text: str) -> str:
    return _quoted(text)[1:-1].replace("{", "{{").replace("}", "}}")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
