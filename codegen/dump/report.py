"""The report: one HTML page that shows what a recipe did to a model. It loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from depthc.codegen.dump.diff import diff_html
from depthc.codegen.dump.figures import closed_forms_html, rows_of, table_html
from depthc.codegen.dump.key import key_html
from depthc.codegen.dump.picture import picture
from depthc.codegen.dump.sets import ParamSet, Sets, applications
from depthc.codegen.dump.story import story
from depthc.codegen.dump.style import style_of
from depthc.ir.program import Program
from depthc.passes.stages import Stage

SHOWN = 12  # names of parameters that a pass made or dropped, before the rest is folded


def report_html(stages: Sequence[Stage], title: str, missing: Mapping[str, str] | None = None) -> str:
    """The page of some stages, the captured model first.

    Args:
        title: of the page: the recipe, or a name.
        missing: files that could not be made beside it, with the reason.

    Example:
        >>> import torch, depthc
        >>> from depthc.passes.stages import stages_of
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> compiled = depthc.compile(model, "tie", args=(torch.ones(2, 5, 4),))
        >>> page = report_html(stages_of(compiled.program, compiled.history), "tie")
        >>> "4 layers became 2" in page
        True
    """
    first, last = stages[0], stages[-1]
    sets = Sets(first.program, last.program)
    shown = [_sets_of(stage.program, sets) for stage in (first, last)]
    body = [
        *_heading(first, last, sets, title, (len(shown[0]), len(shown[1]))),
        *_pictures(first, last, sets),
        *_passes(stages),
        "<h2>The program at the end</h2>",
        f'<details><summary>Its text</summary>\n<pre tabindex="0"><code>{_lines(str(last.program))}</code></pre>\n</details>',
        *_missing(missing or {}),
    ]
    places = [one.place for found in shown for one in found]
    name = escape(f"{first.program.name}: {title}")
    head = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name}</title>\n<style>{style_of(places)}</style>\n</head>\n<body>",
    ]
    return "\n".join([*head, *body, "</body>\n</html>\n"])


def _sets_of(program: Program, sets: Sets) -> dict[ParamSet, None]:
    """The parameter sets of a program in the order of their first use."""
    pairs = [pair for stack in program.stacks for pair in applications(stack.ops)]
    return dict.fromkeys(sets.of_call(program, call, [indices]) for call, indices in pairs)


def _heading(first: Stage, last: Stage, sets: Sets, title: str, stored: tuple[int, int]) -> Iterator[str]:
    yield f"<h1>{escape(first.program.name)}: {escape(title)}</h1>"
    yield f'<p class="lead">{escape(story(first.program, last.program, sets))}</p>'
    rows = list(rows_of(first, last, stored))
    yield table_html(rows)
    if any("≤" in row.before + row.after for row in rows):
        yield '<p class="muted"><small>≤: the data decide how many tokens run; the figure is for as many as there can be.</small></p>'
    if any(row.after == "–" for row in rows):
        yield f'<p class="muted"><small>–: {escape(last.cost.no_cache)}.</small></p>'
    yield closed_forms_html(first, last)


def _pictures(first: Stage, last: Stage, sets: Sets) -> Iterator[str]:
    yield '<h2>The model before and after</h2>\n<div class="pictures">'
    for name, stage in (("captured", first), ("after", last)):
        svg = picture(stage.program, sets, name)
        yield f"<section><h3>{name.capitalize()}</h3>\n{svg}\n</section>"
    yield f"{key_html(first.program, last.program, sets)}\n</div>"


def _passes(stages: Sequence[Stage]) -> Iterator[str]:
    if len(stages) < 2:
        return
    yield "<h2>The passes</h2>"
    for before, stage in zip(stages, stages[1:], strict=False):
        yield f"<section>\n<h3>{stage.number}. <code>{escape(stage.title)}</code></h3>"
        if stage.step is not None:
            step = stage.step
            yield f'<p class="muted">{step.seconds:.2f} s; {step.before} ops became {step.after}</p>'
            yield from _names("parameters made or bound anew", [f"{name} = {text}" for name, text in step.made])
            yield from _names("parameters dropped", step.dropped)
        yield f"{diff_html(str(before.program), str(stage.program))}\n</section>"


def _names(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        opened = " open" if len(names) <= SHOWN // 3 else ""
        yield f"<details{opened}><summary>{len(names):,} {what}</summary>"
        yield f'<pre tabindex="0"><code>{_lines(chr(10).join(names))}</code></pre></details>'


def _missing(missing: Mapping[str, str]) -> Iterator[str]:
    if missing:
        yield "<h2>What is not here</h2>\n<ul>"
        yield from (f"<li><code>{escape(name)}</code>: {escape(reason)}</li>" for name, reason in missing.items())
        yield "</ul>"


def _lines(text: str) -> str:
    return "".join(f"<span>{escape(line) or ' '}</span>" for line in text.splitlines())
