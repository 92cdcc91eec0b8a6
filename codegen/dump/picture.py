"""The picture of a program: an SVG that is as wide as a phone, whose colours the page's style gives."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape

from depthc.codegen.dump.parts import Box, Bracket, Cell, Part, Region, Remark, Strip, Tower, parts_of
from depthc.codegen.dump.sets import Sets, applications
from depthc.codegen.dump.style import step_of
from depthc.codegen.dump.words import counted, short
from depthc.ir.program import Program

WIDTH, GAP, PAD = 372, 8, 10
CELL, CELL_GAP, ROW, MARKED_ROW, GLUE = 34, 4, 26, 36, 12
LINE = 15
LETTER = {"b": 6.9, "t": 6.5, "m": 5.9}  # pixels a letter takes, by class: those of a wide font
LETTERS = {"b": "bold", "t": "plain", "m": "muted"}


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
    drawing = _Drawing(program, sets)
    height = drawing.program()
    head = f'<svg class="picture" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" role="img" '
    head += f'aria-labelledby="{name}-title {name}-desc">'
    said = f'<title id="{name}-title">{escape(program.name)}</title>\n<desc id="{name}-desc">{escape(drawing.said())}</desc>'
    return "\n".join([head, said, *drawing.marks, "</svg>"])


class _Drawing:
    """Draws parts from top to bottom; every method returns the y below what it drew."""

    def __init__(self, program: Program, sets: Sets) -> None:
        self.of, self.sets = program, sets
        self.parts = parts_of(program, sets)
        self.marks: list[str] = []

    def said(self) -> str:
        """The picture in words."""
        return "; ".join(map(_said, self.parts))

    # the whole

    def program(self) -> float:
        """All parts, in one column or two."""
        signature = self.of.signature
        inputs = ", ".join(leaf.name for leaf in signature.inputs if leaf.type is not None)
        outputs = ", ".join(name for name in signature.outputs if isinstance(name, str))
        columns = _columns(self.parts)
        width = (WIDTH - 2 - 2 * PAD * (len(columns) - 1)) / len(columns)
        ends, tops = [], []
        for number, column in enumerate(columns):
            x, last = 1 + number * (width + 2 * PAD), number == len(columns) - 1
            y = self.text(inputs if not number else "", x + width / 2, 12, width, "m", "middle") if not number else 12.0
            y = self.arrow(x + width / 2, y - 8) if not number else y
            tops.append((x, y + 13))
            y = self.column(column, x, y, width)
            ends.append(self.text(outputs, x + width / 2, self.arrow(x + width / 2, y) + 11, width, "m", "middle") if last else y)
        if len(columns) == 2:
            x, y = tops[1]
            down = ends[0] + 8
            self.path(f"M{1 + width / 2:g} {ends[0]:g}V{down:g}H{x - PAD:g}V{y:g}H{x - 1:g}", "flow", arrow=True)
            ends.append(down + 2)
        return max(ends)

    def column(self, parts: Sequence[Box | Tower], x: float, y: float, width: float) -> float:
        for number, part in enumerate(parts):
            y = self.arrow(x + width / 2, y) if number else y
            y = self.box(part, x, y, width) if isinstance(part, Box) else self.tower(part, x, y, width)
        return y

    def tower(self, part: Tower, x: float, y: float, width: float) -> float:
        at, top = len(self.marks), y
        stack = next(stack for stack in self.of.stacks if stack.name == part.name)
        labels = {self.sets.of_call(self.of, call, [indices]).label for call, indices in applications(stack.ops)}
        y = self.text(part.name, x + PAD, y + 18, width - 2 * PAD, "b")
        y = self.text(f"{stack.depth} applied, {len(labels)} stored", x + PAD, y, width - 2 * PAD, "t")
        y = self.text(part.heading, x + PAD, y, width - 2 * PAD, "m")
        y = self.inner(part.parts, x + PAD, y - 4, width - 2 * PAD)
        for note in part.notes:
            y = self.text(note, x + PAD, y + 16, width - 2 * PAD, "m") - 12
        return self.frame("tower", x, top, width, y + PAD, at)

    def inner(self, parts: Sequence[Part], x: float, y: float, width: float) -> float:
        """Parts in a container, with the stream between them."""
        for number, part in enumerate(parts):
            y = self.arrow(x + width / 2, y + 2) if number else y
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
                return self.text(text, x + width / 2, y + 12, width, "m", "middle") - 8
        raise TypeError(f"not a part: {part!r}")

    # the parts

    def box(self, part: Box, x: float, y: float, width: float) -> float:
        at, top = len(self.marks), y
        y = self.text(part.name, x + PAD, y + 17, width - 2 * PAD, "b")
        trained = [name for name in part.params if self.of.params[name.partition("{")[0] if name in self.of.params else name].kind in ("parameter", "frozen")] if False else self.trained(part)
        for tag, name, count in trained[:2]:
            y = self.text(f"{tag}{name}  {short(count)}", x + PAD, y, width - 2 * PAD, "m")
        if len(trained) > 2:
            more = sum(count for _, _, count in trained[2:])
            y = self.text(f"and {len(trained) - 2} more  {short(more)}", x + PAD, y, width - 2 * PAD, "m")
        return self.frame("box", x, top, width, y - 6, at)
