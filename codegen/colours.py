"""Colours of what depthc draws, for light and dark pages: depths from near the page to far from it."""

from __future__ import annotations

from collections.abc import Sequence

# Evenly spaced in lightness, from yellow over green to blue: in order for every kind of colour vision, and in grey.
LIGHT = ("#fbeaa6", "#8fd0a8", "#3a93b5", "#1f3f8f")
DARK = ("#1d3a6e", "#2b7f9e", "#6cc39a", "#f7e48c")
PAGE, INK, MUTED = ("#ffffff", "#15171a"), ("#1c1e21", "#e6e6e6"), ("#666a70", "#9a9ea4")  # in light, in dark


def fill(ramp: Sequence[str], share: float) -> str:
    """The colour at a share of a ramp, from 0 to 1, between its two nearest colours.

    Example:
        >>> fill(LIGHT, 0.0), fill(("#000000", "#204060"), 0.5)
        ('#fbeaa6', '#102030')
    """
    at = share * (len(ramp) - 1)
    left = min(int(at), len(ramp) - 2)
    pairs = ((int(ramp[left][i : i + 2], 16), int(ramp[left + 1][i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * (at - left)):02x}" for a, b in pairs)


def ink(fill: str) -> str:
    """Black or white, whichever has more contrast with the fill: 4.5 to 1 at least, whatever the fill (WCAG 2)."""
    return "#000000" if luminance(fill) > 0.179 else "#ffffff"


def luminance(colour: str) -> float:
    """The relative luminance of a colour, from 0 to 1 (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
