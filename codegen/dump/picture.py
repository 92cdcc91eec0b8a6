"""The picture of a program: an SVG as wide as a phone. The page's style gives its colours."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape
from itertools import islice

from depthc.codegen.dump.parts import Box, Bracket, Cell, Part, Region, Remark, Strip, Tower, parts_of
from depthc.codegen.dump.sets import Sets
from depthc.codegen.dump.style import colour_class
from depthc.codegen.dump.words import short
from depthc.ir.liveness import reads_of
from depthc.ir.program import Program
from depthc.ir.text.functions import walk

WIDTH, PAD, FLOW = 372, 10, 14  # of the picture, inside of frames, and of the arrows between parts
CELL, CELL_GAP, ROW, MARKED_ROW, GLUE = 34, 4, 26, 36, 8
LINE = 15
LETTER = {"bold": 7.1, "plain": 6.5, "muted": 6.0}  # pixels that a letter takes, at most, by class


def picture(program: Program, sets: Sets, name: str) -> str:
    """An SVG of a program; two stacks are two towers side by side, with an arrow from the first to the second.

    Args:
        sets: the labels of parameter sets, the same for every picture of a page.
        name: unique on the page; begins the ids of the title and the description.

    Example:
        >>> import torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> after = depthc.compile(model, "tie", args=(torch.ones(2, 5, 4),)).program
        >>> svg = picture(after, Sets(after, after), "after")
        >>> svg.startswith("<svg ") and "<desc" in svg and "×2" in svg
        True
    """
    parts = parts_of(program, sets)
    drawing = _Drawing()
    height = drawing.program(program, parts)
    return "\n".join(
        [
            f'<svg class="picture" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" role="img"'
            f' aria-labelledby="{name}-title {name}-desc">',
            f'<title id="{name}-title">{escape(program.name)}, {escape(name)}</title>',
            f'<desc id="{name}-desc">{escape("; ".join(map(said, parts)))}</desc>',
            *drawing.marks,
            "</svg>",
        ]
    )


def said(part: Part | Tower) -> str:
    """A part in words."""
    match part:
        case Tower():
            return f"stack {part.name} [{part.summary}: {_all_said(part.parts)}]"
        case Strip(cells=cells):
            return "layers " + ", ".join(" ".join(filter(None, (c.label, c.times, c.rule))) for c in cells if c.label)
        case Bracket():
            return f"loop {part.times} [{_all_said(part.parts)}]"
        case Region():
            return f"{part.heading} [{_all_said(part.parts)}]"
        case Box(name=name):
            return name
        case Remark(text=text):
            return text
    raise TypeError(f"not a part: {part!r}")


def _all_said(parts: Sequence[Part]) -> str:
    return "; ".join(map(said, parts))


class _Drawing:
    """Draws from top to bottom: every method takes the top of what it draws and returns its bottom."""

    def __init__(self) -> None:
        self.marks: list[str] = []

    def program(self, program: Program, parts: Sequence[Box | Tower]) -> float:
        """All parts, in one column or two."""
        columns = _columns(parts)
        width = (WIDTH - 2 - 2 * PAD * (len(columns) - 1)) / len(columns)
        lefts = [1 + number * (width + 2 * PAD) for number in range(len(columns))]
        read, ends, first = _inputs(program, [len(column) for column in columns]), [], 0.0
        for x, column, names in zip(lefts, columns, read, strict=True):
            y = self.text(", ".join(names), x + width / 2, 0, width, "muted", "middle")
            first = self.arrow(x + width / 2, y) if names else max(y, FLOW)
            ends.append(self.column(column, x, first, width))
        outputs = ", ".join(name for name in program.signature.outputs if isinstance(name, str))
        middle = lefts[-1] + width / 2
        end = self.text(outputs, middle, self.arrow(middle, ends[-1]), width, "muted", "middle")
        if len(columns) == 1:
            return end + 2
        low, high, x = ends[0] + 10, first + 14, lefts[1]
        self.path(f"M{lefts[0] + width / 2:g} {ends[0]:g}V{low:g}H{x - PAD:g}V{high:g}H{x - 5:g}", "flow")
        self.path(f"M{x - 7:g} {high - 3.5:g}l6 3.5l-6 3.5z", "head")
        return max(end, low) + 2

    def column(self, parts: Sequence[Box | Tower], x: float, y: float, width: float) -> float:
        for number, part in enumerate(parts):
            y = self.arrow(x + width / 2, y) if number else y
            y = self.tower(part, x, y, width) if isinstance(part, Tower) else self.part(part, x, y, width)
        return y

    def tower(self, part: Tower, x: float, y: float, width: float) -> float:
        at, top, left, inside = len(self.marks), y, x + PAD, width - 2 * PAD
        y = self.text(part.name, left, y + 6, inside, "bold")
        y = self.text(part.summary, left, y, inside, "plain")
        y = self.parts(part.parts, left, y + 6, inside)
        if part.notes:
            y += 4
        for note in part.notes:
            y = self.text(note, left, y, inside, "muted")
        return self.frame("tower", x, top, width, y + PAD, at)

    def parts(self, parts: Sequence[Part], x: float, y: float, width: float) -> float:
        """Parts in a container, with the stream between them."""
        for number, part in enumerate(parts):
            y = self.arrow(x + width / 2, y) if number else y
            y = self.part(part, x, y, width)
        return y

    def part(self, part: Part, x: float, y: float, width: float) -> float:
        match part:
            case Strip():
                return self.strip(part, x, y, width)
            case Box():
                return self.box(part, x, y, width)
            case Bracket():
                return self.bracket(part, x, y, width)
            case Region():
                return self.region(part, x, y, width)
            case Remark(text=text):
                return self.text(text, x + width / 2, y, width, "muted", "middle")
        raise TypeError(f"not a part: {part!r}")

    def box(self, part: Box, x: float, y: float, width: float) -> float:
        at, top, left, inside = len(self.marks), y, x + PAD, width - 2 * PAD
        y = self.text(part.name, left, y + 5, inside, "bold")
        for tag, name, numbers in part.tensors[:2]:
            begin, end = f"{tag} = " if tag else "", f", {short(numbers)}"
            room = int(inside / LETTER["muted"]) - len(begin) - len(end)
            said = name if len(name) <= room else f"…{name[1 - room :]}"
            y = self.text(begin + said + end, left, y, inside, "muted")
        if rest := part.tensors[2:]:
            y = self.text(f"and {len(rest)} more, {short(sum(n for *_, n in rest))}", left, y, inside, "muted")
        return self.frame("box", x, top, width, y + 6, at)

    def bracket(self, part: Bracket, x: float, y: float, width: float) -> float:
        """A loop: a bracket at its left, and at its right the way back."""
        top = y
        self.mark(f'<text class="times" x="{x + 12:g}" y="{y + 15:g}">{escape(part.times)}</text>')
        self.text(part.heading, x + 24 + 9 * len(part.times), y + 1, width - 60, "muted")
        y = self.parts(part.parts, x + 12, y + 24, width - 28) + 4
        self.path(f"M{x + 6:g} {top:g}h-5v{y - top:g}h5", "bracket")
        right = x + width - 1
        self.path(f"M{right - 12:g} {y - 1:g}h7a5 5 0 0 0 5-5V{top + 17:g}a5 5 0 0 0-5-5h-3", "flow")
        self.path(f"M{right - 6:g} {top + 8.5:g}l-6 3.5l6 3.5z", "head")
        return y

    def region(self, part: Region, x: float, y: float, width: float) -> float:
        at, top, left, inside = len(self.marks), y, x + 8, width - 16
        y = self.text(part.heading, left, y + 4, inside, "plain")
        for note in part.notes:
            y = self.text(note, left, y, inside, "muted")
        y = self.parts(part.parts, left, y + 6, inside)
        if part.footing:
            y = self.text(part.footing, left, y + 4, inside, "muted")
        return self.frame("region", x, top, width, y + 8, at)

    def strip(self, part: Strip, x: float, y: float, width: float) -> float:
        """Layers in reading order, as many a row as fit."""
        row = MARKED_ROW if any(cell.rule or cell.times for cell in part.cells) else ROW
        lines = _lines(part.cells, width)
        begin = x + (width - max(map(_width, lines))) / 2
        for line in lines:
            left = begin
            for cell in line:
                self.cell(cell, left, y, row)
                left += _width([cell]) + CELL_GAP
            y += row + CELL_GAP
        y -= CELL_GAP
        for number, note in enumerate(part.notes):
            y = self.text(note, x, y + (4 if not number else 0), width, "muted")
        return y

    def cell(self, cell: Cell, x: float, y: float, row: float) -> None:
        wide = _width([cell])
        classes = ["cell", "glue" if not cell.label else colour_class(cell.place) if cell.kept else "gone"]
        classes += ["routed"] if cell.rule else []
        words = "; ".join(filter(None, (cell.words, cell.only, cell.plan, "" if cell.kept else "not kept")))
        self.mark(f'<g class="{" ".join(classes)}"><title>{escape(words)}</title>')
        self.mark(f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{row:g}" rx="3"/>')
        mark = " ".join(filter(None, (cell.times, cell.rule)))
        middle = x + wide / 2
        small = ' class="small"' if len(cell.label) > 4 else ""
        if cell.label:
            self.mark(
                f'<text x="{middle:g}" y="{y + (16 if mark else row / 2 + 4):g}"{small}>{escape(cell.label)}</text>'
            )
        if mark:
            self.mark(f'<text class="small" x="{middle:g}" y="{y + row - 6:g}">{escape(mark)}</text>')
        if cell.plan:
            self.mark(f'<path d="M{x + wide - 9:g} {y:g}h6a3 3 0 0 1 3 3v6z"/>')
        self.mark("</g>")

    # marks

    def mark(self, text: str) -> None:
        self.marks.append(text)

    def path(self, way: str, kind: str) -> None:
        self.mark(f'<path class="{kind}" d="{way}"/>')

    def arrow(self, x: float, y: float) -> float:
        self.path(f"M{x:g} {y + 1:g}V{y + FLOW - 5:g}", "flow")
        self.path(f"M{x - 3.5:g} {y + FLOW - 6:g}h7l-3.5 5z", "head")
        return y + FLOW

    def frame(self, kind: str, x: float, y: float, width: float, end: float, at: int) -> float:
        """A rectangle behind the marks from number `at` on."""
        box = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{end - y:g}" rx="4"'
        self.marks.insert(at, f'<rect class="{kind}" {box}/>')
        return end

    def text(self, text: str, x: float, y: float, width: float, kind: str, anchor: str = "") -> float:
        """Lines of text that fit a width."""
        letters = max(8, int(width / LETTER[kind]))
        place = f' text-anchor="{anchor}"' if anchor else ""
        for line in textwrap.wrap(text, letters):
            y += LINE
            self.mark(f'<text class="{kind}" x="{x:g}" y="{y - 4:g}"{place}>{escape(line)}</text>')
        return y


def _columns(parts: Sequence[Box | Tower]) -> list[list[Box | Tower]]:
    """Two towers stand side by side, each with what comes before it; else all parts are one column."""
    towers = [number for number, part in enumerate(parts) if isinstance(part, Tower)]
    if len(towers) != 2:
        return [list(parts)]
    return [list(parts[: towers[0] + 1]), list(parts[towers[0] + 1 :])]


def _inputs(program: Program, counts: Sequence[int]) -> list[list[str]]:
    """The arguments that the items of every column read, so many items a column."""
    found, items = [], iter(program.body)
    for count in counts:
        own = list(islice(items, count))
        read = {name for op, _ in walk(own) for name in reads_of(op)}
        found.append([leaf.name for leaf in program.signature.inputs if leaf.type is not None and leaf.name in read])
    return found


def _width(cells: Sequence[Cell]) -> float:
    return sum(CELL if cell.label else GLUE for cell in cells) + CELL_GAP * (len(cells) - 1)


def _lines(cells: Sequence[Cell], width: float) -> list[list[Cell]]:
    """Cells as many a line as fit."""
    lines: list[list[Cell]] = [[]]
    for cell in cells:
        if lines[-1] and _width([*lines[-1], cell]) > width:
            lines.append([])
        lines[-1].append(cell)
    return lines
