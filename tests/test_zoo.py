"""The zoo's own tools, and the architectures that differ most in kind: every check, from capture to a training step."""

from collections.abc import Callable

import pytest
import torch
import zoo
import zoo_recipes
import zoo_routes
import zoo_step
import zoo_table
from architectures import CI
from torch import Tensor
from zoo_checks import Unmet

import depthc
from depthc.codegen.aux import Aux
from depthc.ir.errors import RecipeError
from depthc.ir.tokens import TokenSet

from .models import Hybrid, Spec, Stacked, ids, seeded
from .optional import rest_needs_torch_mlir

ALIKE = {
    "bart",
    "bloom",
    "falcon",
    "gemma2",
    "deepseek_v2",
    "olmoe",
    "nanogpt",
    "bert",
    "t5",
    "albert",
}  # as other rows


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.thorough] * (n in ALIKE)) for n in CI])
def test_row_has_no_failure(name: str) -> None:
    row = zoo.run_row(name, limit=600)
    expected = {"captured", "same", "other", "replay", "subset", "eval", "train", "text", "mlir", *zoo_table.RECIPES}
    assert expected <= row["checks"].keys()
    last = {"mlir": row["checks"].pop("mlir")}
    assert not zoo.failures(row)
    rest_needs_torch_mlir()
    assert not zoo.failures({**row, "checks": last})


def test_checks_run_alone_leave_the_others_as_they_were() -> None:
    def row(captured: str, mor: str, seconds: float) -> dict:
        return {
            "stopped": None,
            "seconds": seconds,
            "checks": {"captured": {"status": captured}, "mor": {"status": mor}},
        }

    assert zoo.merged(row("refused", "skipped", 9.0), row("ok", "ok", 4.0), ["mor"]) == row("ok", "ok", 9.0)
    assert zoo.merged(row("ok", "ok", 9.0), row("failed", "skipped", 4.0), ["mor"]) == row("failed", "skipped", 9.0)
    assert zoo.merged(row("ok", "ok", 9.0), row("ok", "failed", 4.0), []) == row("ok", "failed", 4.0)


def test_programs_and_recipes_have_a_table_each() -> None:
    checks = {"lines": {"status": "ok", "value": 9}, "mor": {"status": "refused", "reason": "it scans"}}
    row = {"kind": "ssm", "held_out": False, "stopped": None, "checks": checks}
    text = zoo_table.table({"command": "zoo", "versions": {}, "rows": {"one": row}})
    assert "| one | ssm |" + " - |" * 11 + " 9 | - |\n" in text
    assert "| one | ssm | refused [1] | - | - |\n\n1. it scans" in text
    assert "`mor` 1 refused; `mor_token` none" in text


def run(check: Callable[..., str], model: torch.nn.Module) -> str:
    return check(depthc.capture(model, (ids(2, 9),)), model, (ids(2, 9),), {})


def stack(depth: int = 4) -> Stacked:
    return seeded(lambda: Stacked(Spec(depth=depth)))


RECIPES = pytest.mark.parametrize("check", [zoo_recipes.mor, zoo_recipes.mor_token, zoo_recipes.mod])


@pytest.mark.slow
@pytest.mark.parametrize("check", [zoo_recipes.mor, zoo_recipes.mor_token])
@pytest.mark.parametrize(
    ("depth", "title"), [(2, "cycle x2"), (3, "cycle x3"), pytest.param(5, "middle_cycle x3", marks=pytest.mark.slow)]
)
def test_loops_follow_the_depth(check: Callable[..., str], depth: int, title: str) -> None:
    assert run(check, stack(depth)).startswith(f"{title}, identity ")


@pytest.mark.slow
def test_layers_that_attend_are_routed_where_others_cannot_be() -> None:
    """By what they are: in the first model every other layer may be routed, in the second those two."""
    assert run(zoo_recipes.mod, stack()).startswith("layers 1, 3, identity ")
    assert run(zoo_recipes.mod, seeded(Hybrid)).startswith("layers 1, 4, identity ")
    with pytest.raises(RecipeError, match="cannot run on a subset"):
        run(zoo_recipes.mor, seeded(Hybrid))


@pytest.mark.slow
@RECIPES
def test_a_step_that_does_not_help_is_a_failure(check: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_step, "PROMISES", (0.0,))
    with pytest.raises(Unmet, match="the loss went"):
        run(check, stack())


@pytest.mark.slow
def test_a_step_is_shorter_where_it_changes_a_choice_and_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uphill no step helps: the second is taken where the first has changed a choice, and only there."""
    lengths: list[float] = []
    descend = zoo_step._descend

    def recorded(held: dict, less: float) -> None:
        lengths.append(less)
        descend(held, less)

    monkeypatch.setattr(zoo_step, "_descend", recorded)
    for first, steps in ((-10.0, 2), (-1e-6, 1)):
        monkeypatch.setattr(zoo_step, "PROMISES", (first, -1e-6))
        lengths.clear()
        with pytest.raises(Unmet, match="the loss went"):
            run(zoo_recipes.mod, stack())
        assert len(lengths) == steps


@pytest.mark.slow
def test_an_identity_that_is_none_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_recipes, "with_scores", lambda program, _: program)
    monkeypatch.setattr(zoo_recipes, "_bias_to_full_depth", lambda module: None)
    for check in (zoo_recipes.mod, zoo_recipes.mor_token):
        with pytest.raises(Unmet, match="the identity differs"):
            run(check, stack())


def chosen(*rows: list[int]) -> Aux:
    """Routes of which each chose the tokens of these positions among those of the one before, by falling logits."""
    among, taps = torch.ones(1, 8, dtype=torch.bool), dict[str, object]()
    for r, positions in enumerate(rows):
        mask = torch.zeros(1, 8, dtype=torch.bool)
        mask[0, positions] = True
        sets = {"logit": -torch.arange(8.0)[None], "candidates": TokenSet(among), "chosen": TokenSet(mask)}
        taps |= {f"route.r.{r}.{name}": value for name, value in sets.items()}
        among = mask
    return Aux(taps)


def test_routes_are_those_of_the_recipe() -> None:
    zoo_routes.check_shares(chosen(list(range(8)), [0, 1, 2, 3]))
    for wrong in ([0, 1, 2], [0, 1, 2, 4], [0, 1, 2, 3, 4]):
        with pytest.raises(Unmet, match="place 1 chose"):
            zoo_routes.check_shares(chosen(list(range(8)), wrong))
    zoo_routes.check_layers(chosen([0]), (0,))
    for routes, layers in ((chosen([1]), (0,)), (chosen([0]), (1,)), (chosen([0], [0]), (0, 1))):
        with pytest.raises(Unmet, match="chose"):
            zoo_routes.check_layers(routes, layers)


@pytest.mark.slow
def test_depths_are_those_that_the_router_says() -> None:
    model = stack()
    subject = zoo_step.Subject(depthc.capture(model, (ids(2, 9),)), model, (ids(2, 9),), {})
    module = subject.lowered(zoo_recipes.looped("mor_token", subject.program)[0])
    _, aux = subject.loss(module)
    zoo_routes.check_depths(aux, module, subject)
    with torch.no_grad():
        module.parameter_of("depth.r.router.weight").neg_()
    with pytest.raises(Unmet, match="chose to go as deep"):
        zoo_routes.check_depths(aux, module, subject)


@pytest.mark.slow
def test_a_router_that_learns_nothing_is_a_failure_unless_the_loss_reads_none_of_its_tokens() -> None:
    model, layers = stack(), (1, 3)
    subject = zoo_step.Subject(depthc.capture(model, (ids(2, 9),)), model, (ids(2, 9),), {})
    program = zoo_routes.with_streams(subject.rewritten(depthc.Recipe.parse(f"mod(layers={layers})")), layers)
    module = subject.module(program)
    out, aux = module.forward_with_aux(*subject.args)
    left_out = ~aux.routes[-1].chosen
    losses: dict[tuple[int, ...], Tensor] = {(): out.square().sum(), (3,): out[left_out].square().sum()}
    for unread, loss in losses.items():
        assert tuple(zoo_routes.unread_layers(loss, aux)) == unread
        zoo_routes.check_routers(module, loss, [f"depth.mod.{n}.router.weight" for n in unread])
    with pytest.raises(Unmet, match="no gradient of the loss at"):
        zoo_routes.check_routers(module, losses[(3,)])
