"""Pictures of text coloured by depth: what a parser reads of the page, what pixels an image has."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import depthc
from depthc.runtime.picture import picture

SOURCE = "def| |f|(|x|):|\n    |return| <b>|\n\n|# <script>alert('&amp;')</script>|\t.".split("|")
DEPTHS = [3, 1, 3, 1, 2, 1, 1, 2, 0, 1, 2, 3]
VOID = ("meta", "link", "img", "br", "hr", "input")


class Page(HTMLParser):
    """Reads a page: tokens in order, legend, style, and everything that it would load."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, Any]]] = []
        self.tokens: list[list[Any]] = []  # text, class, title
        self.legend: list[list[str]] = []  # words, class
        self.style = self.title = self.heading = self.outside = ""
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.tags.add(tag)
        self.loads += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "style", "srcset")]
        if tag == "span":
            assert self.inside("pre")
            assert not self.inside("span")
            self.tokens.append(["", own["class"], own["title"]])
        if tag == "li":
            self.legend.append(["", own["class"] or ""])
        if tag not in VOID:
            self.open.append((tag, own))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.inside("span"):
            self.tokens[-1][0] += data
        elif self.inside("li"):
            self.legend[-1][0] += data
        elif self.inside("pre"):
            self.outside += data
        for tag, name in (("style", "style"), ("title", "title"), ("h1", "heading")):
            if self.inside(tag):
                setattr(self, name, getattr(self, name) + data)

    def inside(self, tag: str) -> bool:
        return any(name == tag for name, _ in self.open)


def page_of(tokens: Any, depths: Any, folder: Path, **options: Any) -> Page:
    return Page(picture(tokens, depths, folder / "page.html", **options).read_text(encoding="utf-8"))


def pixels_of(tokens: Any, depths: Any, folder: Path, **options: Any) -> Any:
    """uint8[height, width, 3]."""
    numpy, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    with image.open(picture(tokens, depths, folder / "page.png", **options)) as file:
        return numpy.asarray(file.convert("RGB"))


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def schemes(style: str) -> list[dict[str, dict[str, str]]]:
    """{selector: {property: value}} of the light and of the dark page."""
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    found = []
    for part in (light, dark):
        rules = re.findall(r"(body|\.d\d+) \{([^}]*#[^}]*)\}", part)
        found.append({name: dict(re.findall(r"([a-z]+): (#\w+)", body)) for name, body in rules})
    return found


def covered(pixels: Any, colour: str) -> int:
    """How many pixels have exactly this colour."""
    return int((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())


# HTML


def test_page_has_every_token_once_in_order(tmp_path: Path) -> None:
    page = page_of(SOURCE, DEPTHS, tmp_path)
    assert page.tokens == [[t, f"d{d}", f"depth {d} of 3"] for t, d in zip(SOURCE, DEPTHS, strict=True)]
    assert not page.outside.strip()


def test_page_stands_alone(tmp_path: Path) -> None:
    page = page_of(SOURCE, DEPTHS, tmp_path, title="<script>x & y</script>")
    assert page.tags == {"html", "head", "meta", "title", "style", "body", "h1", "ul", "li", "pre", "span", "i"}
    assert not page.loads
    assert not re.search(r"url\(|@import|http", page.style)
    assert page.title == page.heading == "<script>x & y</script>"
    assert "<script" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_page_without_title(tmp_path: Path) -> None:
    page = page_of(SOURCE, DEPTHS, tmp_path)
    assert page.title == "Tokens by depth"
    assert "h1" not in page.tags


def test_legend_counts_every_depth(tmp_path: Path) -> None:
    assert page_of(SOURCE, DEPTHS, tmp_path, deepest=4).legend == [
        ["none: 1 (8%)", "d0"],
        ["depth 1: 5 (42%)", "d1"],
        ["depth 2: 3 (25%)", "d2"],
        ["depth 3: 3 (25%)", "d3"],
        ["depth 4: 0 (0%)", "d4"],
    ]


@pytest.mark.parametrize("deepest", [1, 2, 3, 4, 7, 16])
def test_colours_are_legible_and_ordered(deepest: int, tmp_path: Path) -> None:
    page = page_of(["x"], [1], tmp_path, deepest=deepest)
    for rules in schemes(page.style):
        paper = rules["body"]["background"]
        assert contrast(paper, rules["body"]["color"]) > 7
        assert contrast(paper, rules[".d0"]["color"]) >= 4.5
        fills = [rules[f".d{depth}"]["background"] for depth in range(1, deepest + 1)]
        for depth, fill in enumerate(fills, 1):
            assert contrast(fill, rules[f".d{depth}"]["color"]) >= 4.5
        # Deeper is farther from the page in lightness, which every kind of colour vision sees.
        steps = [contrast(paper, fill) for fill in fills]
        assert steps == sorted(steps)
        assert len(set(fills)) == deepest
        assert deepest > 3 or all(b / a > 1.5 for a, b in pairwise(steps))


def test_what_cannot_be_printed_is_escaped(tmp_path: Path) -> None:
    tokens = ["a\x00b", "\r\n", "\u202ex", "\ud800", "\xa0", "é", "日本", "\x1b[0m", "\\n", ""]
    shown = [r"a\x00b", "\\r\n", r"\u202ex", r"\ud800", r"\xa0", "é", "日本", r"\x1b[0m", "\\n", ""]
    assert [token[0] for token in page_of(tokens, [1] * len(tokens), tmp_path).tokens] == shown


def test_bytes_may_split_a_character(tmp_path: Path) -> None:
    whole = "é<".encode()
    tokens = [whole, *(bytes([b]) for b in whole), b"\xff\n"]
    assert [token[0] for token in page_of(tokens, [1] * len(tokens), tmp_path).tokens] == [
        "é<",
        r"\xc3",
        r"\xa9",
        "<",
        "\\xff\n",
    ]


def test_depths_may_be_a_tensor(tmp_path: Path) -> None:
    page = page_of(SOURCE, torch.tensor(DEPTHS), tmp_path)
    assert [token[1] for token in page.tokens] == [f"d{depth}" for depth in DEPTHS]


def test_no_tokens(tmp_path: Path) -> None:
    assert page_of([], [], tmp_path).tokens == []
    assert pixels_of([], [], tmp_path).size


# PNG


def test_image_has_the_colours_of_its_depths(tmp_path: Path) -> None:
    light = schemes(page_of(SOURCE, DEPTHS, tmp_path).style)[0]
    fills = [light[f".d{depth}"]["background"] for depth in (1, 2, 3)]
    few, many = (pixels_of(["word "] * 40, [depth] * 40, tmp_path, deepest=3) for depth in (1, 3))
    for pixels in (few, many):
        height, width, _ = pixels.shape
        assert 1000 < width < 2000
        assert 150 < height < 600
        assert tuple(pixels[0, 0]) == (255, 255, 255)
        # The legend shows all three.
        assert all(covered(pixels, fill) > 1000 for fill in fills)
    assert covered(few, fills[0]) > 3 * covered(many, fills[0])
    assert covered(many, fills[2]) > 3 * covered(few, fills[2])
    assert covered(few, fills[1]) == covered(many, fills[1])


def test_image_has_one_box_a_token(tmp_path: Path) -> None:
    fill = schemes(page_of(["x"], [1], tmp_path).style)[0][".d1"]["background"]
    whole, letters = (covered(pixels_of(t, [1] * len(t), tmp_path), fill) for t in (["x" * 80], ["x"] * 80))
    assert whole - letters > 500


def test_image_grows_with_its_lines(tmp_path: Path) -> None:
    one, wrapped, broken = (
        pixels_of(tokens, [1] * len(tokens), tmp_path).shape for tokens in (["x" * 90], ["x" * 900], ["x\n"] * 9)
    )
    assert one[1] == wrapped[1] == broken[1]
    line = (broken[0] - one[0]) / 9
    assert 30 < line < 60
    assert wrapped[0] - one[0] == pytest.approx(9 * line, abs=2)


def test_image_of_any_text(tmp_path: Path) -> None:
    """No glyph is missing (that warns), and nothing is read as mathematics."""
    tokens = [*SOURCE, "日本", "😀", "$x_1$", "$\\oops$", "\x00", "\ud800", b"\xc3", b"\xa9", "e\u0301", "", "\t\t"]
    tall = pixels_of(tokens, [1] * len(tokens), tmp_path, title="$\\frac{1}{2}$\n<b>", deepest=30)
    assert tall.shape[0] > 400
    assert pixels_of(["x"], [0], tmp_path, deepest=0).std() > 0


def test_user_settings_of_matplotlib_are_neither_read_nor_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pytest.importorskip("matplotlib").rcParams
    plain, styled = tmp_path / "plain.png", tmp_path / "styled.png"
    picture(["one", "two"], [1, 2], plain)
    chosen = {"backend": "svg", "savefig.bbox": "tight", "savefig.dpi": 30.0, "figure.facecolor": "red"}
    for name, value in (chosen | {"text.color": "red", "font.size": 40.0, "figure.autolayout": True}).items():
        monkeypatch.setitem(settings, name, value)
    before = dict(settings)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    picture(["one", "two"], [1, 2], styled)
    assert dict(settings) == before
    assert "matplotlib.pyplot" not in sys.modules
    assert plain.read_bytes() == styled.read_bytes()


def test_pages_need_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert page_of(SOURCE, DEPTHS, tmp_path).tokens
    with pytest.raises(depthc.InputError) as error:
        picture(SOURCE, DEPTHS, tmp_path / "x.png")
    assert str(error.value).startswith("a PNG needs matplotlib, which is not installed\n  found: ")
    assert str(error.value).endswith("  remedy: pip install 'depthc[picture]', or write to an .html file")
    assert not (tmp_path / "x.png").exists()


# what is refused


@pytest.mark.parametrize(
    ("name", "found", "remedy"),
    [
        ("x.svg", ".svg", "write to 'x.html'"),
        ("x.PNG", ".PNG", "write to 'x.html'"),
        ("x", "'x', which has no suffix", "write to 'x.html'"),
    ],
)
def test_other_formats(name: str, found: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(depthc.InputError) as error:
        picture(SOURCE, DEPTHS, tmp_path / name)
    assert str(error.value) == (
        f"a picture is written as HTML or PNG\n  expected: .html or .png\n  found: {found}\n  remedy: {remedy}"
    )


@pytest.mark.parametrize(
    ("tokens", "depths", "options", "message"),
    [
        (["a"], [1, 2], {}, "tokens and depths differ in number\n  expected: 1 depths\n  found: 2"),
        (["a", "b"], [1, -1], {}, "a depth is out of range\n  expected: depths from 0 to 1\n  found: from -1 to 1"),
        (["a"], [4], {"deepest": 3}, "a depth is out of range\n  expected: depths from 0 to 3\n  found: from 4 to 4"),
        (["a"], [1.5], {}, "the depths are no list of integers\n  expected: one integer a token\n  found: [1.5]"),
        (["a"], torch.ones(1, 1).long(), {}, "the depths are no list of integers\n  expected: one integer a token\n  "),
        (["a"], torch.ones(1), {}, "the depths are no list of integers"),
        ([7], [1], {}, "a token has no text\n  expected: str or bytes\n  found: int 7"),
    ],
)
def test_arguments_that_do_not_fit(
    tokens: Any, depths: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(depthc.InputError, match=re.escape(message)):
        picture(tokens, depths, tmp_path / "x.html", **options)
    assert not list(tmp_path.iterdir())
