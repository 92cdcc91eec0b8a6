"""The key: what the marks of the pictures mean, those that occur."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from depthc.codegen.dump.parts import Box, Bracket, Cell, Part, Region, Strip, Tower, parts_of
from depthc.codegen.dump.sets import Sets
from depthc.codegen.dump.style import colour_class
from depthc.codegen.dump.words import TIMES, counted
from depthc.ir.program import Program

LAYER = (
    "a layer; they run from left to right, line by line. Equal label and colour: the same parameters, before and after."
    " Numbers count the captured layers; the colour follows their depth"
)
_FRAME = '<rect x="1" y="1" width="32" height="20" rx="3"/>'
MANY = 8  # sets whose making is said before the rest is folded


def key_html(before: Program, after: Program, sets: Sets) -> str:
    """The marks as a list, then what the sets that are new were made of."""
    parts = [part for program in (before, after) for part in _all(parts_of(program, sets))]
    cells = [cell for part in parts if isinstance(part, Strip) for cell in part.cells]
    marks = "\n".join(f"<li>{_swatch(mark)}<span>{escape(words)}</span></li>" for mark, words in _marks(parts, cells))
    made = {cell.label: cell.made for cell in cells if cell.made}
    return f'<section class="key">\n<h3>How to read the pictures</h3>\n<ul>\n{marks}\n</ul>\n{_made(made)}</section>'


def _all(parts: Sequence[Part | Tower]) -> Iterator[Part | Tower]:
    for part in parts:
        yield part
        if isinstance(part, Tower | Bracket | Region):
            yield from _all(part.parts)


def _marks(parts: Sequence[Part | Tower], cells: Sequence[Cell]) -> Iterator[tuple[str, str]]:
    """(SVG of 34 by 22, words) of every mark that occurs."""
    layer = next((cell for cell in cells if cell.label), None)
    if layer is not None:
        label = escape(layer.label)
        yield _cell(colour_class(layer.place), label), LAYER
    if any(not cell.kept for cell in cells):
        yield _cell("gone", "2"), "a layer of which nothing is kept, or no more than half"
    if any(cell.label.endswith("*") for cell in cells):
        yield _cell("new", "2*"), "a part of its parameters is another set in every pass"
    if any(isinstance(part, Bracket) for part in parts):
        yield (
            f'<path class="bracket" d="M12 2h-5v18h5"/><text class="bold" x="15" y="15">{TIMES}n</text>',
            "a loop: what it holds runs n times, with the same parameters where the label is the same",
        )
    if any(isinstance(part, Region) for part in parts):
        yield (
            '<rect class="region" x="2" y="2" width="30" height="18" rx="4"/>',
            "runs on some tokens only, as its first line says",
        )
    if any(cell.rule for cell in cells):
        yield _cell("new routed", "1/8"), "a layer that runs on some tokens only"
    if any(cell.times for cell in cells):
        yield _cell("new", f"{TIMES}2"), "a layer that runs so often in a row"
    if any(cell.plan for cell in cells):
        yield (
            f'<g class="cell new">{_FRAME}<path d="M24 1h6a3 3 0 0 1 3 3v6z"/></g>',
            "keys and values are stored or shared, as the line below says",
        )
    if any(not cell.label for cell in cells):
        yield '<g class="cell glue"><rect x="13" y="1" width="8" height="20" rx="3"/></g>', "a segment between layers"
    tied = {tag: name for part in parts if isinstance(part, Box) for tag, name, _ in part.tensors if tag}
    for tag, name in tied.items():
        yield f'<text class="muted" x="6" y="15">{tag} =</text>', f"{name}: one tensor that several parts read"
    yield (
        '<path class="flow" d="M17 1V16"/><path class="head" d="M13.5 15h7l-3.5 5z"/>',
        "the hidden state. Masks, rotary tables and other values that layers read are named, not drawn",
    )


def _cell(classes: str, label: str) -> str:
    return f'<g class="cell {classes}">{_FRAME}<text x="17" y="15">{label}</text></g>'


def _swatch(mark: str) -> str:
    return f'<svg width="34" height="22" viewBox="0 0 34 22" aria-hidden="true">{mark}</svg>'


def _made(made: dict[str, str]) -> str:
    """What new sets were made of."""
    if not made:
        return ""
    items = "\n".join(
        f'<li><b class="mono">{escape(label)}</b><span>{escape(words)}</span></li>' for label, words in made.items()
    )
    opened = " open" if len(made) <= MANY else ""
    said = counted(len(made), "label") + " that the recipe made"
    return f"<details{opened}><summary>{said}</summary>\n<ul>\n{items}\n</ul>\n</details>\n"
