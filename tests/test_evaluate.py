"""What token sets, regions and loops mean: programs rewritten by hand against loops over single tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import depthc
from depthc.ir.body import Body, Input
from depthc.ir.program import Call, Loop, Merge, On, Op, Program, Segment, Select
from depthc.ir.selection import select
from depthc.ir.tokens import TokenSet
from depthc.ir.types import Type
from depthc.ir.verify import verify
from depthc.passes.glue import Glue

from .models import WIDTH, Spec, Stacked, seeded

aten = torch.ops.aten
IDS = torch.randint(13, (3, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return seeded(lambda: Stacked(Spec(depth=2, dtype=torch.float64)))


@pytest.fixture(scope="module")
def program(model: nn.Module) -> Program:
    return depthc.capture(model, (IDS,))


def made(name: str, *ops: tuple[Any, ...]) -> Segment:
    """A value `name` of the stream, by some ops in a row: each with its arguments behind the first."""
    graph = fx.Graph()
    value = graph.placeholder("h")
    value.meta["input"] = Input("h", "value", Type(torch.float64, ("b", "s", WIDTH)))
    for op, *rest in ops:
        value = graph.call_function(op, (value, *rest))
    graph.output((value,))
    return Segment(name, Body(graph), ("h",), (name,))


def score_of(name: str) -> Segment:
    """The sum of a token's features, as a value `name`."""
    return made(name, (aten.sum.dim_IntList, [-1]))


def rewritten(program: Program, *ops: Op) -> Program:
    """The program with other ops in its only stack."""
    (stack,) = program.stacks
    made = replace(program, body=tuple(replace(i, ops=ops) if i is stack else i for i in program.body))
    verify(made)
    assert depthc.parse(str(made)) == made
    return made


def layers_of(program: Program) -> tuple[Call, Call]:
    first, second = program.stacks[0].ops
    assert isinstance(first, Call)
    assert isinstance(second, Call)
    return first, second


def on_tokens(layer: nn.Module, h: Tensor, chosen: Tensor) -> Tensor:
    """One causal layer on the chosen tokens alone, a row of the batch at a time, each among those chosen before it."""
    out = h.clone()
    for row, mask in enumerate(chosen):
        at = mask.nonzero()[:, 0]
        if len(at):
            out[row, at] = layer(h[row : row + 1, at])[0]
    return out


def topk(score: Tensor, share: float, among: Tensor) -> Tensor:
    """The best of the candidates of each row, one at a time."""
    chosen = torch.zeros_like(among)
    for row in range(len(score)):
        left = among[row].nonzero()[:, 0].tolist()
        for _ in range(max(1, int(len(left) * share))):
            best = max(left, key=lambda t: (float(score[row, t]), -t))
            chosen[row, best] = True
            left.remove(best)
    return chosen


@torch.no_grad()
def test_layer_on_the_best_tokens(model: nn.Module, program: Program) -> None:
    first, second = layers_of(program)
    routed = rewritten(
        program,
        first,
        score_of("score"),
        Select("A", "topk(0.5)", "score"),
        On("A", ("h",), ("y",), (replace(second, writes=("y",)),)),
        Merge("h", "h", "y", "A"),
    )
    h = model.layers[0](model.embed(IDS))
    chosen = topk(h.sum(-1), 0.5, torch.ones(IDS.shape, dtype=torch.bool))
    assert chosen.sum(1).tolist() == [3, 3, 3]
    expected = model.head(model.norm(on_tokens(model.layers[1], h, chosen)))
    torch.testing.assert_close(routed.run(IDS), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_nested_selection_in_a_loop(model: nn.Module, program: Program) -> None:
    first, second = layers_of(program)
    again = replace(second, params=first.params, writes=("y",))
    routed = rewritten(
        program,
        score_of("depth"),
        Select("A", "threshold(-0.5)", "depth"),
        Loop(
            "r",
            3,
            (
                Select("A", "atleast(r - 1)", "depth", "A"),
                On("A", ("h",), ("y",), (again,)),
                Merge("h", "h", "y", "A"),
            ),
        ),
    )
    h = model.embed(IDS)
    depth = h.sum(-1)
    chosen = depth > -0.5
    for r in range(3):
        chosen = chosen & (depth >= r - 1)
        h = on_tokens(model.layers[0], h, chosen)
    assert len(set(chosen.sum(1).tolist())) > 1
    torch.testing.assert_close(routed.run(IDS), model.head(model.norm(h)), rtol=0, atol=1e-12)


def test_gradients_reach_only_what_was_selected(model: nn.Module, program: Program) -> None:
    first, _ = layers_of(program)
    routed = rewritten(
        program,
        score_of("score"),
        Select("A", "stride(2)", "score"),
        On("A", ("h",), ("y",), (replace(first, writes=("y",)),)),
        Merge("h", "h", "y", "A"),
    )
    params = [model.get_parameter(name) for name in first.params]
    found = torch.autograd.grad(routed.run(IDS).square().sum(), params)
    chosen = (torch.arange(6) % 2 == 0).expand(3, -1)
    out = model.head(model.norm(on_tokens(model.layers[0], model.embed(IDS), chosen)))
    wanted = torch.autograd.grad(out.square().sum(), params)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rule", "kept"), [("all", [1, 2, 4]), ("stride(2)", [2, 4])])
def test_rules_that_need_no_score_among_candidates(rule: str, kept: list[int]) -> None:
    among = TokenSet(torch.tensor([[False, True, True, False, True]]))
    assert select(rule, None, among).mask[0].nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize("length", [1, 5, 6])
def test_how_many_a_stride_chooses_is_known(length: int) -> None:
    """Without a look at the data, of all tokens; not of some."""
    scores = torch.zeros(2, length)
    chosen = select("stride(3)", scores)
    assert chosen.count == chosen.mask[0].sum() == chosen.positions.shape[1]
    some = TokenSet(torch.ones(2, length).bool())
    assert select("stride(3)", None, some).count is None


def test_rows_go_to_the_tokens_up_to_the_next_one(model: nn.Module, program: Program) -> None:
    """Of a set whose first token is none of the first, into a set that has holes: old, new and extra rows."""
    first, _ = layers_of(program)
    g, rows = Glue(), Type(torch.float64, ("b", "k", WIDTH))
    old, new, at = (g.value(name, rows) for name in ("old", "new", "at"))
    combine = g.body(g.op(aten.sub.Tensor, g.op(aten.add.Tensor, g.op(aten.mul.Tensor, old, 2), new), at))
    routed = rewritten(
        program,
        score_of("score"),
        Select("B", "threshold(-1.0)", "score"),
        Select("A", "threshold(0.0)", "score"),
        On("A", ("h",), ("y",), (replace(first, writes=("y",)),)),
        Merge("h", "h", "y", "A", combine, ("h",), over="B"),
    )
    h = model.embed(IDS)
    score = h.sum(-1)
    done, expected = on_tokens(model.layers[0], h, score > 0), h.clone()
    for b in range(h.shape[0]):
        members = [t for t in range(h.shape[1]) if score[b, t] > 0]
        for t in range(h.shape[1]):
            before = [a for a in members if a <= t]
            if before and score[b, t] > -1:
                expected[b, t] = h[b, t] * 2 + done[b, before[-1]] - h[b, before[-1]]
    assert not torch.equal(expected, h)
    assert ((score > 0).cumsum(1) == 0).any(), "a token before the first"
    assert (((score > 0).cumsum(1) > 0) & (score <= -1)).any(), "a hole"
    torch.testing.assert_close(routed.run(IDS), model.head(model.norm(expected)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [None, 2])
def test_a_candidate_comes_before_what_is_none_whatever_its_score(count: int | None) -> None:
    low = float("-inf")
    among = TokenSet(torch.tensor([[False, True, True, False]]), count=count)
    assert select("topk(0.5)", torch.tensor([[0.0, low, low, 1.0]]), among).mask.tolist() == [
        [False, True, False, False]
    ]
