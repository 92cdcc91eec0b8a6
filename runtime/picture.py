"""A picture of a text, coloured by how deep each token went: one HTML page, or a PNG."""

from __future__ import annotations

import html
from collections.abc import Callable, Container, Sequence
from operator import index
from pathlib import Path

from torch import Tensor

from depthc.codegen.colours import DARK, INK, LIGHT, MUTED, PAGE, fill, ink
from depthc.ir.errors import InputError

COLUMNS, TAB, DPI = 96, 4, 200
POINTS = 9.0  # the size of letters
CELL = (0.602 * POINTS / 72, 1.55 * POINTS / 72)  # inches: a letter of DejaVu Sans Mono is 0.602 em wide

Pieces = list[tuple[int, int, str, int | None]]  # row, column, text, depth; without a depth it is not a token


def picture(
    tokens: Sequence[str | bytes],
    depths: Sequence[int] | Tensor,
    path: str | Path,
    *,
    deepest: int | None = None,
    title: str = "",
) -> Path:
    """Write a text coloured by depth, with the counts of every depth, to a file; returns its path.

    `.html` is one page that loads nothing, for light and dark screens; pointing at a token shows its depth. `.png` is
    an image with a white page; letters that its font lacks are written as Python escapes. A token's newlines break the
    line and are marked with ↵. Characters that cannot be printed, and bytes that are no UTF-8, are written as escapes.

    Args:
        tokens: the text of every token, for one row of a batch; bytes for tokens that may split a character.
        depths: [tokens]: a row of `telemetry.depth_of`. 0 is "none": padding, or not chosen at all.
        path: ends in .html or .png.
        deepest: the depth with the last colour, for pictures that are compared; the largest one by default.
        title: a line above the text.

    Raises:
        InputError: another suffix, lengths that differ, depths that are no integers from 0 to `deepest`, tokens that
            are no texts; a PNG without matplotlib installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = picture(["def", " ", "f"], [3, 1, 2], Path(folder) / "depth.html").read_text(encoding="utf-8")
        >>> '<span class="d3" title="depth 3 of 3">def</span>' in page
        True
    """
    path, texts = Path(path), [_shown(token) for token in tokens]
    numbers = _numbers(depths, len(texts))
    most = max([1, *numbers]) if deepest is None else deepest
    if not all(0 <= number <= most for number in numbers):
        raise InputError(
            "a depth is out of range",
            expected=f"depths from 0 to {most}",
            found=f"from {min(numbers)} to {max(numbers)}",
            remedy="give the number of recursions as deepest, and depths of telemetry.depth_of",
        )
    writers: dict[str, Callable[[list[str], list[int], int, str, Path], None]] = {".html": _html, ".png": _png}
    if path.suffix not in writers:
        raise InputError(
            "a picture is written as HTML or PNG",
            expected=" or ".join(writers),
            found=path.suffix or f"{path.name!r}, which has no suffix",
            remedy=f"write to {path.with_suffix('.html').name!r}" if path.name else "give the name of a file",
        )
    writers[path.suffix](texts, numbers, most, title, path)
    return path


def _numbers(depths: Sequence[int] | Tensor, count: int) -> list[int]:
    """The depths as integers, one a token."""
    try:
        numbers = [index(depth) for depth in (depths.tolist() if isinstance(depths, Tensor) else depths)]
    except TypeError as error:
        raise InputError(
            "the depths are no list of integers",
            expected="one integer a token",
            found=f"a tensor {list(depths.shape)}, {depths.dtype}" if isinstance(depths, Tensor) else repr(depths)[:60],
            remedy="give one row of the batch: telemetry.depth_of(aux)[0]",
        ) from error
    if len(numbers) != count:
        raise InputError(
            "tokens and depths differ in number",
            expected=f"{count} depths",
            found=str(len(numbers)),
            remedy="give the texts of all tokens of one row of the batch, and the depths of that row",
        )
    return numbers


def _shown(token: str | bytes) -> str:
    """A token's text, with escapes for what cannot be printed; newlines and tabs stay."""
    if not isinstance(token, str | bytes):
        raise InputError(
            "a token has no text",
            expected="str or bytes",
            found=f"{type(token).__name__} {token!r}"[:60],
            remedy="decode every token by itself: [tokenizer.decode([i]) for i in ids]",
        )
    text = token if isinstance(token, str) else token.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


# colours


def _fill(ramp: Sequence[str], depth: int, deepest: int) -> str:
    """The colour of a depth from 1 on."""
    return fill(ramp, (depth - 1) / max(1, deepest - 1))


def _legend(depths: Sequence[int], deepest: int) -> list[tuple[int, str]]:
    """(depth, words) of every depth, and of none."""
    counts = [depths.count(depth) for depth in range(deepest + 1)]
    names = ["none", *(f"depth {depth}" for depth in range(1, deepest + 1))]
    shares = [f"{count / max(1, len(depths)):.0%}" for count in counts]
    return [(d, f"{names[d]}: {counts[d]} ({shares[d]})") for d in range(deepest + 1)]


# HTML

STYLE = """
:root { color-scheme: light dark; }
body { margin: 2rem auto; padding: 0 1rem; max-width: 60rem; font-family: system-ui, sans-serif; }
h1 { font-size: 1.25rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
pre, ul { font: 0.9rem/1.6 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
ul { display: flex; flex-wrap: wrap; gap: 0.5rem; margin: 0 0 1.25rem; padding: 0; list-style: none; }
li { padding: 0 0.6rem; border-radius: 0.2rem; }
li.d0 { outline: 1px dashed; outline-offset: -1px; }
pre .d0 { text-decoration: underline dotted; }
pre span { padding: 0.15em 0; border-radius: 0.15em; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
pre span, li { print-color-adjust: exact; }
i::before { content: "\\21b5"; font-style: normal; opacity: 0.6; }
"""


def _html(texts: list[str], depths: list[int], deepest: int, title: str, path: Path) -> None:
    name = html.escape(_shown(title))
    items = [f'<li class="d{depth}">{words}</li>' for depth, words in _legend(depths, deepest)]
    # A line break has no width and would hide its token's colour: the mark is style, so it is not copied with the text.
    marked = [html.escape(text).replace("\n", "<i></i>\n") for text in texts]
    spans = [
        f'<span class="d{depth}" title="depth {depth} of {deepest}">{text}</span>'
        for text, depth in zip(marked, depths, strict=True)
    ]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name or 'Tokens by depth'}</title>",
        f"<style>{STYLE}{_rules(0, LIGHT, deepest)}",
        f"@media (prefers-color-scheme: dark) {{\n{_rules(1, DARK, deepest)}\n}}\n</style>\n</head>\n<body>",
        *([f"<h1>{name}</h1>"] if name else []),
        f"<ul>{''.join(items)}</ul>",
        f"<pre>{''.join(spans)}</pre>\n</body>\n</html>\n",
    ]
    path.write_text("\n".join(parts), encoding="utf-8", newline="\n")


def _rules(scheme: int, ramp: Sequence[str], deepest: int) -> str:
    """The colours of a page, light (0) or dark (1)."""
    rules = [f"body {{ background: {PAGE[scheme]}; color: {INK[scheme]}; }}", f".d0 {{ color: {MUTED[scheme]}; }}"]
    for depth in range(1, deepest + 1):
        colour = _fill(ramp, depth, deepest)
        rules.append(f".d{depth} {{ background: {colour}; color: {ink(colour)}; }}")
    return "\n".join(rules)


# PNG


def _png(texts: list[str], depths: list[int], deepest: int, title: str, path: Path) -> None:
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties, get_font
    except ImportError as error:
        raise InputError(
            "a PNG needs matplotlib, which is not installed",
            found=str(error),
            remedy="pip install 'depthc[picture]', or write to an .html file",
        ) from error
    # The font of matplotlib itself, by file: settings of the user and fonts of the machine play no part.
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")
    known = get_font(str(file)).get_charmap()
    pieces, rows = _layout(_parts(texts, depths, deepest, title), known)
    size = ((COLUMNS + 4) * CELL[0], (rows + 2) * CELL[1])
    figure = Figure(size, DPI, facecolor=PAGE[0], edgecolor=PAGE[0])
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-2, COLUMNS + 2), ylim=(rows + 1, -1), autoscale_on=False)
    axes.set_axis_off()
    font = FontProperties(fname=str(file), size=POINTS)
    boxes, fills = [], []
    for row, column, text, depth in pieces:
        colour = _fill(LIGHT, depth, deepest) if depth else None
        if colour:
            boxes.append(_box(row, column, len(text)))
            fills.append(colour)
        letters = ink(colour) if colour else INK[0] if depth is None else MUTED[0]
        axes.text(column, row + 0.7, text, color=letters, fontproperties=font, parse_math=False, usetex=False)
    axes.add_collection(PolyCollection(boxes, facecolors=fills, edgecolors=PAGE[0], linewidths=0.5))
    with path.open("wb") as out:
        FigureCanvasAgg(figure).print_png(out)


def _box(row: int, column: int, width: int) -> list[tuple[float, float]]:
    top, bottom = row + 0.04, row + 0.96
    return [(column, top), (column + width, top), (column + width, bottom), (column, bottom)]


def _parts(texts: list[str], depths: list[int], deepest: int, title: str) -> list[tuple[str, int | None]]:
    """Title, legend and text, as texts with a depth."""
    parts: list[tuple[str, int | None]] = [(f"{_shown(title)}\n\n", None)] if title else []
    legend = [(f" {words} ", depth) for depth, words in _legend(depths, deepest)]
    width = max(len(words) for words, _ in legend)
    in_row = max(1, COLUMNS // (width + 1))
    for number, (words, depth) in enumerate(legend):
        before = "" if not number else " " if number % in_row else "\n"
        parts += [(before, None), (words.ljust(width), depth)]
    tokens = [(text.replace("\n", "↵\n"), depth) for text, depth in zip(texts, depths, strict=True)]
    return [*parts, ("\n\n", None), *tokens]


def _layout(parts: Sequence[tuple[str, int | None]], known: Container[int]) -> tuple[Pieces, int]:
    """Where every part of a line goes, broken at COLUMNS, and the number of rows."""
    pieces: Pieces = []
    row = column = 0
    for text, depth in parts:
        fresh = True
        for letter in text:
            if letter == "\n":
                row, column, fresh = row + 1, 0, True
                continue
            drawn = letter if ord(letter) in known else letter.encode("ascii", "backslashreplace").decode()
            drawn = " " * (TAB - column % TAB) if letter == "\t" else drawn
            if column + len(drawn) > COLUMNS:
                row, column, fresh = row + 1, 0, True
            if fresh:
                pieces.append((row, column, "", depth))
            top, left, before, _ = pieces.pop()
            pieces.append((top, left, before + drawn, depth))
            column, fresh = column + len(drawn), False
    return pieces, row + 1
