"""Closed forms of FLOPs: against the operations that torch counts in a run, and against published ratios."""

from __future__ import annotations

from itertools import cycle
from math import prod
from typing import Any

import oracles
import pytest
import sympy
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.ir.cost.cost import cost_of
from depthc.ir.cost.flops import flops
from depthc.ir.cost.pairs import pairs
from depthc.ir.masks.factors import Factor, product
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of

from .models import Spec, Stacked, ids, seeded
from .routed import captured
from .test_tie import smollm

BATCH, LENGTH = 3, 11
REAL = torch.ones(BATCH, LENGTH, dtype=torch.bool)
REAL[0, :2] = False
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "identity": ("identity", {}),
    "tie": ("tie", {}),
    "mor": ("mor", {}),
    "mor that shares keys": ("mor", {"kv": "share_first"}),
    "mor that updates keys": ("mor", {"kv": "update"}),
    "mod": ("mod", {"capacity": 0.4}),
    "stride": ("altup_sequence", {"every": 4}),
    "wide": ("altup", {"embedding": "wide"}),
}


def grouped(rows: tuple[int, ...], weights: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Every row is multiplied by the matrix of its group: [rows, k] with [groups, k, n]."""
    return 2 * rows[0] * prod(weights[1:])


def counted(module: DepthModule, inputs: dict[str, Tensor]) -> int:
    """Operations that torch sees run; attention as plain matrix products, since its own kernels are not counted."""
    own = getattr(getattr(torch.ops, "transformers", None), "grouped_mm_fallback", None)  # once a mixture was built
    mapping: dict[Any, Any] = {} if own is None else {own: grouped}
    with torch.no_grad(), oracles.Wide(), sdpa_kernel(SDPBackend.MATH):
        module(**inputs)  # rows are traced, which the counter would count
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            module(**inputs)
    return counter.get_total_flops()


PAIRS = [
    pytest.param(k, r, marks=[pytest.mark.thorough] * (r == "stride" and k != "llama"))
    for i, k in enumerate(oracles.KINDS)
    for j, r in enumerate(RECIPES)
    if (i + j) % 3 == 0
]


def rows_of(recipe: str) -> str:
    """What a model is captured with: where padding may be, only the data tell which tokens are anchors."""
    return "full" if recipe == "stride" else "padded"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "recipe"), PAIRS)
def test_closed_form_counts_what_runs(kind: str, recipe: str) -> None:
    program = run_recipe(captured(kind, rows_of(recipe))[1], recipe_of(*RECIPES[recipe]))[0]
    module = lower(program).eval()
    module.selection = "training"
    inputs = oracles.inputs_of(kind, REAL if rows_of(recipe) == "padded" else torch.ones_like(REAL))
    sizes = program.signature.size_values(program.signature.flatten((), inputs))
    assert flops(program, masked=False).subs(sizes) == counted(module, inputs)


KEEPING = {"mor_token": ("mor_token", {}), "mor of all tokens": ("mor", {"capacities": (1.0,) * 3}), **RECIPES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        *zip(cycle(oracles.KINDS), KEEPING),
        *(pytest.param(kind, "mor_token", marks=pytest.mark.thorough) for kind in oracles.KINDS[1:]),
    ],
)
def test_parameters_and_caches_are_exact(kind: str, recipe: str) -> None:
    """What a module holds, and what attention keeps after a prompt: to the byte."""
    program = run_recipe(captured(kind, rows_of(recipe))[1], recipe_of(*KEEPING[recipe]))[0]
    module = lower(program).eval()
    inputs = oracles.inputs_of(kind, REAL if rows_of(recipe) == "padded" else torch.ones_like(REAL))
    cost, sets = cost_of(program, selection="inference"), []
    assert cost.parameters == sum(p.numel() for p in module.parameters())
    assert cost.parameter_bytes == sum(p.numel() * p.element_size() for p in module.parameters())
    with torch.no_grad(), oracles.Wide():
        _, past = module.program.start(**inputs)
        aux = module.forward_with_aux(**inputs)[1]
    widths = [int(r.chosen.sum(1).max()) for r in aux.routes if r.chosen is not None]
    sizes = program.signature.size_values(program.signature.flatten((), inputs))
    for number, name in enumerate(cost.unknown, len(widths) - len(cost.unknown)):
        sets.append((name, widths[number]))
    assert cost.at(**sizes, **dict(sets)).cache_bytes == past.cache_bytes
    assert cost.at(**sizes).cache_bytes >= past.cache_bytes
    assert cost.at(**sizes).at_most == bool(cost.unknown)


@pytest.mark.slow
def test_masked_pairs_are_not_counted() -> None:
    """A Llama by hand: projections, attention over half of the pairs, MLP and head."""
    b, s, width, heads, size, hidden = 2, 10, oracles.WIDTH, 2, 8, 24
    projections = 2 * b * s * width * (heads * size + 2 * size + heads * size + 3 * hidden)
    attention = 2 * b * heads * (s * (s + 1) // 2) * 2 * size
    expected = 8 * (projections + attention) + 2 * b * s * width * oracles.VOCAB
    tables = 2 * s * size // 2  # of rotary positions: a product in some versions of transformers
    assert flops(captured("llama", "full")[1]).subs({"b": b, "s": s}) - expected in (0, tables)


@pytest.mark.thorough
def test_windows_are_not_counted_beyond_their_width() -> None:
    """Every other layer of the hybrid attends to a window."""
    b, s, heads, size = 2, 10, 2, 8
    every, near = (2 * b * heads * 2 * size * n for n in (s * s, s * (s + 1) // 2))
    window = 2 * b * heads * 2 * size * sum(min(i + 1, oracles.WINDOW) for i in range(s))
    program = captured("hybrid", "full")[1]
    found = flops(program, masked=False) - flops(program)
    assert found.subs({"b": b, "s": s}) == 4 * (every - near) + 4 * (every - window)


@pytest.mark.parametrize(
    "factors",
    [
        (),
        (Factor("causal"),),
        (Factor("causal"), Factor("window", (4,))),
        (Factor("band", (3,)),),
        (Factor("span", (-2, 1)),),
        (Factor("span", (None, 2)),),
        (Factor("causal"), Factor("chunk", (5,))),
        (Factor("chunk", (4,)),),
        (Factor("causal"), Factor("window", (3,)), Factor("chunk", (4,))),
    ],
    ids=lambda factors: " ".join(map(str, factors)) or "all",
)
def test_pairs_are_those_of_the_relation(factors: tuple[Factor, ...]) -> None:
    s = sympy.Symbol("s", integer=True, positive=True)
    closed = pairs(factors, s)
    for length in (1, 2, 3, 4, 5, 9, 12, 17):
        assert closed.subs(s, length) == int(product(factors, length, length).sum()), length


@pytest.mark.slow
def test_operations_fall_as_capacities_say() -> None:
    """One layer of three recursions: its share of the rows, and the square of it in attention."""
    program = depthc.capture(seeded(lambda: Stacked(Spec(depth=3))), (ids(),))
    sizes = {"b": 2, "s": 12}

    def layers(capacities: tuple[float, ...]) -> int:
        routed = run_recipe(program, recipe_of("tie(loops=3) | route()", {"capacities": capacities}))[0]
        return int(flops(routed, masked=False).subs(sizes))

    whole, half, third = layers((1.0, 1.0, 1.0)), layers((1.0, 0.5, 0.5)), layers((1.0, 0.5, 0.25))
    assert whole == flops(program, masked=False).subs(sizes)
    width = seeded(lambda: Stacked(Spec(depth=3))).head.weight.shape[1]
    attention = 2 * 2 * 2 * 12 * 12 * width  # two products over all pairs
    head = 2 * 2 * 12 * width * 13
    each = (whole - head) / 3
    linear = each - attention
    assert half - head == each + 2 * (linear / 2 + attention / 4)
    assert third - head == each + linear / 2 + attention / 4 + linear / 4 + attention / 16


@pytest.mark.slow
def test_sets_whose_size_the_data_decide_are_symbols() -> None:
    """Of token choice, one for every recursion behind the first: the tokens of a sequence that are as deep.

    Sequences of unequal depth run packed: attention is padded to the longest, all else are the tokens themselves.
    """
    program = run_recipe(captured("llama", "full")[1], recipe_of("mor_token", {"std": 1.0}))[0]
    module = lower(program).eval()
    inputs = oracles.inputs_of("llama", torch.ones(BATCH, LENGTH, dtype=torch.bool))
    expected = counted(module, inputs)
    with oracles.Wide(), torch.no_grad():
        routes = module.forward_with_aux(**inputs)[1].routes
    sizes = {sympy.Symbol(f"chosen_{r}"): routes[r].chosen.sum(1).tolist() for r in range(1, len(routes))}
    assert any(len(set(each)) > 1 for each in sizes.values())
    found = flops(program, masked=False)
    assert {str(symbol) for symbol in found.free_symbols} == {"b", "s", *map(str, sizes)}
    whole = 0
    for (sequences, *powers), factor in sympy.Poly(found.subs("s", LENGTH), sympy.Symbol("b"), *sizes).terms():
        each = [rows for rows, power in zip(sizes.values(), powers, strict=True) if power]
        assert [power for power in powers if power] in ([], [1], [2])
        assert sequences == 1 or (sequences, each) == (0, [])  # a table of rotary positions is one for the batch
        rows = BATCH**sequences if not each else BATCH * max(each[0]) ** 2 if 2 in powers else sum(each[0])
        whole += factor * rows
    assert whole == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "loops", "published"),
    [
        pytest.param(32, 2, 0.746, marks=pytest.mark.thorough),
        pytest.param(32, 3, 0.664, marks=pytest.mark.thorough),
        pytest.param(34, 4, 0.662, marks=pytest.mark.thorough),
    ],
)
def test_published_ratios(layers: int, loops: int, published: float) -> None:
    """FLOPs a token of MoR over vanilla SmolLM-360M at 2048 tokens, embedding and head aside (recipes: section 9)."""
    sizes, head = {"b": 1, "s": 2048}, 2 * 2048 * 960 * 49152
    vanilla = flops(smollm(32)).subs(sizes) - head
    routed = flops(run_recipe(smollm(layers), recipe_of("mor", {"loops": loops}))[0]).subs(sizes) - head
    assert float(routed / vanilla) == pytest.approx(published, abs=1e-3)
