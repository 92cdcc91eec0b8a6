"""Staggered stacks token by token: teacher-forced is step by step, in any order of the stacks; windows are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Any

import oracles
import pytest
import torch
from oracles import Wide, staggered
from torch import Tensor

import depthc
from depthc.codegen.module import DepthModule
from depthc.ir.axes.ports import ports_of
from depthc.ir.cost.cost import cost_of
from depthc.ir.errors import IncrementalError
from depthc.ir.incremental import Past
from depthc.ir.masks.masks import masks_of
from depthc.ir.program import Program
from depthc.ir.sections import lagged_ports, sections_of
from depthc.ir.side_by_side import step

from .models import Spec, Stacked, ids, seeded
from .routed import ROWS, captured, logits_of, stepped
from .test_stagger import SETTINGS, SOME, compiled, for_oracle

PROMPT, LENGTH = 4, 9


def split(kind: str, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The arguments that grow with the tokens, and the others."""
    mask = "decoder_attention_mask" if kind == "encoder_decoder" else "attention_mask"
    growing = {n: v for n, v in inputs.items() if n in (oracles.token_input(kind), mask, "position_ids")}
    return growing, {n: v for n, v in inputs.items() if n not in growing}


def side_by_side(
    kind: str, program: Program, inputs: Mapping[str, Tensor], order: tuple[int, ...], at_once: int = 1
) -> tuple[Tensor, Past]:
    """Logits of a prompt, and of further tokens `at_once` a step."""
    tokens, fixed = split(kind, inputs)
    with Wide(), torch.no_grad():
        out, past = program.start(**fixed, **{n: v[:, :PROMPT] for n, v in tokens.items()})
        parts = [logits_of(out)]
        for t in range(PROMPT, LENGTH, at_once):
            out, past = step(program, past, (), {n: v[:, t : t + at_once] for n, v in tokens.items()}, order)
            parts.append(logits_of(out))
    return torch.cat(parts, 1), past


def full(module: DepthModule, inputs: Mapping[str, Tensor]) -> Tensor:
    with Wide(), torch.no_grad():
        return logits_of(module(**inputs))


def depths(program: Program) -> list[int]:
    return [section.depth for section in sections_of(program, program.stacks[-1])]


# step by step


@pytest.mark.parametrize("name", SETTINGS)
def test_step_by_step(name: str) -> None:
    module, inputs = compiled("llama", **SETTINGS[name]), captured("llama", "full")[2]
    rows, _ = stepped("llama", module.program, inputs)
    assert (rows - full(module, inputs)).abs().max() < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOME)
def test_step_by_step_in_any_order(kind: str) -> None:
    """With padding; in the order of the program, and with the last stack first."""
    inputs, real = captured(kind, "padded")[2], ROWS["padded"]
    module = compiled(kind, "padded", **SETTINGS["separate"])
    expected = full(module, inputs)
    rows, _ = stepped(kind, module.program, inputs)
    assert (rows - expected)[real].abs().max() < 1e-10
    for order in ((0, 1), (1, 0)):
        rows, _ = side_by_side(kind, module.program, inputs, order)
        assert (rows - expected)[real].abs().max() < 1e-10, order


@pytest.mark.slow
def test_four_stacks_in_many_orders() -> None:
    module, inputs = compiled("llama", **SETTINGS["four"]), captured("llama", "full")[2]
    expected, found = full(module, inputs), []
    for order in list(permutations(range(4)))[::5]:
        rows, past = side_by_side("llama", module.program, inputs, order)
        found.append(rows)
        assert (rows - expected).abs().max() < 1e-10, order
        assert past.length == LENGTH
    assert all(torch.equal(rows, found[0]) for rows in found)


def test_the_oracle_steps_alike() -> None:
    model, _, inputs = captured("llama", "full")
    module, settings = compiled("llama", **SETTINGS["separate"]), staggered.Settings(**SETTINGS["separate"])
    math = oracles.math_of("llama", model)
    with Wide(), torch.no_grad():
        parameters = for_oracle(math, module, settings)
        expected = staggered.decode(math, settings, parameters, inputs, ROWS["full"], order=(1, 0))
    rows, _ = side_by_side("llama", module.program, inputs, (1, 0))
    assert (rows - expected).abs().max() < 1e-10


def test_as_many_tokens_at_once_as_the_lag() -> None:
    module, inputs = compiled("llama", lag=3), captured("llama", "full")[2]
    rows, _ = side_by_side("llama", module.program, inputs, (1, 0), at_once=3)
    assert (rows - full(module, inputs)).abs().max() < 1e-10
    with pytest.raises(IncrementalError, match="3 new tokens at most"):
        side_by_side("llama", module.program, inputs, (1, 0), at_once=4)


@pytest.mark.slow
def test_generation() -> None:
    model = seeded(lambda: Stacked(Spec(depth=4)))
    module = depthc.compile(model, "stagformer_shared", args=(ids(),)).eval()
    found = depthc.generate(module, ids(), 6)
    for t in range(5, 11):
        assert torch.equal(module(found[:, :t])[:, -1].argmax(-1), found[:, t])


# what may run at the same time


@pytest.mark.parametrize(
    ("name", "expected"),
    [("separate", [4, 4]), ("four", [2, 2, 2, 2]), ("shared", [8, 8]), ("sequential", [8]), ("behind", [8])],
)
def test_sections_are_derived(name: str, expected: list[int]) -> None:
    """Side by side with a lag and with the embeddings again, only; the text of the program says so."""
    program = compiled("llama", **SETTINGS[name]).program
    assert depths(program) == expected
    (line,) = (line for line in str(program).splitlines() if "with stack" in line)
    assert line.endswith(f"in a step: {', '.join(map(str, expected))} layers") == (len(expected) > 1)
    assert depths(depthc.parse(str(program))) == expected


def test_a_lag_of_zero_is_one_section() -> None:
    program = compiled("llama", lag=0).program
    assert depths(program) == [8]
    assert depths(captured("llama", "full")[1]) == [8]


@pytest.mark.parametrize("options", [{"lag": 0}, {"reinject": False}, {"lag": 0, "reinject": False}])
def test_dependent_stacks_refuse_to_run_side_by_side(options: dict[str, Any]) -> None:
    module, inputs = compiled("llama", **options), captured("llama", "full")[2]
    with pytest.raises(IncrementalError, match="cannot run side by side"):
        side_by_side("llama", module.program, inputs, (0, 1))


@pytest.mark.parametrize("order", [(0,), (0, 0), (0, 1, 2)])
def test_other_orders_are_refused(order: tuple[int, ...]) -> None:
    module, inputs = compiled("llama"), captured("llama", "full")[2]
    with pytest.raises(IncrementalError, match="not an order"):
        side_by_side("llama", module.program, inputs, order)


# caches


@pytest.mark.parametrize(("lag", "window"), [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("order", [None, (1, 0)])
def test_of_a_window_only_the_window_is_kept(lag: int, window: int, order: tuple[int, ...] | None) -> None:
    """A row of memory is needed from when it is made until lag + window - 1 tokens later."""
    module, inputs = compiled("llama", lag=lag, window=window), captured("llama", "full")[2]
    program = module.program
    steps = stepped("llama", program, inputs) if order is None else side_by_side("llama", program, inputs, order)
    assert (steps[0] - full(module, inputs)).abs().max() < 1e-10
    past, crossed = steps[1], 0
    for site, kept in past.caches.items():
        call = program.stacks[0].ops[int(site.rpartition(".")[2])]
        lagged = lagged_ports(program, call)
        for port, cache in enumerate(kept.caches):
            assert {t.shape[-2] for t in cache} == {lag + window - 1 if port in lagged else LENGTH}, site
            crossed += port in lagged
    assert crossed == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parallel", pytest.param("hybrid", marks=pytest.mark.thorough)])
def test_caches_cost_what_is_said(kind: str) -> None:
    """Windows of the layers' own are forgotten as well."""
    program, inputs = compiled(kind, **SETTINGS["four"]).program, captured(kind, "full")[2]
    with Wide(), torch.no_grad():
        _, past = program.start(**inputs)
    sizes = program.signature.size_values(program.signature.flatten((), inputs))
    assert cost_of(program).at(**sizes).cache_bytes == past.cache_bytes


@pytest.mark.slow
def test_masks_of_memory_are_relations_with_a_lag() -> None:
    program = compiled("llama", "padded", lag=2, window=3).program
    call = program.stacks[0].ops[-2]
    own, memory = (str(mask) for mask in masks_of(program)[call])
    assert len(ports_of(program.blocks[call.block])) == 2
    assert own == "causal & keys(attention_mask)"
    assert memory == "window(-4, -2) & keys(attention_mask)"
