"""The report: one HTML page that shows what a recipe did to a model. It loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise

from depthc.codegen.dump.diff import diff_html
from depthc.codegen.dump.figures import figures_html, rows_of
from depthc.codegen.dump.key import key_html
from depthc.codegen.dump.picture import picture
from depthc.codegen.dump.sets import ParamSet, Sets
from depthc.codegen.dump.story import story
from depthc.codegen.dump.style import style_of
from depthc.codegen.dump.words import counted
from depthc.ir.cost.layers import applications, stored_layers
from depthc.ir.program import Program
from depthc.passes.stages import Stage

FEW = 4  # names of parameters that need not be folded


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
    read = [_sets_of(stage.program, sets) for stage in (first, last)]
    stored = (stored_layers(first.program), stored_layers(last.program))
    body = [
        *_heading(stages, sets, title, stored),
        *_pictures(first, last, sets),
        *_passes(stages),
        f"<h2>The program at the end</h2>\n<details><summary>Text</summary>\n{_code(str(last.program))}\n</details>",
        *_missing(missing or {}),
    ]
    places = [one.place for found in read for one in found]
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


def _heading(stages: Sequence[Stage], sets: Sets, title: str, stored: tuple[int, int]) -> Iterator[str]:
    first, last = stages[0], stages[-1]
    recipe = " | ".join(stage.title for stage in stages[1:])
    name = first.program.name if title == recipe else f"{first.program.name}: {title}"
    yield f"<h1>{escape(name)}</h1>\n<p><code>{escape(recipe or 'no pass')}</code></p>"
    yield f'<p class="lead">{escape(story(first.program, last.program, sets))}</p>'
    costs, applied = (first.cost, last.cost), (sum(first.program.depths), sum(last.program.depths))
    rows = list(rows_of(costs, first.program, (applied, stored)))
    yield from figures_html(rows, costs)


def _pictures(first: Stage, last: Stage, sets: Sets) -> Iterator[str]:
    yield '<h2>The model before and after</h2>\n<div class="pictures">'
    for name, stage in (("captured", first), ("after", last)):
        svg = picture(stage.program, sets, name)
        yield f"<section><h3>{name.capitalize()}</h3>\n{svg}\n</section>"
    yield f"{key_html(first.program, last.program, sets)}\n</div>"


def _passes(stages: Sequence[Stage]) -> Iterator[str]:
    if len(stages) > 1:
        yield "<h2>The passes</h2>"
    for before, stage in pairwise(stages):
        yield f"<section>\n<h3>{stage.number}. <code>{escape(stage.title)}</code></h3>"
        if (step := stage.step) is not None:
            yield f'<p class="muted">{1000 * step.seconds:,.0f} ms; {step.before} ops became {step.after}</p>'
            yield from _names("made or bound anew", [f"{name} = {text}" for name, text in step.made])
            yield from _names("dropped", step.dropped)
        yield f"{diff_html(str(before.program), str(stage.program))}\n</section>"


def _names(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        opened = " open" if len(names) <= FEW else ""
        said = f"{counted(len(names), 'parameter')} {what}"
        yield f"<details{opened}><summary>{said}</summary>\n{_code(chr(10).join(names))}\n</details>"


def _missing(missing: Mapping[str, str]) -> Iterator[str]:
    if missing:
        yield "<h2>What is not here</h2>\n<ul>"
        yield from (f"<li><code>{escape(name)}</code>: {escape(reason)}</li>" for name, reason in missing.items())
        yield "</ul>"


def _code(text: str) -> str:
    lines = "".join(f"<span>{escape(line) or ' '}</span>" for line in text.splitlines())
    return f'<pre tabindex="0"><code>{lines}</code></pre>'
