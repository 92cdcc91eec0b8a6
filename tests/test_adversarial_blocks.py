"""Which blocks run on a subset of their tokens: every illegal one is refused by the op at fault, no legal one is."""

import re

import pytest
import torch
from blocks import ILLEGAL, LEGAL, illegal_cases, legal_cases
from traced import LENGTH, inputs

from depthc.ir.axes.analysis import analyse
from depthc.ir.errors import SubsetError
from depthc.ir.rows.run import run_rows


@pytest.mark.parametrize("name", ILLEGAL)
def test_mixing_is_refused_by_the_op_that_mixes(name: str) -> None:
    _, op, axis = ILLEGAL[name]
    refusals = analyse(illegal_cases()[name].block).refusals
    first = refusals[0]
    assert re.search(op, first.op), refusals
    assert re.fullmatch(axis, first.axis), refusals
    assert "blocks.py" in first.source
    assert first.remedy


@pytest.mark.parametrize("name", LEGAL)
def test_legal_blocks_are_accepted(name: str) -> None:
    assert analyse(legal_cases()[name].block).refusals == ()


def test_all_refusals_are_collected_and_raised() -> None:
    case = illegal_cases()["expert_choice"]
    found = [r.op.split(".")[1] for r in analyse(case.block).refusals]
    assert found == ["topk", "gather", "scatter"]
    with pytest.raises(SubsetError) as caught:
        run_rows(case.block, [inputs()["h"][:, :3]], [], case.params)
    assert all(op in caught.value.found for op in found)
    assert "blocks.py" in caught.value.where
    assert caught.value.remedy


@pytest.mark.parametrize("name", [n for n in LEGAL if n not in ("causal_flag", "two_hops")])
def test_nothing_but_attention_moves_data(name: str) -> None:
    """Where every token may attend to itself alone, a change of one token changes no other, in no row of the batch."""
    case, feeds = legal_cases()[name], inputs()
    h = feeds.pop("h")
    feeds["mask"] = torch.full_like(feeds["mask"], -1e30).masked_fill(torch.eye(LENGTH, dtype=torch.bool), 0.0)
    changed = h.clone()
    changed[1, 4] += 1.0
    moved = (case.full(changed, **feeds) - case.full(h, **feeds)).abs().amax(-1) > 1e-9
    assert moved.nonzero().tolist() == [[1, 4]]
