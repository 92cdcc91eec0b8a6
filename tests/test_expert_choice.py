"""Options of expert choice beyond the defaults: MLP routers, auxiliary routers, warm-up of capacities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depthc
from depthc.codegen.module import DepthModule
from depthc.ir.errors import RecipeError
from depthc.ir.evaluate import run
from depthc.ir.program import Block
from depthc.ir.rows.run import run_rows
from depthc.ir.selection import STAGES

from .models import ids, stack_program


def make(**options: object) -> DepthModule:
    return depthc.compile(stack_program(8), "mor", std=1.0, **options)


# warm-up


def counts(module: DepthModule) -> list[int]:
    """Tokens that every recursion chose, of 16 in a row."""
    aux = module.forward_with_aux(ids(2, 16))[1]
    return [int(route.chosen[0].sum()) for route in aux.routes]


@pytest.mark.slow
def test_capacities_warm_up_along_a_cosine_in_stages() -> None:
    module = make(warmup=320).train()
    assert counts(module) == [16, 16, 16]
    seen = []
    for step in range(0, 400, 10):
        module.set_step(step)
        stage = min(STAGES, step * STAGES // 320)
        warm = (1 + math.cos(math.pi * stage / STAGES)) / 2
        expected = [max(1, int((c + (1 - c) * warm) * 16)) for c in (1.0, 2 / 3, 1 / 3)]
        assert counts(module) == expected, step
        seen.append(expected)
    assert seen[-1] == [16, 10, 5]
    assert len({tuple(s) for s in seen}) > 5


def test_the_step_is_what_evaluate_is_told() -> None:
    module = make(warmup=100).train()
    module.set_step(57)
    told = run(module.program, (ids(2, 16),), {}, training=True, step=57)
    assert torch.equal(module(ids(2, 16)), told)
    assert not torch.equal(told, run(module.program, (ids(2, 16),), {}, training=True))


@pytest.mark.slow
def test_the_step_is_saved(tmp_path: Path) -> None:
    module, other = make(warmup=100).train(), make(warmup=100).train()
    module.set_step(57)
    other.load_state_dict(module.state_dict())
    assert counts(other) == counts(module) != counts(make(warmup=100).train())
    depthc.save(module, tmp_path / "saved")
    assert counts(depthc.load(tmp_path / "saved").train()) == counts(module)


@pytest.mark.slow
def test_the_step_is_read_where_a_module_around_loads() -> None:
    module, other = (nn.ModuleList([make(warmup=100).train()]) for _ in range(2))
    module[0].set_step(57)
    other.load_state_dict(module.state_dict())
    assert counts(other[0]) == counts(module[0])


def test_a_module_without_a_schedule_takes_no_notice_of_steps() -> None:
    module = make().train()
    before = counts(module)
    module.set_step(5)
    assert counts(module) == before
    assert "depth.step" not in module.state_dict()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_steps_of_a_stage_compile_once() -> None:
    torch.compiler.reset()
    module = make(warmup=320).train()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, backend=backend)
    made = []
    for step in (100, 101, 102, 103):
        module.set_step(step)
        compiled(ids(2, 16))
        made.append(len(graphs))
    assert made[1:] == [made[1]] * 3


# routers


def test_an_mlp_router_stays_fp32_under_autocast() -> None:
    """That of the first recursion, which reads the embeddings: they are the same with autocast and without."""
    module = make(router="mlp", sharing="cycle", loops=2).train()
    assert {n.rsplit("router.", 1)[1] for n in module.new_parameters()} == {"up.weight", "down.weight"}
    plain = module.forward_with_aux(ids(2, 9))[1].routes
    with torch.autocast("cpu", torch.bfloat16):
        cast = module.forward_with_aux(ids(2, 9))[1].routes
    assert all(route.logit.dtype == torch.float32 for route in cast)
    assert torch.equal(cast[0].logit, plain[0].logit)
    assert not torch.equal(cast[1].logit, plain[1].logit)


def test_an_auxiliary_router_sends_no_gradient_into_the_stream() -> None:
    module = make(auxiliary=1.0, loss=0.0).train()
    aux = module.forward_with_aux(ids(2, 9))[1]
    assert set(aux.losses) == {f"r.{r}.judge" for r in range(3)}
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(aux.loss, list(named.values()), allow_unused=True)
    moved = {n for n, g in zip(named, grads, strict=True) if g is not None and g.abs().max() > 0}
    assert moved == {f"depth.r.{r}.judge.weight" for r in range(3)}


def test_the_auxiliary_router_decides_in_inference_alone() -> None:
    module = make(auxiliary=1.0)
    before = counts(module.train())
    with torch.no_grad():
        for r in range(3):
            module.parameter_of(f"depth.r.{r}.judge.weight").zero_()
    assert counts(module.train()) == before
    assert counts(module.eval()) == [16, 0, 0]
    with torch.no_grad():
        module.parameter_of("depth.r.1.router.weight").zero_()
    assert counts(module.eval()) == [16, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "wide"}, "'router'"),
        ({"warmup": -1}, "'warmup'"),
        ({"warmup": 10.0}, "'warmup'"),
        ({"auxiliary": -1.0}, "'auxiliary'"),
        ({"z_loss": float("nan")}, "'z_loss'"),
        ({"loss": True}, "'loss'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        make(**options)
    assert caught.value.remedy


def test_routers_stay_fp32_under_autocast_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    module, tokens = make(router="mlp").eval(), ids(2, 6)
    lengths = []

    def judged(block: Block, carries: list[Tensor], *rest: Any, **options: Any) -> Any:
        found = run_rows(block, carries, *rest, **options)
        if block.name == "router":
            with torch.autocast("cpu", enabled=False):
                ((exact,), _) = run_rows(block, [carry.float() for carry in carries], *rest, **options)
            assert torch.equal(found[0][0], exact)
            lengths.append(exact.shape[1])
        return found

    monkeypatch.setattr("depthc.ir.steps.run_rows", judged)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, past = module.program.start(tokens[:, :4])
        module.program.step(past, tokens[:, 4:])
    assert lengths == [4] * 3 + [2] * 3
