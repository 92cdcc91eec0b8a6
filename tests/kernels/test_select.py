"""The selection kernels: each against its reference, a loop over tokens, and what `select` of the IR chooses."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from ahead import built
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from depthc.codegen.kernels.select import Ragged, Selection, applies, select_topk, select_where
from depthc.codegen.kernels.select.op import LONGEST, ROWS, select_topk_op, select_where_op
from depthc.codegen.kernels.select.reference import select_topk_reference, select_where_reference
from depthc.ir.errors import InputError, RoutingError
from depthc.ir.selection import select
from depthc.ir.tokens import TokenSet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VALUES = (-math.inf, -3.0, -1e-30, -0.0, 0.0, 1e-40, 0.5, 0.5000001, 2.0, math.inf)


@st.composite
def scores(draw: st.DrawFn, most: int = 40) -> tuple[Tensor, Tensor | None]:
    """Logits of few values, hence with ties, and candidates; rows of any share, none too."""
    B, S, seed = draw(st.integers(1, 3)), draw(st.integers(1, most)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=6)))
    logits = values[torch.randint(len(values), (B, S), generator=generator)]
    if draw(st.booleans()):
        logits = torch.where(
            torch.rand(B, S, generator=generator) < 0.5, logits, torch.randn(B, S, generator=generator)
        )
    share = draw(st.sampled_from([None, 0.0, 0.3, 0.9, 1.0]))
    candidates = None if share is None else torch.rand(B, S, generator=generator) < share
    return logits.to(DEVICE), None if candidates is None else candidates.to(DEVICE)


def best(row: list[float], among: list[bool], k: int) -> list[int]:
    """The k best candidates of one row, ascending, by sorting in Python."""
    ranked = sorted((i for i in range(len(row)) if among[i]), key=lambda i: (-row[i], i))
    return sorted(ranked[:k])


def lists(logits: Tensor, candidates: Tensor | None) -> tuple[list[list[float]], list[list[bool]]]:
    among = torch.ones_like(logits, dtype=torch.bool) if candidates is None else candidates
    return logits.tolist(), among.tolist()


def assert_same(found: Selection | Ragged, expected: Selection | Ragged) -> None:
    for field in fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda text, name=field.name: f"{name}: {text}")


@settings(max_examples=80)
@given(scores(), st.data())
def test_topk(given: tuple[Tensor, Tensor | None], data: st.DataObject) -> None:
    logits, candidates = given
    k = data.draw(st.integers(1, logits.shape[1]))
    assert applies(logits, candidates) is None
    found = select_topk(logits, k, candidates)
    assert_same(found, select_topk_reference(logits, k, candidates))
    for b, (row, among) in enumerate(zip(*lists(logits, candidates), strict=True)):
        chosen = best(row, among, k)
        valid = [True] * k if found.valid is None else found.valid[b].tolist()
        positions = found.positions[b].tolist()
        assert [p for p, v in zip(positions, valid, strict=True) if v] == chosen
        assert positions == sorted(set(positions))
        assert found.mask[b].nonzero()[:, 0].tolist() == chosen
        assert [positions.index(p) if p in chosen else -1 for p in range(len(row))] == found.inverse[b].tolist()


def test_ties_at_zero_and_at_the_bottom() -> None:
    """-0.0 ties with 0.0; a candidate at -inf comes before what is no candidate."""
    assert select_topk(torch.tensor([[-0.0, 0.0]], device=DEVICE), 1).positions.tolist() == [[0]]
    logits, candidates = torch.full((1, 3), -math.inf, device=DEVICE), torch.tensor([[False, False, True]])
    assert select_topk(logits, 1, candidates.to(DEVICE)).positions.tolist() == [[2]]


@settings(max_examples=60)
@given(scores(), st.data())
def test_rows_may_want_different_numbers(given: tuple[Tensor, Tensor | None], data: st.DataObject) -> None:
    logits, candidates = given
    wanted = torch.tensor([data.draw(st.integers(0, logits.shape[1])) for _ in logits], device=DEVICE)
    k = max(1, int(wanted.max()))
    found = select_topk(logits, k, candidates, wanted)
    assert_same(found, select_topk_reference(logits, k, candidates, wanted))
    for b, (row, among) in enumerate(zip(*lists(logits, candidates), strict=True)):
        assert found.mask[b].nonzero()[:, 0].tolist() == best(row, among, int(wanted[b]))


@pytest.mark.parametrize("capacity", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("padded", [False, True])
def test_topk_is_that_of_the_program(capacity: float, padded: bool) -> None:
    logits = torch.randn(3, 21, device=DEVICE).round(decimals=1)
    real = torch.arange(21, device=DEVICE) < torch.tensor([[21], [13], [0]], device=DEVICE)
    among = TokenSet(real) if padded else None
    of_program = select(f"topk({capacity})", logits, among)
    k = max(1, int(21 * capacity))
    wanted = (real.sum(1).double() * capacity).long().clamp(min=1)
    found = select_topk(logits, k, real, wanted) if padded else select_topk(logits, k)
    assert torch.equal(found.mask, of_program.mask)
    assert torch.equal(found.positions, of_program.positions)
    assert padded == (found.valid is not None)
    if padded:
        assert torch.equal(found.valid, of_program.valid)


@settings(max_examples=100)
@given(scores(), st.sampled_from([*VALUES, 0.3]), st.booleans())
@example((torch.zeros(2, 2100, device=DEVICE), None), -1.0, False)  # more than one step over a row
def test_where(given: tuple[Tensor, Tensor | None], number: float, inclusive: bool) -> None:
    score, candidates = given
    assert applies(score, candidates, topk=False) is None
    found = select_where(score, number, inclusive=inclusive, candidates=candidates)
    assert_same(found, select_where_reference(score, number, inclusive=inclusive, candidates=candidates))
    number = float(torch.tensor(number))  # as float32
    chosen, begins = [], [0]
    for b, (row, among) in enumerate(zip(*lists(score, candidates), strict=True)):
        fit = [a and (x > number or number == -math.inf or (inclusive and x == number)) for x, a in zip(row, among)]  # noqa: B905
        chosen += [b * len(row) + i for i, f in enumerate(fit) if f]
        begins.append(len(chosen))
    assert found.places.tolist() == chosen + [-1] * (score.numel() - len(chosen))
    assert found.cu_seqlens.tolist() == begins
    assert [int(i) for i in found.inverse.flatten()[chosen]] == list(range(len(chosen)))


@pytest.mark.parametrize("number", [1, 1.5, -math.inf, math.inf, 2**24 + 1])
@pytest.mark.parametrize("inclusive", [False, True])
def test_depths_are_compared_as_integers(number: float, inclusive: bool) -> None:
    depth = torch.tensor([[0, 1, 2, 2**24], [2**24 + 1, 2**24 + 2, 1, 0]], device=DEVICE)
    found = select_where(depth, number, inclusive=inclusive)
    assert_same(found, select_where_reference(depth, number, inclusive=inclusive))


def test_where_is_that_of_the_program() -> None:
    score = torch.randn(3, 21, device=DEVICE).round(decimals=1)
    for rule, number, inclusive in (("threshold(0.5)", 0.5, False), ("atleast(0.5)", 0.5, True)):
        of_program, found = select(rule, score), select_where(score, number, inclusive=inclusive)
        assert torch.equal(found.mask, of_program.mask)
        assert torch.equal(found.places[: found.cu_seqlens[-1]], of_program.places)


@pytest.mark.parametrize("rows", [slice(None, None, 2), slice(1, None)])
def test_inputs_may_have_any_strides(rows: slice) -> None:
    logits, candidates = torch.randn(30, 5, device=DEVICE).T[rows], (torch.rand(30, 5, device=DEVICE) < 0.5).T[rows]
    assert not logits.is_contiguous()
    assert_same(select_topk(logits, 7, candidates), select_topk_reference(logits, 7, candidates))
    assert_same(
        select_where(logits, 0.0, candidates=candidates), select_where_reference(logits, 0.0, candidates=candidates)
    )


def test_a_long_row() -> None:
    logits = torch.randn(2, LONGEST, device=DEVICE).round(decimals=2)
    for k in (1, 1000, LONGEST):
        assert_same(select_topk(logits, k), select_topk_reference(logits, k))


@pytest.mark.parametrize("choose", [lambda x, c: select_topk(x, 2, c), lambda x, c: select_where(x, 0.0, candidates=c)])
def test_nan_is_refused_where_it_is_a_candidate(choose: Any) -> None:
    logits = torch.zeros(2, 4)
    logits[1, 2] = math.nan
    candidates = torch.ones(2, 4, dtype=torch.bool)
    if DEVICE == "cpu":  # elsewhere it ends the process
        with pytest.raises(RoutingError, match="row 1, token 2"):
            choose(logits, candidates)
    candidates[1, 2] = False
    assert not choose(logits.to(DEVICE), candidates.to(DEVICE)).mask[1, 2]


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, -0x400000, -1])
def test_a_row_with_nan_stays_within_bounds(bits: int) -> None:
    """The device finds out later; until then nothing may be written outside."""
    logits = torch.randn(1, 9, device=DEVICE)
    logits.view(torch.int32)[0, 4] = bits
    positions, _, mask, _, fine = select_topk_op(logits, 3, None, None)
    assert not fine.item()
    assert mask.sum() == 3
    assert positions.tolist() == mask.nonzero()[:, 1:].T.tolist()
    candidates = torch.arange(9, device=DEVICE)[None] > 1
    assert torch.equal(select_topk_op(logits, 9, candidates, None)[2], candidates)


def test_bitwise_repeatable() -> None:
    logits = torch.randn(3, 100, device=DEVICE)
    assert_same(select_topk(logits, 17), select_topk(logits, 17))
    assert_same(select_where(logits, 0.0), select_where(logits, 0.0))


def test_opcheck() -> None:
    logits, candidates = torch.randn(2, 9, device=DEVICE), torch.rand(2, 9, device=DEVICE) < 0.5
    torch.library.opcheck(select_topk_op, (logits, 3, candidates, torch.tensor([2, 3], device=DEVICE)))
    torch.library.opcheck(select_topk_op, (logits.T, 2, None, None))
    torch.library.opcheck(select_where_op, (logits, 0.5, True, candidates))
    torch.library.opcheck(select_where_op, (logits.T, 0.5, False, None))


@pytest.mark.parametrize(
    ("score", "topk", "reason"),
    [
        (torch.zeros(1, 4, dtype=torch.bfloat16), True, "bfloat16"),
        (torch.zeros(1, 4, dtype=torch.float64), False, "float64"),
        (torch.zeros(0, 4), True, "no tokens"),
        (torch.zeros(1, LONGEST + 1), True, "do not fit"),
        (torch.zeros(ROWS + 1, 1), False, "rows"),
        (torch.zeros(1, 4, device="meta"), True, "meta"),
    ],
)
def test_where_the_kernel_does_not_apply_the_reference_runs(score: Tensor, topk: bool, reason: str) -> None:
    assert reason in str(applies(score, topk=topk))
    chosen = select_topk(score, 1) if topk else select_where(score, 0.0, inclusive=True)
    assert chosen.mask.shape == score.shape


def test_k_is_checked() -> None:
    with pytest.raises(InputError, match="k is 5, and a row has 4 tokens"):
        select_topk(torch.zeros(1, 4), 5)


def test_compiled_for_hopper() -> None:
    """No stack, hence no spills; 16 bytes a load where tokens lie side by side; no atomics."""
    module, flags = "depthc.codegen.kernels.select.kernel", {"HAS_CANDIDATES": True, "candidates_token": 1}
    outputs = {"mask": "*i1", "fine": "*i1", "S": "i32 even", "candidates": "*i1", "candidates_row": "i32 even"}
    topk = {
        "logits": "*fp32",
        "wanted": "*i64",
        "positions": "*i64",
        "valid": "*i1",
        "inverse": "*i32",
        "k": "i32 even",
    }
    where = {"score": "*fp32", "counts": "*i32", "number": "fp32", "score_row": "i32 even"}
    pack = {"mask": "*i1", "counts": "*i32", "cu_seqlens": "*i32", "places": "*i64", "inverse": "*i32"}
    sizes = [
        {"HAS_WANTED": True, "BLOCK": block, "STEP": 2048, "logits_token": 1, **flags} for block in (2048, LONGEST)
    ]
    builds = [("topk_kernel", {**topk, **outputs, "logits_row": "i32 even"}, size) for size in sizes]
    builds.append(("where_kernel", {**where, **outputs}, {"RULE": "above", "BLOCK": 2048, "score_token": 1, **flags}))
    builds.append(("pack_kernel", {**pack, "B": "i32", "S": "i32 even"}, {"ROWS": ROWS, "BLOCK": 2048}))
    named = [dict(zip(("kernel", "types", "constants"), build, strict=True)) for build in builds]
    for found in built([{"module": module, "options": {"num_warps": 4}, **build} for build in named]):
        assert found["STACK"] == found["LOCAL"] == found["ld.local"] == found["st.local"] == 0, found
        assert found["atom.global"] == found["atom.shared"] == found["red.global"] == 0, found
        assert found["ld.global.v4"] > 0, found
