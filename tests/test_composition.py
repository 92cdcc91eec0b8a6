"""Passes one after another: against oracles put together, as identities, token by token, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import compositions
import oracles
import pytest
import torch
from compositions import CLOSE, LONGER, PASSES, TIED, Composition, longer, pair, with_noise
from oracles import Wide, staggered, widened
from torch import Tensor

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.ir.errors import RecipeError
from depthc.ir.sections import sections_of
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipe import Recipe

from .models import stack_program
from .routed import BACKWARD, FORWARD, ROWS, captured, logits_of, stepped, weighted
from .test_stagger import for_oracle

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results" / "compositions.json"


def module_of(kind: str, recipe: str, rows: str = "full") -> DepthModule:
    """A rewritten model with noise on what the recipe adds."""
    with Wide():
        return with_noise(lower(run_recipe(captured(kind, rows)[1], Recipe.parse(recipe))[0]).eval())


def coefficients(module: DepthModule) -> dict[str, Tensor]:
    """Those of widened layers, as the oracle names them."""
    named = ((name.split("."), p) for name, p in module.new_parameters().items() if name.startswith("depth.widen."))
    return {f"{slot}.{layer}": p for (_, _, layer, slot), p in named}


def tied_math(kind: str) -> Any:
    """The model with the layers that tie takes, in their order."""
    math = oracles.math_of(kind, captured(kind, "full")[0])
    tied = oracles.tie(math, "middle_cycle", 3)
    math.layers = [tied.slots[slot] for slot in tied.order]
    return math


def assert_agree(module: DepthModule, expected: Tensor, inputs: Mapping[str, Tensor], real: Tensor) -> None:
    """Logits, and the gradients of all that the recipe adds."""
    with Wide():
        found = logits_of(module(**inputs))
    assert (found - expected)[real].abs().max() < FORWARD
    fresh = module.new_parameters()
    pairs = (torch.autograd.grad(weighted(out, real), list(fresh.values())) for out in (found, expected))
    for name, ours, theirs in zip(fresh, *pairs, strict=True):
        assert (ours - theirs).abs().max() < BACKWARD, name


# against oracles

SOME = [
    *("llama", "parallel"),
    *(
        pytest.param(k, marks=pytest.mark.thorough)
        for k in (*oracles.KINDS, oracles.QK_NORM)
        if k not in ("llama", "parallel")
    ),
]


@pytest.mark.slow
def test_stagger_over_a_tied_loop() -> None:
    module, inputs = module_of("llama", f"{TIED} | stagger()"), captured("llama", "full")[2]
    with Wide():
        math, settings = tied_math("llama"), staggered.Settings()
        expected = staggered.stagger(math, settings, for_oracle(math, module, settings), inputs, ROWS["full"])
    assert_agree(module, expected, inputs, ROWS["full"])


def test_widen_around_a_loop() -> None:
    module, inputs = module_of("llama", f"{TIED} | widen()"), captured("llama", "full")[2]
    with Wide():
        given = coefficients(module), inputs, ROWS["full"]
        expected = widened.widen(tied_math("llama"), widened.Settings(), *given)
    assert_agree(module, expected, inputs, ROWS["full"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"shared": True}, marks=pytest.mark.thorough),
        pytest.param({"reinject": False}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_widened_stacks(kind: str, options: dict[str, Any]) -> None:
    """Every stack has blocks of its own; its mean is the memory of the next. Token by token it is the same."""
    settings = staggered.Settings(**options)
    text = ", ".join(f"{name}={value}" for name, value in options.items())
    module = module_of(kind, f"stagger({text}) | widen()", "padded")
    model, _, inputs = captured(kind, "padded")
    with Wide():
        expected = both(oracles.math_of(kind, model), settings, module, inputs, ROWS["padded"])
    assert_agree(module, expected, inputs, ROWS["padded"])
    rows, _ = stepped(kind, module.program, inputs)
    assert (rows - expected)[ROWS["padded"]].abs().max() < FORWARD


def both(
    math: Any, settings: staggered.Settings, module: DepthModule, inputs: Mapping[str, Tensor], real: Tensor
) -> Tensor:
    """The two oracles put together: AltUp around each layer of each stack."""
    cross, wide, altup = for_oracle(math, module, settings), coefficients(module), widened.Settings()
    stacks, found = staggered.stacks_of(math, settings, cross), []
    for b, row in enumerate(oracles.rows_of(math, real, None)):
        embedded = dict(enumerate(math.embed(inputs, b)))
        outs: list[dict[int, Tensor]] = []
        number = 0
        for stack in stacks:
            memory = outs[-1] if outs else {}
            blocks = {t: [x] * 2 for t, x in (memory if outs and not settings.reinject else embedded).items()}
            for layer in stack:
                ahead = {t: widened.predict(altup, wide, number, old) for t, old in blocks.items()}
                reads = {t: widened.read(altup, number, blocks[t], ahead[t]) for t in blocks}
                done = staggered.run_stack(row, settings, [layer], reads, memory)
                blocks = {t: widened.correct(altup, wide, number, ahead[t], y) for t, y in done.items()}
                number += 1
            outs.append({t: sum(states) / 2 for t, states in blocks.items()})  # type: ignore[misc]
        ends = {t: staggered.combined(cross["combine"], {q: out[t] for q, out in enumerate(outs)}) for t in embedded}
        found.append(row.logits(ends))
    return torch.stack(found)


@pytest.mark.slow
def test_widened_stacks_are_still_side_by_side() -> None:
    program = depthc.compile(stack_program(4), "stagformer | widen()").program
    assert [section.depth for section in sections_of(program, program.stacks[-1])] == [2, 2]


# as identities, and token by token


def assert_whole(one: Composition, *equals: str) -> None:
    row = one.judge()
    assert row["legal"], row["reason"]
    assert row["steps"], row["reason"]
    assert row["gap"] < CLOSE
    assert set(equals) <= set(row["equals"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "equals"),
    [
        (f"{TIED} | stagger(reinject=False)", TIED),
        ("stagger(shared=True) | widen()", "stagger(shared=True)"),
        (f"{TIED} | stagger(reinject=False) | widen()", TIED),
        pytest.param(LONGER[6], "stagger()", marks=pytest.mark.thorough),
        pytest.param(LONGER[7], "stagger()", marks=pytest.mark.thorough),
    ],
)
def test_longer_recipes(recipe: str, equals: str) -> None:
    assert_whole(longer(recipe), equals)


@pytest.mark.parametrize(("first", "second"), [("tie", "widen"), ("stagger", "widen"), ("widen", "loop")])
def test_pairs(first: str, second: str) -> None:
    """The second pass, or the loop, changes nothing before it is trained."""
    assert_whole(pair("layers", first, second), first)


@pytest.mark.slow
def test_a_route_inside_a_stack() -> None:
    """Its router, in the first stack, counts where the second begins with what the first made."""
    text = 'stagger(reinject=False) | tie(loops=2, sharing="middle_cycle", keep=(0, 4))'
    one = longer(f"{text} | route(std=1.0)")
    assert one.equals() == []
    assert_whole(one)
    neutral = longer(f'{text} | route(combine="off", capacities=(1.0, 1.0))')
    assert text in neutral.equals()


# refused


@pytest.mark.parametrize(
    ("recipe", "reason", "remedy"),
    [
        ("route()", "no loop to route", "tie the layers first"),
        ("widen() | stagger()", "other ops between the layers", "put stagger earlier"),
        ("widen() | widen()", "other ops between the layers", "and once"),
        ("stagger() | stagger()", "2 staggered stacks", "and once"),
        ("stagger() | route()", "form no loop", 'tie(sharing="middle_cycle", keep=(0, 4)) | route()'),
        ("stagger() | tie(loops=2)", "not the same function", "keep=(0, 4)"),
        ('stagger() | widen(embedding="wide")', "one stream", "replicated"),
        ("stagger() | mod(layers=(5,))", "layer 5 cannot be chosen", "layers 0, 1, 2, 3"),
        (f"{TIED} | route() | stagger()", "rewritten before", "use mod()"),
        (f"{TIED} | widen() | route()", "no loop to route, as it has been rewritten", "use mod()"),
        (f"{TIED} | widen() | loop() | route()", "holds more than layers", "use mod()"),
        (f"{TIED} | route() | route()", "holds more than layers", "once"),
        (f"{TIED} | mod() | tokenchoice()", "rewritten before", "leave out tokenchoice"),
        ("mod() | stride()", "rewritten before", "chooses its tokens once"),
        ("stride() | widen()", "rewritten before", "put widen earlier"),
        (LONGER[5], "holds more than layers", "pass one state on"),
    ],
)
def test_refused(recipe: str, reason: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=reason) as caught:
        compositions.subject().lowered(recipe)
    assert caught.value.found or caught.value.expected or caught.value.where
    assert remedy in caught.value.remedy


# the committed table


@cache
def committed() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["rows"]  # type: ignore[no-any-return]


def assert_as_committed(row: dict[str, Any]) -> None:
    """All but the exact rounding."""
    one = pair(row["given"], row["first"], row["second"]) if row["given"] else longer(row["recipe"])
    now = one.judge()
    assert now.pop("gap", 0.0) < CLOSE
    assert now == {key: value for key, value in row.items() if key != "gap"}


def test_the_table_has_every_pair() -> None:
    assert [row["recipe"] for row in committed()] == [one.recipe for one in compositions.compositions()]
    assert (
        len({(row["given"], row["first"], row["second"]) for row in committed() if row["given"]})
        == 2 * len(PASSES) ** 2
    )


@pytest.mark.parametrize(
    ("given", "first", "second"),
    [
        ("layers", "tie", "stagger"), ("layers", "stagger", "widen"), ("layers", "widen", "stagger"),
        ("layers", "mod", "stride"), ("loop", "widen", "route"), ("loop", "stagger", "loop"),
    ],
)  # fmt: skip
def test_the_table_is_what_passes_do(given: str, first: str, second: str) -> None:
    named = [row for row in committed() if (row["given"], row["first"], row["second"]) == (given, first, second)]
    assert len(named) == 1
    assert_as_committed(named[0])


@pytest.mark.thorough
@pytest.mark.parametrize("recipe", [one.recipe for one in compositions.compositions()])
def test_the_whole_table(recipe: str) -> None:
    for row in (row for row in committed() if row["recipe"] == recipe):
        assert_as_committed(row)
