"""The command line: `depthc show | explain | compile | bisect | zoo | demo`."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import depthc
from depthc.bisect import bisect as bisect_model
from depthc.codegen.dump.files import dump_of, write
from depthc.codegen.module import DepthModule
from depthc.codegen.python.text import python_text
from depthc.explain import Explanation
from depthc.ir.capture import capture
from depthc.ir.errors import DepthError, TargetError
from depthc.ir.program import Program
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipe import Recipe
from depthc.passes.recipes import RECIPES, recipe_of
from depthc.passes.stages import stages_of
from depthc.targets import FORMS, Target, resolve

app = typer.Typer(
    help="A compiler for the depth of transformers: looped, routed and tied forms of any model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TargetArg = Annotated[str, typer.Argument(metavar="MODEL", help=f"The model: {FORMS}.")]
RecipeArg = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help=f"{', '.join(RECIPES)}; or passes like 'tie(loops=2) | route()'; or a .toml file."
    ),
]
Inputs = Annotated[list[str], typer.Option("--input", "-i", help="An example argument: input_ids=i64[2,16].")]
Options = Annotated[list[str], typer.Option("--option", "-o", help="An option of the recipe: loops=2.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def show(
    target: TargetArg,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Show the model after this recipe.")] = "identity",
    form: Annotated[str, typer.Option(help="depth, python or mlir.")] = "depth",
    inputs: Inputs = [],  # noqa: B006
    options: Options = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Print the program of a model: its layers, what they share, where tokens go."""
    forms: dict[str, Callable[[Program], str]] = {"depth": str, "python": python_text, "mlir": Program.mlir}
    if form not in forms:
        raise typer.BadParameter(f"{form!r} is none of {', '.join(forms)}")
    program = _explained(target, recipe, inputs, options).stages[-1].program
    text = forms[form](program)
    print(json.dumps({"name": program.name, "depths": program.depths, form: text}) if as_json else text)


@app.command()
def explain(
    target: TargetArg,
    recipe: RecipeArg = "identity",
    sizes: Annotated[list[str], typer.Option("--size", "-s", help="A size for the figures: s=4096.")] = [],  # noqa: B006
    dump: Annotated[Path | None, typer.Option(help="Write a folder with every stage and a report.")] = None,
    inputs: Inputs = [],  # noqa: B006
    options: Options = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Say what a recipe would do and cost, without weights: layers, parameters, operations, cache."""
    found = _explained(target, recipe, inputs, options)
    given = dict(map(_assignment, sizes))
    print(json.dumps(found.figures(**given), indent=1) if as_json else found.table(**given))
    if dump:
        write(dump_of(found.stages, str(found.recipe)), dump)
        print(f"dumped to {dump}: open {dump / 'report.html'}", file=sys.stderr)


@app.command("compile")
def compile_(
    target: TargetArg,
    recipe: RecipeArg,
    out: Annotated[Path, typer.Option("--out", help="The folder to save into; depthc.load reads it.")],
    dump: Annotated[Path | None, typer.Option(help="Write a folder with every stage and a report.")] = None,
    inputs: Inputs = [],  # noqa: B006
    options: Options = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Rewrite a model by a recipe and save it."""
    found = _plain(resolve(target, inputs, weights=True), target)
    chosen = _recipe(recipe, options)
    compiled = depthc.compile(found.model, chosen, found.args, found.kwargs)
    depthc.save(compiled, out)
    if dump:
        compiled.dump(dump)
    count = sum(p.numel() for p in compiled.parameters())
    fact = {"saved": str(out), "recipe": str(chosen), "passes": [*map(str, compiled.history)], "parameters": count}
    print(json.dumps(fact) if as_json else "\n".join([*fact["passes"], f"saved to {out}: {count:,} parameters"]))  # type: ignore[misc]


@app.command()
def bisect(
    target: TargetArg,
    recipe: RecipeArg,
    tolerance: Annotated[float, typer.Option(help="The relative difference up to which results are equal.")] = 1e-5,
    inputs: Inputs = [],  # noqa: B006
    options: Options = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Name the first pass whose result differs from the one before it."""
    found = _plain(resolve(target, inputs, weights=True), target)
    result = bisect_model(found.model, _recipe(recipe, options), found.args, found.kwargs, tolerance=tolerance)
    print(json.dumps(asdict(result) | {"first": result.first and result.first.title}) if as_json else result)


@app.command()
def zoo(
    targets: Annotated[list[str], typer.Argument(metavar="MODEL...", help=f"Models: each {FORMS}.")],
    recipes: Annotated[list[str], typer.Option("--recipe", "-r", help="Recipes to try.")] = [  # noqa: B006
        'tie(fit="resample")',
        'mor(fit="resample")',
        'mor_token(fit="resample")',
        "mod",
    ],
    inputs: Inputs = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Try recipes on models: which are legal, and why the others are not."""
    chosen = {text: _recipe(text, ()) for text in recipes}
    rows = {}
    for target in track(targets, "capturing", console=Console(stderr=True), transient=True):
        rows[target] = _verdicts(target, chosen, inputs)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("model", *recipes)
    for target, verdicts in rows.items():
        table.add_row(target, *("yes" if verdict == "legal" else verdict for verdict in verdicts.values()))
    Console().print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the report and the pictures go.")] = Path("depthc-demo"),
    seconds: Annotated[float, typer.Option(help="How long to train.")] = 10.0,
) -> None:
    """Make a small transformer a Mixture-of-Recursions, train it, and draw how deep each token went."""
    from depthc.demo import run

    run(out, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; an error of depthc is printed without a traceback, and is status 1.

    Example:
        >>> main(["explain", "torch.nn:Identity", "--input", "input=f32[2,3]"])
        1
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(given)
    except DepthError as error:
        if "--json" in given:
            parts = {"what": error.what, "where": error.where, "expected": error.expected, "found": error.found}
            print(json.dumps({"error": {"kind": type(error).__name__, **parts, "remedy": error.remedy}}))
        else:
            print(f"depthc: {error}", file=sys.stderr)
        return 1
    except SystemExit as finished:  # how typer ends: 0, or 2 after a word on how to use it
        return int(finished.code or 0)
    return 0


def _explained(target: str, recipe: str, inputs: Sequence[str], options: Sequence[str]) -> Explanation:
    found = resolve(target, inputs)
    chosen = _recipe(recipe, options)
    if isinstance(found.model, DepthModule) and not chosen.passes:
        return Explanation(found.model.recipe, stages_of(found.model.program, found.model.history))
    _plain(found, target)
    return depthc.explain(found.model, chosen, found.args, found.kwargs)


def _plain(found: Target, name: str) -> Target:
    """A target that a recipe can be applied to: no compiled module."""
    if isinstance(found.model, DepthModule):
        remedy = "give the model that it was compiled from"
        raise TargetError(f"{name!r} is compiled already", found=f"recipe {found.model.recipe}", remedy=remedy)
    return found


def _recipe(text: str, options: Sequence[str]) -> Recipe:
    found = Recipe.from_toml(text) if text.endswith(".toml") else Recipe.parse(text)
    return recipe_of(found, dict(map(_assignment, options)))


def _assignment(text: str) -> tuple[str, Any]:
    """A name and a value, from "loops=2"."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise typer.BadParameter(f"{text!r} is not name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _verdicts(target: str, recipes: dict[str, Recipe], inputs: Sequence[str]) -> dict[str, str]:
    try:
        found = _plain(resolve(target, inputs), target)
        program = capture(found.model, found.args, found.kwargs)
    except DepthError as error:
        return dict.fromkeys(recipes, error.what)
    verdicts = {}
    for text, recipe in recipes.items():
        try:
            run_recipe(program, recipe)
            verdicts[text] = "legal"
        except DepthError as error:
            verdicts[text] = error.what
    return verdicts
