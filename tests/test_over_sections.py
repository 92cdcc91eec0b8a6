"""Graphs over the rows of several sections: what each computes with weights of its own, one behind the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import depthc
from depthc.codegen.few_rows import FEW_ROWS
from depthc.codegen.over_sections import over_sections
from depthc.codegen.rows import Example, traced

from . import models

WIDTH = 6
Function = Callable[..., Tensor]  # of rows, and a matrix, two vectors and a number of each section

FUNCTIONS: dict[str, Function] = {
    "a map": lambda x, m, v, w, g: F.linear(x, m),
    "with a bias": lambda x, m, v, w, g: F.linear(x, m, v) + x,
    "a norm": lambda x, m, v, w, g: F.layer_norm(x, (WIDTH,), v, w),
    "a weight computed on": lambda x, m, v, w, g: x * (1 + v) * g.exp(),
    "a weight for every row": lambda x, m, v, w, g: x + v.expand(x.shape[0], 1, WIDTH),
    "rows elsewhere": lambda x, m, v, w, g: F.linear(x.transpose(0, 1), m).transpose(0, 1) * g,
    "heads": lambda x, m, v, w, g: (F.linear(x, m).view(x.shape[0], 1, 2, 3).transpose(1, 2) * v[:3]).flatten(1),
    "the same weights twice": lambda x, m, v, w, g: F.linear(F.linear(x, m).relu(), m),
    "a computed matrix": lambda x, m, v, w, g: F.linear(x, m * g),
    "no weights": lambda x, m, v, w, g: x.softmax(-1),
}


def graph_of(function: Function, given: list[list[Tensor]]) -> Callable[..., Tensor]:
    """The function of the rows of all sections, with the matrices of all sections one behind the other, and so on."""
    rows = torch.zeros(7, 1, WIDTH, dtype=torch.float64)
    made = traced(function, [Example(rows, (0,)), *(Example(own[0]) for own in given)])
    batch = next(iter(made.nodes)).meta["val"].shape[0]
    graph = over_sections(made, [0, *map(len, given)], batch)
    graph.lint()
    return fx.GraphModule(nn.Module(), graph)


@settings(max_examples=5, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 2**31))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_section_by_section(name: str, sections: int, batch: int, seed: int) -> None:
    generator, function = torch.Generator().manual_seed(seed), FUNCTIONS[name]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes: tuple[tuple[int, ...], ...] = ((WIDTH, WIDTH), (WIDTH,), (WIDTH,), ())
    given = [[drawn(*shape) for _ in range(sections)] for shape in shapes]
    rows = drawn(sections * batch, 1, WIDTH)
    expected = [function(x, *own) for x, *own in zip(rows.chunk(sections), *given, strict=True)]
    found = graph_of(function, given)(rows, *(one for own in given for one in own))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-12, atol=1e-12)


class Normed(nn.Module):
    """A layer whose norm has several results."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(models.WIDTH)) for _ in range(2))
        self.attention = models.Attention()

    def forward(self, h: Tensor) -> Tensor:
        normed = torch.native_layer_norm(h, (models.WIDTH,), self.weight, self.bias, 1e-5)[0]
        return h + self.attention(normed)  # type: ignore[no-any-return]


@torch.no_grad()
def test_weights_of_an_op_with_several_results_keep_stacks_apart() -> None:
    torch.manual_seed(0)
    ids = torch.randint(17, (2, 9))
    layers = [Normed() for _ in range(4)]
    model = nn.Sequential(nn.Embedding(17, models.WIDTH), *layers, nn.Linear(models.WIDTH, 17))
    module = depthc.compile(model, "stagger()", args=(ids,)).eval()
    decoder = depthc.Decoder(module, ids[:, :5], 9, together=True)
    assert not decoder.together
    torch.testing.assert_close(decoder.step(ids[:, 5:6]), module(ids[:, :6])[:, -1])


@pytest.mark.parametrize(
    "function", [lambda x, g: x * g, lambda x, g: torch.where(x > g, x, g), lambda x, g: x + g.exp()]
)
@pytest.mark.parametrize(("rows", "number"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_numbers_do_not_promote_rows(function: Function, rows: torch.dtype, number: torch.dtype) -> None:
    """A number of every section, of a wider type than rows: as section by section, the same type."""
    x, given = torch.randn(6, 1, WIDTH).to(rows), [torch.randn((), dtype=number) for _ in range(3)]
    traced_rows = Example(torch.zeros(7, 1, WIDTH, dtype=rows), (0,))
    made = traced(function, [traced_rows, Example(given[0])])
    graph = over_sections(made, [0, 3], next(iter(made.nodes)).meta["val"].shape[0])
    expected = torch.cat([function(part, g) for part, g in zip(x.chunk(3), given, strict=True)])
    torch.testing.assert_close(fx.GraphModule(nn.Module(), graph)(x, *given), expected)


def test_what_is_computed_element_by_element_is_not_taken_apart() -> None:
    given = [[torch.zeros(shape, dtype=torch.float64)] * 3 for shape in ((WIDTH, WIDTH), (WIDTH,), (WIDTH,), ())]
    for name, parts in {"a weight computed on": 0, "heads": 0, "a norm": 1}.items():
        graph = graph_of(FUNCTIONS[name], given)
        assert isinstance(graph, fx.GraphModule)
        assert sum(node.target is torch.ops.aten.chunk.default for node in graph.graph.nodes) == parts, name


def test_maps_of_all_sections_are_one() -> None:
    given = [[torch.zeros(shape, dtype=torch.float64)] * 3 for shape in ((WIDTH, WIDTH), (WIDTH,), (WIDTH,), ())]
    for name, launches in {"a map": 1, "with a bias": 1, "the same weights twice": 2, "rows elsewhere": 0}.items():
        graph = graph_of(FUNCTIONS[name], given)
        assert isinstance(graph, fx.GraphModule)
        assert sum(node.target is FEW_ROWS for node in graph.graph.nodes) == launches, name
