"""The style of a dump's page, for light and dark screens and for paper."""

from __future__ import annotations

from collections.abc import Iterable

from depthc.codegen.colours import DARK, INK, LIGHT, MUTED, PAGE, fill, ink

STEPS = 100  # of the ramp of depths
PANEL, LINE = ("#f6f7f8", "#1c1f23"), ("#c9cdd2", "#3d4249")
ADDED, GONE = (("#116329", "#dafbe1"), ("#7ee2a0", "#12301d")), (("#a40e26", "#ffebe9"), ("#ffa198", "#3a1619"))

PAGE_STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 77rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.375rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.25rem 0 0.75rem; font-size: 1.0625rem; }
h3 { margin: 0 0 0.5rem; font-size: 0.9375rem; }
p { margin: 0.5rem 0; max-width: 50rem; }
p.lead { font-size: 1.0625rem; }
code, pre, .mono { font: 0.8125rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
h1 + p code { overflow-wrap: anywhere; }
.muted, small { color: var(--muted); }
small { font-size: 0.8125rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 1.5rem 0.2rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 400; }
th:first-child { text-align: left; white-space: normal; }
thead th { color: var(--muted); font-size: 0.8125rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
.pictures > * { flex: 0 1 372px; min-width: 0; }
.pictures > .key { flex: 1 1 18rem; max-width: 26rem; }
.key ul { margin: 0 0 1rem; padding: 0; list-style: none; font-size: 0.875rem; }
.key li { display: flex; gap: 0.625rem; margin: 0.375rem 0; }
.key li > svg { flex: none; margin-top: 0.1rem; }
details { margin: 0.375rem 0; }
dl { margin: 0.5rem 0; }
dt { color: var(--muted); font-size: 0.8125rem; }
dd { margin: 0 0 0.5rem; overflow-wrap: anywhere; }
summary { cursor: pointer; }
summary:focus-visible { outline: 2px solid var(--ink); outline-offset: 2px; }
pre { margin: 0.5rem 0; padding: 0.75rem 0; overflow-x: auto; background: var(--panel); border: 1px solid var(--line);
  border-radius: 4px; tab-size: 4; }
pre > code { display: block; width: max-content; min-width: 100%; }
pre span { display: block; padding: 0 0.75rem; }
pre .add { color: var(--add); background: var(--add-back); }
pre .gone { color: var(--gone); background: var(--gone-back); }
pre .skip { color: var(--muted); }
svg.picture { display: block; max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .bold { font-weight: 600; }
svg .muted { font-size: 11px; fill: var(--muted); }
svg .times { font-size: 15px; font-weight: 700; }
svg .tower { fill: var(--panel); stroke: var(--line); }
svg .box { fill: var(--page); stroke: var(--line); }
svg .region { fill: none; stroke: var(--ink); stroke-dasharray: 5 3; }
svg .bracket { fill: none; stroke: var(--ink); stroke-width: 2; }
svg .flow { fill: none; stroke: var(--muted); }
svg .head { fill: var(--muted); stroke: none; }
svg .cell rect { stroke: var(--edge); }
svg .cell text { font: 600 12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; text-anchor: middle; }
svg .cell text.small { font-size: 9px; }
svg .cell path { fill: var(--ink); }
svg .routed rect { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 4 2.5; }
svg .gone rect { fill: none; stroke: var(--muted); stroke-dasharray: 1.5 2.5; }
svg .cell.gone text { font-weight: 400; fill: var(--muted); }
svg .glue rect, svg .new rect { fill: var(--page); stroke: var(--ink); }
rect, pre span { print-color-adjust: exact; }
@media (max-width: 40rem) { body { padding: 1rem 0.75rem 3rem; } th, td { padding-right: 0.9rem; } }
@media print { body { max-width: none; padding: 0; } pre { white-space: pre-wrap; } pre > code { width: auto; } }
"""


def colour_class(place: float | None) -> str:
    """The class of a layer's box whose values come from some place in depth, from 0 to 1; "new" from none."""
    return "new" if place is None else f"c{round(place * STEPS)}"


def style_of(places: Iterable[float | None]) -> str:
    """The style of a page with boxes of these places."""
    steps = sorted({round(place * STEPS) for place in places if place is not None})
    light, dark = (_scheme(number, steps) for number in (0, 1))
    return f"{PAGE_STYLE}{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def _scheme(number: int, steps: Iterable[int]) -> str:
    """The colours of a page, light (0) or dark (1)."""
    names = {"page": PAGE, "ink": INK, "muted": MUTED, "panel": PANEL, "line": LINE}
    values = {name: pair[number] for name, pair in names.items()}
    values |= {"add": ADDED[number][0], "add-back": ADDED[number][1]}
    values |= {"gone": GONE[number][0], "gone-back": GONE[number][1], "edge": ("#00000055", "#ffffff55")[number]}
    rules = [":root { " + " ".join(f"--{name}: {value};" for name, value in values.items()) + " }"]
    for step in steps:
        colour = fill((LIGHT, DARK)[number], step / STEPS)
        letters = ink(colour)
        rules.append(
            f"svg .c{step} rect {{ fill: {colour}; }} svg .c{step} text, svg .c{step} path {{ fill: {letters}; }}"
        )
    return "\n".join(rules)
