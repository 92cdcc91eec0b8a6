"""Linear maps of few rows: against sums in Python's fp64, one map and several, and in the place of maps of a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead import built
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

import depthc
from depthc.codegen.few_rows import FEW_ROWS, gathered
from depthc.codegen.kernels.decode_attention import op as attention
from depthc.codegen.kernels.few_rows import applies, few_rows_linear, op
from depthc.ir.errors import InputError

RECIPES = [
    "stagger(shared=True)",
    *(pytest.param(r, marks=pytest.mark.thorough) for r in ("identity", "stagger(window=3)")),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_TENSORS = ("rows", "matrices", "biases", "added", "made")
MODULE = "depthc.codegen.kernels.few_rows.kernel"


def looped(rows: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Number by number."""
    bias = [0.0] * len(w) if b is None else b.tolist()
    sums = [[sum(map(float.__mul__, x, y)) + c for y, c in zip(w.tolist(), bias, strict=True)] for x in rows.tolist()]
    return torch.tensor(sums, dtype=torch.float64)


@settings(max_examples=16, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 70),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.booleans(),
    st.integers(1, 3),
)
def test_against_a_loop(count: int, features: int, columns: list[int], biased: bool, sections: int) -> None:
    """Rows and matrices that lie apart in memory, and more features than a program reads at a time."""
    rows = torch.randn(sections * count, features + 3, device=DEVICE)[:, :features]
    each = [n for n in columns for _ in range(sections)]
    matrices = [torch.randn(n, features + 5, device=DEVICE)[:, 2 : features + 2] for n in each]
    biases = [torch.randn(n, device=DEVICE) for n in each] if biased else []
    assert applies(rows, matrices, biases, sections) is None
    residual = torch.randn(sections * count, columns[0], device=DEVICE) if len(columns) == 1 else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_BLOCK", 32)
        found = few_rows_linear(rows, matrices, biases, residual, sections=sections)
    found = found if residual is None else [found[0] - residual]
    parts = [part for y in found for part in y.double().cpu().chunk(sections)]
    for number, (y, w, b) in enumerate(zip(parts, matrices, biases or [None] * len(each), strict=True)):
        own = rows.chunk(sections)[number % sections]
        torch.testing.assert_close(y, looped(own, w, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [300, 700, pytest.param(2000, marks=pytest.mark.thorough)])
def test_programs_of_several_columns(columns: int) -> None:
    rows, w = torch.randn(2, 1, 40, device=DEVICE), torch.randn(columns, 40, device=DEVICE)
    torch.testing.assert_close(few_rows_linear(rows, [w, w[:7]]), [linear(rows, w), linear(rows, w[:7])])
    residual = torch.randn(2, columns, 1, device=DEVICE).mT
    torch.testing.assert_close(few_rows_linear(rows, [w], None, residual), [linear(rows, w) + residual])


def test_runs_are_equal() -> None:
    rows, w = torch.randn(3, 40, device=DEVICE), torch.randn(50, 40, device=DEVICE)
    assert torch.equal(few_rows_linear(rows, [w])[0], few_rows_linear(rows, [w])[0])


def test_what_does_not_apply() -> None:
    """It runs all the same."""
    rows, w = torch.randn(1, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    cases: dict[str, tuple[Any, ...]] = {
        "same for rows": (rows.double(), [w]),
        "5 rows": (rows.expand(5, 8), [w]),
        "no rows": (rows[:0], [w]),
        "4 maps": (rows, [w] * 4),
        "side by side": (rows, [torch.randn(8, 6, device=DEVICE).T]),
        "more than 32768": (torch.randn(1, 20000, device=DEVICE), [torch.randn(1, 20000, device=DEVICE)]),
        "empty": (rows, [w[:0]]),
    }
    for why, (x, matrices) in cases.items():
        assert why in str(applies(x, matrices)), why
        if x.dtype == w.dtype:
            expected = [linear(x, m) for m in matrices]
            assert all(map(torch.equal, few_rows_linear(x, matrices), expected))
    few_rows_linear(rows, [w.requires_grad_()])[0].sum().backward()
    torch.testing.assert_close(w.grad, rows.expand(6, 8))


def test_shapes_that_do_not_fit() -> None:
    rows, w = torch.randn(2, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    bias, added = torch.randn(6, device=DEVICE), torch.randn(2, 6, device=DEVICE)
    wrong: list[tuple[Any, ...]] = [
        ([w[:, :4]],),
        ([w], [bias[:4]]),
        ([w, w], [bias]),
        ([w], None, added[0]),
        ([w], None, added.double()),
        ([w, w], None, added),
        ([w, w[:3]], None, None, 2),
        ([w] * 3, None, None, 2),
        ([w] * 3, None, None, 3),
        ([w, w], None, None, 0),
    ]
    for arguments in wrong:
        with pytest.raises(InputError, match="do not fit together"):
            few_rows_linear(rows, *arguments)


class Siblings(nn.Module):
    """Maps of the same rows, with biases and without; of other rows; by a computed matrix; with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.ModuleList([nn.Linear(8, n, bias=False) for n in (4, 8, 6, 5)])
        self.biased = nn.ModuleList([nn.Linear(8, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        made = [one(x) for one in (*self.plain, *self.biased)]
        other, stream = self.plain[0](made[1]), x
        for factor in (2, 3):  # each a residual of the other
            stream = stream + self.plain[1](stream * factor)
        direct = few_rows_linear(x, [self.plain[1].weight], None, x)[0]
        return [*made, other, linear(x, self.plain[0].weight * 2), stream, x + made[1], direct]


@pytest.mark.parametrize(("rows", "launches"), [(1, 6), (4, 6), (5, 0)])
@torch.no_grad()
def test_maps_of_a_graph(rows: int, launches: int) -> None:
    """Three maps a launch, another for the fourth, one for those with biases, and one each for maps of other rows.

    The sum of a map that is used elsewhere stays a sum, and a launch that was one before stays as it is.
    """
    torch.manual_seed(0)
    model, x = Siblings().to(DEVICE), torch.randn(rows, 8, device=DEVICE)
    expected = model(x)
    made: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: Any) -> fx.GraphModule:
        gathered(graph)
        made.append(graph)
        return graph

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), expected)
    found = [n for n in made[0].graph.nodes if n.target is FEW_ROWS]
    assert len(found) == launches + 1
    assert sum(n.args[3] is not None for n in found) == (2 if launches else 0) + 1


class Writing(nn.Module):
    """What maps read is written over between them; and autocast has its own idea of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, residual: Tensor) -> list[Tensor]:
        made = self.one(x)
        x.mul_(2)
        later = self.one(residual)
        residual.add_(1)
        return [made, self.other(x), later + residual]


@pytest.mark.parametrize("cast", [False, True])
@torch.no_grad()
def test_maps_that_stay(cast: bool) -> None:
    torch.manual_seed(0)
    model, launches = Writing().to(DEVICE), list[int]()
    given = [torch.randn(1, 8, device=DEVICE) for _ in range(2)]

    def backend(graph: fx.GraphModule, _: Any) -> fx.GraphModule:
        gathered(graph)
        launches.append(sum(n.target is FEW_ROWS for n in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=cast):
        expected = model(*(x.clone() for x in given))
        found = torch.compile(model, backend=backend)(*(x.clone() for x in given))
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    torch.testing.assert_close(found, expected)
    assert launches == [0]


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_a_decoder(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All linear maps of the layers and the head are the kernel's, with Inductor and, without a GPU, without it."""
    if DEVICE == "cpu":
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, _, **options: graph)
    torch.compiler.reset()
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    model, tokens = LlamaForCausalLM(config).to(DEVICE).eval(), torch.randint(31, (1, 6), device=DEVICE)
    made = depthc.compile(model, recipe, kwargs={"input_ids": tokens.expand(2, -1)}).eval()
    for param in made.parameters():
        param.add_(0.05 * torch.randn_like(param))  # cross-attention starts at zero
    expected = made(input_ids=tokens).logits
    launched, attended = list[int](), list[int]()
    like = attention._like
    monkeypatch.setattr(attention, "_like", lambda q: attended.append(not isinstance(q, FakeTensor)) or like(q))
    monkeypatch.setattr(op, "_PROGRAMS", 1)  # fewer programs are interpreted sooner
    tiles = op.tiles_of
    monkeypatch.setattr(op, "tiles_of", lambda *sizes: launched.append(sizes[0]) or tiles(*sizes))
    decoder = depthc.Decoder(made, tokens[:, :4], 6, compile=True, graph=False, together=True)
    for at in range(4, 6):
        launched.clear()
        attended.clear()
        torch.testing.assert_close(decoder.step(tokens[:, at : at + 1]), expected[:, at], rtol=1e-4, atol=1e-4)
        # A layer has 4 launches, for all stacks, the head one; a crossing 2, and what is shown to all of them is one.
        layers = {"identity": [1] * 9, "stagger(window=3)": [1] * (5 + 3), "stagger(shared=True)": [2] * 8}[recipe]
        assert sum(attended) == {"identity": 2, "stagger(window=3)": 2, "stagger(shared=True)": 4}[recipe]
        assert sorted(launched) == sorted(layers + [1] * 6 * (recipe == "stagger(shared=True)"))


@pytest.mark.slow
def test_compiled_for_hopper() -> None:
    """No spills, and 16-byte loads."""
    half = [("*bf16", rows, features, 6) for rows in (1, 2, 4) for features in (2048, 5632, 16384)]
    builds = []
    for dtype, rows, features, maps in [
        *half,
        ("*bf16", 4, 5632, 3),
        *(("*fp32", rows, 8192, 6) for rows in (1, 2, 4)),
    ]:
        tiles = op.tiles_of(rows, features, 4 * features)
        options = {"num_warps": tiles.pop("num_warps")}
        types: dict[str, Any] = dict.fromkeys(_TENSORS, [dtype] * maps)
        types |= {"columns": ["i32"] * maps, "strides": ["i32 even"] * maps, "row_stride": "i32 even"}
        constants = {"MAPS": maps, "K": features, **tiles}
        if maps == 3:
            constants |= {"added": None, "biases": None}
        one = {"module": MODULE, "kernel": "products_kernel", "types": types}
        builds.append({**one, "constants": constants, "options": options})
    for build, found in zip(builds, built(builds), strict=True):
        assert found["STACK"] == found["LOCAL"] == 0, build
        assert found["ld.global.v4"] > 0, build
