"""Keep schedules: layers on a given share of the tokens, judged by an oracle that goes token by token in fp64."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from oracles import Wide
from oracles import mod as oracle
from torch import Tensor, nn

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.ir.errors import IncrementalError, RecipeError
from depthc.ir.evaluate import run
from depthc.passes.keep import Keep
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of
from depthc.runtime.telemetry import report

from .models import Spec, Stacked, ids, seeded, stack_program
from .routed import (
    FORWARD,
    ROWS,
    assert_same_gradients,
    captured,
    changed_last,
    counted,
    documents_of,
    forward,
    logits_of,
    stepped,
)
from .routed import weighted as scalar

CAPACITIES = (1.0, 0.7, 1.0, 1.0, 0.4, 0.7, 0.1, 1.0)
FALLING = (1.0, 1.0, 0.9, 0.7, 0.7, 0.4, 0.1, 0.1)


class Case:
    """One schedule of one model: the oracle's answer, and the compiler's."""

    def __init__(self, kind: str, rows: str = "full", causal: bool = False, **options: Any) -> None:
        self.model, program, self.inputs = captured(kind, rows)
        self.kind, self.real, self.documents = kind, ROWS[rows], documents_of(rows)
        self.causal, self.options = causal, options
        self.capacities = options.setdefault("capacities", FALLING if options.get("nested") else CAPACITIES)
        self.settings = oracle.Settings(
            tuple(None if c == 1 else c for c in self.capacities),
            f="off",
            per=options.get("per", "row"),
            nested=options.get("nested", False),
            causal=causal,
        )
        self.program = run_recipe(program, recipe_of(Keep(**options), {}))[0]
        self.compiled: DepthModule = lower(self.program)

    def scorers(self) -> list[Any]:
        """One a layer that leaves tokens out; the oracle compares with zero where it does not rank."""
        kind, least = self.options.get("score", "norm"), self.options.get("threshold") or 0.0
        places = torch.arange(self.real.shape[1]).expand(self.real.shape)
        tables = {"last": places, self.token: self.inputs[self.token]}
        one = tables[kind].double() - least if kind in tables else lambda x: x.norm() - least
        return [one] * len(self.settings.routed)

    @property
    def token(self) -> str:
        return oracles.token_input(self.kind)


def agree(case: Case) -> None:
    """Forward, choices, and every gradient."""
    with Wide():
        math = oracles.math_of(case.kind, case.model)
        expected = oracle.route(math, case.settings, case.scorers(), case.inputs, case.real, case.documents)
    logits, aux = forward(case.compiled, case.inputs, case.causal)
    assert (logits[case.real] - expected.logits[case.real]).abs().max() < FORWARD
    assert [(route.loop, route.recursion) for route in aux.routes] == [("keep", n) for n in case.settings.routed]
    candidates = case.real
    for route, chosen in zip(aux.routes, expected.selected, strict=True):
        assert torch.equal(route.chosen, chosen)
        assert torch.equal(route.candidates, candidates)
        candidates = chosen if case.settings.nested else case.real
    assert aux.loss is None
    shared = {n: p for n, p in case.model.named_parameters() if p.requires_grad}
    found, wanted = scalar(logits, case.real), scalar(expected.logits, case.real)
    assert_same_gradients(found, shared, wanted, list(shared.values()))


OTHERS = [kind for kind in oracles.KINDS if kind != "llama"]
EVERY = [*OTHERS, "encoder"]
SCORES = ["norm", "last", "input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_scores(score: str, nested: bool) -> None:
    agree(Case("llama", "padded", score=score, nested=nested))


@pytest.mark.slow
@pytest.mark.parametrize("per", ["row", "document"])
def test_packed_rows(per: str) -> None:
    """Documents do not see each other, and compete with each other or not."""
    agree(Case("llama", "packed", per=per, nested=per == "document"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "nested"),
    [
        *((kind, bool(at % 2)) for at, kind in enumerate(EVERY)),
        pytest.param("relative_encoder", False, marks=pytest.mark.thorough),
    ],
)
def test_other_architectures(kind: str, nested: bool) -> None:
    agree(Case(kind, "padded", nested=nested))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"threshold": 3.5}, {"threshold": 3.0, "nested": True}, {"score": "input_ids", "threshold": 8}],
    ids=str,
)
def test_thresholds(options: dict[str, Any]) -> None:
    case = Case("llama", "padded", causal=True, **options)
    agree(case)
    chosen = [
        tokens.mask for name, tokens in forward(case.compiled, case.inputs, True)[1].taps.items() if "cho" in name
    ]
    assert any(mask.any() and (case.real & ~mask).any() for mask in chosen)


@pytest.mark.slow
def test_evaluate_is_the_module() -> None:
    case = Case("llama", "padded", nested=True)
    for training in (True, False):
        case.compiled.train(training)
        with Wide():
            one = logits_of(run(case.compiled.program, (), case.inputs, training=training))
            assert torch.equal(one, logits_of(case.compiled(**case.inputs)))
    assert depthc.parse(str(case.program), case.program.weights) == case.program


@pytest.mark.slow
def test_all_tokens_is_the_program_itself() -> None:
    _, program, _ = captured("llama", "full")
    assert run_recipe(program, recipe_of(Keep((1.0,) * 8), {}))[0] is program
    assert not lower(Case("llama").program).new_parameters()


def test_telemetry_of_nested_choices() -> None:
    case = Case("llama", "padded", nested=True)
    found = report(forward(case.compiled, case.inputs, False)[1])
    assert found.tokens == case.real.sum()
    assert sum(depth * count for depth, count in enumerate(found.tokens_per_depth)) == sum(found.chosen)
    assert "mean depth" in str(found)
    assert forward(case.compiled, case.inputs, False)[1].taps["score.keep.2"].shape == case.real.shape


@pytest.mark.slow
def test_rows_that_reach_every_product() -> None:
    case = Case("llama")
    forward(case.compiled, case.inputs, False)  # what is traced is not counted
    seen = counted(lambda: forward(case.compiled, case.inputs, False), case.model)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert seen[name] == [2 * max(1, int(c * 9)) for c in CAPACITIES], name


# causality


def test_without_a_threshold_later_tokens_decide() -> None:
    """The same tokens in training and in inference; token by token it is refused."""
    case = Case("llama")
    changed = changed_last("llama", case.inputs)
    (before, _), (after, _) = (forward(case.compiled, inputs, True) for inputs in (case.inputs, changed))
    assert torch.equal(before, forward(case.compiled, case.inputs, False)[0])
    assert (before[:, :-1] - after[:, :-1]).abs().max() > 1e-6
    with pytest.raises(IncrementalError, match="compares tokens with later ones") as caught:
        case.program.start(**case.inputs)
    assert "causal rule" in caught.value.remedy
    with pytest.raises(IncrementalError, match="compares tokens"):
        depthc.generate(case.compiled, case.inputs["input_ids"], 3)
    with pytest.raises(IncrementalError):
        Case("llama", score="last").program.start(**case.inputs)


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
def test_token_by_token_is_the_whole_sequence(kind: str) -> None:
    case = Case(kind, "padded", causal=True, threshold=3.5)
    with torch.no_grad():
        whole, aux = forward(case.compiled, case.inputs, True)
    parts, past = stepped(kind, case.compiled.program, case.inputs)
    assert (parts - whole)[case.real].abs().max() < FORWARD
    lengths = [int(route.chosen.sum(1).max()) for route in aux.routes]
    counts = [*filter(None, lengths), *[9] * (8 - len(lengths))]  # where there is no token, there is no cache
    assert sorted(kept.keys.count for kept in past.caches.values()) == sorted(counts)


class Weighed(nn.Module):
    """A model with an argument that only says how important tokens are."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stacked(Spec(depth=2))

    def forward(self, ids: Tensor, importance: Tensor) -> Tensor:
        return self.stack(ids)


@pytest.mark.slow
def test_an_argument_that_the_model_does_not_read() -> None:
    model, importance = seeded(Weighed), torch.tensor([[5, 1, 4, 2, 3], [1, 2, 3, 4, 5]])
    keep = Keep((0.4, 1.0), score="importance")
    compiled = depthc.compile(model, keep, args=(ids(), importance)).train()
    chosen = compiled.forward_with_aux(ids(), importance)[1].routes[0].chosen
    assert chosen.tolist() == [[True, False, True, False, False], [False, False, False, True, True]]
    chosen = compiled.forward_with_aux(ids(1, 3), torch.tensor([[3, 9, 1]]))[1].routes[0].chosen
    assert chosen.tolist() == [[False, True, False]]


# bad inputs


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"capacities": ()}, "no capacities", "capacities="),
        ({"capacities": (1.0, 0.0)}, "no capacities", "capacities="),
        ({"capacities": (1.0, 1.5)}, "no capacities", "capacities="),
        ({"capacities": (0.5, 1.0), "nested": True}, "no capacities", "capacities="),
        ({"capacities": 0.5}, "no capacities", "capacities="),
        ({"capacities": (1.0, 0.5, 0.5)}, "do not fit the stack", "one capacity a layer"),
        ({"capacities": (1.0, 0.5), "score": "nrm"}, "no such score", "'norm'"),
        ({"capacities": (1.0, 0.5), "score": "last", "threshold": 1.0}, "the last", 'score="norm"'),
        ({"capacities": (1.0, 0.5), "threshold": "high"}, "'threshold'", "threshold="),
        ({"capacities": (1.0, 0.5), "threshold": float("nan")}, "'threshold'", "threshold="),
        ({"capacities": (1.0, 0.5), "per": "document"}, "keep documents apart", 'per="row"'),
        ({"capacities": (1.0, 0.5), "nested": 1.5}, "'nested'", "use"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        depthc.compile(stack_program(2), Keep(**options))
    assert remedy in caught.value.remedy


def test_capacities_must_be_given() -> None:
    with pytest.raises(RecipeError, match="needs the option 'capacities'"):
        depthc.compile(seeded(Stacked), "keep", args=(ids(),))
