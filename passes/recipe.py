"""Recipes: named pipelines of passes, written as Python, as text or as TOML."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from depthc.ir.errors import RecipeError
from depthc.ir.names import closest
from depthc.passes.base import Pass, make


@dataclass(frozen=True)
class Recipe:
    """Passes that are applied from left to right.

    Example:
        >>> recipe = Recipe.parse('tie(loops=3) | loop()')
        >>> print(recipe)
        tie(loops=3) | loop()
        >>> from depthc.passes.loop import Loop
        >>> from depthc.passes.tie import Tie
        >>> recipe == Tie(loops=3) | Loop()
        True
    """

    passes: tuple[Pass, ...] = ()
    name: str = field(default="", compare=False)

    def __or__(self, other: Pass | Recipe) -> Recipe:
        return Recipe((*self.passes, *(other.passes if isinstance(other, Recipe) else (other,))))

    def __str__(self) -> str:
        return " | ".join(map(str, self.passes)) or "identity"

    def with_options(self, options: Mapping[str, Any]) -> Recipe:
        """The same recipe with other options: each goes to the passes that have a field of its name.

        Raises:
            RecipeError: no pass of the recipe has it; names the nearest.
        """
        known = {f.name for p in self.passes for f in fields(p)}
        for option in options:
            if option not in known:
                near = closest(option, known)
                raise RecipeError(
                    f"the recipe {self.name or str(self)!r} has no option {option!r}",
                    expected=", ".join(sorted(known)) or "no options",
                    found=option,
                    remedy=f"use {near!r}" if near else "leave it out",
                )
        passes = (replace(p, **{k: v for k, v in options.items() if hasattr(p, k)}) for p in self.passes)
        return replace(self, passes=tuple(passes))

    @staticmethod
    def parse(text: str) -> Recipe:
        """A recipe from text: names of recipes and passes with options, joined by `|`.

        Raises:
            RecipeError: the text is no recipe; says where.
        """
        if not isinstance(text, str):
            raise _malformed(text, type(text).__name__)
        try:
            return _read(ast.parse(text.strip(), mode="eval").body, text)
        except SyntaxError as error:
            raise _malformed(text, f"line {error.lineno}, column {error.offset}") from None

    @staticmethod
    def from_toml(path: str | Path) -> Recipe:
        """A recipe from a TOML file: `recipe = "text"` with an optional table `[options]`, or a list `[[passes]]` of
        tables with a `name` and options.

        Raises:
            RecipeError: the file is not TOML, or has other keys.
        """
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            remedy = "correct the file"
            raise RecipeError(f"the recipe file is not TOML: {error}", where=str(path), remedy=remedy) from None
        try:
            return _from_tables(content)
        except RecipeError as error:
            where = f"{path}{f', {error.where}' if error.where else ''}"
            raise RecipeError(
                error.what, where=where, expected=error.expected, found=error.found, remedy=error.remedy
            ) from None


def _read(node: ast.expr, text: str) -> Recipe:
    from depthc.passes.recipes import RECIPES

    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _read(left, text) | _read(right, text)
        case ast.Name(id=name):
            return RECIPES[name] if name in RECIPES else Recipe((_make(name, {}, RECIPES),))
        case ast.Call(func=ast.Name(id=name), args=[], keywords=words) if all(w.arg for w in words):
            options = {str(w.arg): _literal(w.value, text) for w in words}
            return RECIPES[name].with_options(options) if name in RECIPES else Recipe((_make(name, options, RECIPES),))
    raise _malformed(text, f"column {node.col_offset + 1}")


def _make(name: str, options: dict[str, Any], recipes: Mapping[str, Recipe]) -> Pass:
    from depthc.passes.base import PASSES

    if name not in PASSES:
        known = {*PASSES, *recipes}
        near = closest(name, known)
        expected = ", ".join(sorted(known))
        raise RecipeError(f"there is no recipe or pass {name!r}", expected=expected, found=name, remedy=f"use {near!r}")
    return make(name, options)


def _literal(node: ast.expr, text: str) -> Any:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        raise _malformed(text, f"column {node.col_offset + 1}") from None
    return tuple(value) if isinstance(value, list) else value


def _malformed(text: str, where: str) -> RecipeError:
    return RecipeError(
        f"this is not a recipe: {text!r}",
        where=where,
        expected='names of recipes and passes with options, as in tie(loops=3, sharing="cycle") | route()',
        remedy="write options as keywords with numbers, strings, true values or tuples",
    )


def _from_tables(content: Mapping[str, Any]) -> Recipe:
    unknown = content.keys() - {"recipe", "options", "passes"}
    if unknown or ("recipe" in content) == ("passes" in content):
        raise RecipeError(
            f"unknown key {sorted(unknown)[0]!r}" if unknown else "the file has no recipe, or two",
            expected='recipe = "text" and [options], or [[passes]] with a name each',
            found=", ".join(content) or "an empty file",
            remedy="write one of the two forms",
        )
    if "recipe" in content:
        return Recipe.parse(content["recipe"]).with_options(_tuples(content.get("options", {})))
    tables = [_tuples(table) for table in content["passes"]]
    if any("name" not in table for table in tables) or "options" in content:
        raise RecipeError("a pass has no name", expected='[[passes]] with name = "..."', remedy="name every pass")
    return Recipe(tuple(make(table.pop("name"), table) for table in tables))


def _tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
