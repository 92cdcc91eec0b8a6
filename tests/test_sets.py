"""Sets that no layer of a loop changes are chosen and counted in front of it; others where they stand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.codegen.sets import Tokens, count
from depthc.ir.errors import RoutingError
from depthc.ir.program import Loop, Merge, On, Op, Program, Select

from .models import Spec, Stacked, seeded
from .test_decode import Ops
from .test_evaluate import IDS, layers_of, made, rewritten, score_of

aten = torch.ops.aten


@pytest.fixture(scope="module")
def program() -> Program:
    return depthc.capture(seeded(lambda: Stacked(Spec(depth=2, dtype=torch.float64))), (IDS,))


def looped(program: Program, *body: Op) -> Program:
    """Three passes of one layer on the tokens of A, whose scores are taken before them."""
    first, second = layers_of(program)
    layer = replace(second, params=first.params, writes=("y",))
    run = (On("A", ("h",), ("y",), (layer,)), Merge("h", "h", "y", "A"))
    begin = (score_of("depth"), Select("A", "threshold(-0.5)", "depth"))
    return rewritten(program, *begin, Loop("r", 3, (*body, *run)))


def ops_of(module: DepthModule) -> list[str]:
    with Ops() as seen:
        module(IDS)
    return [name for name, _ in seen.seen]


@torch.no_grad()
@pytest.mark.parametrize("rule", ["atleast(r - 1)", "threshold([-inf, 0, 1][r])"])
def test_in_front_of_the_first_layer(program: Program, rule: str) -> None:
    routed = looped(program, Select("A", rule, "depth", "A"))
    module = lower(routed).eval()
    torch.testing.assert_close(module(IDS), routed.run(IDS), rtol=0, atol=1e-12)
    names = ops_of(module)
    judged = [at for at, name in enumerate(names) if name == "isnan"]  # once a choice
    assert max(judged) < names.index("native_layer_norm")  # the first layer's
    assert "nonzero" not in names


@torch.no_grad()
def test_scores_of_layers_are_waited_for(program: Program) -> None:
    """Some depend on the layer, and those among them; one that does not is the same in all passes."""
    body = (score_of("score"), Select("A", "threshold(-0.5)", "score", "A"), Select("B", "threshold(0.5)", "depth"))
    routed = looped(program, *body)
    module = lower(routed).eval()
    torch.testing.assert_close(module(IDS), routed.run(IDS), rtol=0, atol=1e-12)
    assert ops_of(module).count("nonzero") == 3


@torch.no_grad()
def test_passes_that_an_end_leaves_out_choose_nothing(program: Program) -> None:
    """In the second one a score would be refused, since it is no number."""
    first, second = layers_of(program)
    layer = replace(second, params=first.params)
    nan = made("nan", (aten.sum.dim_IntList, [-1]), (aten.exp.default,), (aten.neg.default,), (aten.sqrt.default,))
    stop, chosen = made("stop", (aten.lt.Scalar, float("inf"))), Select("A", "threshold([-inf, 0, 0][r])", "nan")
    routed = rewritten(program, nan, Loop("r", 3, (chosen, layer, stop), "stop"))
    torch.testing.assert_close(lower(routed).eval()(IDS), routed.run(IDS), rtol=0, atol=1e-12)
    with pytest.raises(RoutingError, match="not a number"):
        rewritten(program, nan, Loop("r", 3, (chosen, layer))).run(IDS)


def test_counts_are_found_together() -> None:
    masks = torch.rand(3, 4, 9) > torch.tensor([0.2, 0.5, 2.0])[:, None, None]
    masks = [*masks, torch.rand(1, 7) > 0.5]
    sets = [Tokens(mask) for mask in masks]
    with Ops() as seen:
        count([*sets, sets[0]])
        places = [one.places for one in sets]
    assert "nonzero" not in {name for name, _ in seen.seen}
    for one, mask, own in zip(sets, masks, places, strict=True):
        assert one.width == mask.sum(1).max()
        assert torch.equal(own, mask.flatten().nonzero()[:, 0])
        assert torch.equal(own, Tokens(mask).places)
