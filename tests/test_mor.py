"""Mixture-of-Recursions, judged by an independent oracle that goes token by token in fp64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import oracles
import pytest
import torch
from oracles import Wide, expert
from oracles.expert import Settings
from torch import Tensor

from depthc.codegen.module import DepthModule, lower
from depthc.ir.errors import RecipeError
from depthc.ir.evaluate import run
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of

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
    weighted,
)


class Case:
    """One way to route one model: the oracle's answer, and the compiler's."""

    def __init__(
        self, kind: str, rows: str = "full", zero_routers: bool = False, step: int = 0, **settings: Any
    ) -> None:
        self.model, program, self.inputs = captured(kind, rows)
        self.kind, self.settings = kind, Settings(**settings)
        self.real = ROWS[rows]
        self.documents = documents_of(rows)
        self.step = step
        same = {k: v for k, v in settings.items() if k not in ("causal", "aux", "z")}
        weights = {"auxiliary": float(self.settings.aux), "z_loss": self.settings.z}
        recipe = recipe_of("mor", {**same, **weights})
        self.program, self.history = run_recipe(program, recipe)
        self.compiled: DepthModule = lower(self.program)  # its parameters are the model's own
        self.compiled.set_step(step)
        self.routers = expert.make_routers(self.settings)
        self.judges = expert.make_routers(self.settings, seed=9) if self.settings.aux else []
        with torch.no_grad():
            for theirs, ours in self.router_weights():
                theirs.mul_(0 if zero_routers else 1)
                ours.copy_(theirs.view_as(ours))

    def router_weights(self) -> list[tuple[Tensor, Tensor]]:
        """Every weight of a router, of the oracle and of the compiled module."""
        return [
            (weight, self.compiled.parameter_of(f"depth.r.{r}.{name}.{slot if slot == 'weight' else f'{slot}.weight'}"))
            for name, routers in (("router", self.routers), ("judge", self.judges))
            for r, router in enumerate(routers)
            for slot, weight in router.items()
        ]

    def expected(self, inputs: Mapping[str, Tensor] | None = None) -> expert.Result:
        math = oracles.math_of(self.kind, self.model)
        with Wide():
            return expert.route(
                math,
                self.settings,
                self.routers,
                inputs or self.inputs,
                self.real,
                self.documents,
                aux=self.judges,
                step=self.step,
            )

    def found(self, inputs: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Any]:
        return forward(self.compiled, inputs or self.inputs, self.settings.causal)

    def leaves(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The parameters and routers, of the oracle and of the compiled module."""
        shared = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        theirs, ours = zip(*self.router_weights(), strict=True)
        return [*shared.values(), *theirs], shared | {f"router {i}": weight for i, weight in enumerate(ours)}


def agree(case: Case, backward: bool = True) -> None:
    """Forward, selections, loss and every gradient."""
    expected = case.expected()
    logits, aux = case.found()
    assert (logits[case.real] - expected.logits[case.real]).abs().max() < FORWARD
    for route, chosen in zip(aux.routes, expected.selected, strict=True):
        assert torch.equal(route.chosen, chosen)
    if aux.loss is not None:
        assert (aux.loss - expected.loss).abs() < FORWARD
    if not backward:
        return
    theirs, ours = case.leaves()
    wanted, found = weighted(expected.logits, case.real) + expected.loss, weighted(logits, case.real) + aux.loss
    routers = torch.autograd.grad(wanted, theirs[-len(case.router_weights()) :], retain_graph=True)
    assert any(g.abs().max() > 1e-6 for g in routers)
    assert_same_gradients(found, ours, wanted, theirs)


KV = ("recursion", "share_first", "update")


OTHERS = [kind for kind in oracles.KINDS if kind != "llama"]
EVERY = [*OTHERS, "encoder"]


@pytest.mark.parametrize("rows", ["full", "padded"])
@pytest.mark.parametrize("kv", KV)
def test_top_k_is_the_oracle(kv: str, rows: str) -> None:
    agree(Case("llama", rows, kv=kv))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kv", "rows"),
    [
        *((kind, kv, "padded") for kind in EVERY for kv in KV if kv != "update" or kind == "parallel"),
        *(pytest.param(kind, "recursion", "full", marks=pytest.mark.thorough) for kind in EVERY),
        pytest.param("relative_encoder", "recursion", "padded", marks=pytest.mark.thorough),
    ],
)
def test_top_k_on_other_architectures(kind: str, kv: str, rows: str) -> None:
    agree(Case(kind, rows, kv=kv))


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["padded", "packed"])
@pytest.mark.parametrize("kv", KV)
def test_threshold_is_the_oracle(kv: str, rows: str) -> None:
    agree(Case("llama", rows, kv=kv, causal=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv", "rows"),
    [("recursion", "padded"), pytest.param("share_first", "packed", marks=pytest.mark.thorough)],
)
@pytest.mark.parametrize("kind", EVERY)
def test_threshold_on_other_architectures(kind: str, kv: str, rows: str) -> None:
    agree(Case(kind, rows, kv=kv, causal=True), backward=rows == "padded")


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["weighted", "additive", "delta", "off"])
@pytest.mark.parametrize("gate", ["sigmoid", "tanh", "none"])
def test_combines_and_gates(combine: str, gate: str) -> None:
    if gate != "sigmoid" and combine in ("additive", "off"):
        pytest.skip("without a gate")
    agree(Case("llama", "padded", combine=combine, gate=gate))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"sharing": "cycle", "loops": 2},
        {"sharing": "cycle", "loops": 4, "kv": "share_first"},
        {"loops": 2, "capacities": (0.7, 0.4)},
        {"loops": 6, "capacities": (1.0, 0.9, 0.9, 0.2, 0.2, 0.01)},
        {"temperature": 2.5, "loss": 1.0},
        {"router": "mlp", "z": 0.3},
        {"router": "mlp", "aux": True, "loss": 0.5},
        {"aux": True, "kv": "update", "z": 0.1},
        {"warmup": 64, "step": 20},  # in stages of four steps
    ],
)
def test_other_settings(settings: dict[str, Any]) -> None:
    agree(Case("llama", "padded", **settings))


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_auxiliary_routers_decide_in_inference(router: str) -> None:
    agree(Case("llama", "padded", router=router, aux=True, causal=True))


@pytest.mark.slow
@pytest.mark.parametrize("kv", KV)
def test_each_document_chooses_for_itself(kv: str) -> None:
    agree(Case("llama", "packed", kv=kv, per="document"))


@pytest.mark.slow
def test_documents_of_one_token_are_chosen() -> None:
    agree(Case("llama", "packed", per="document", capacities=(0.5, 0.2, 0.1)))


def test_choosing_per_document_needs_documents() -> None:
    with pytest.raises(RecipeError, match="keep documents apart") as caught:
        Case("post_norm", "full", per="document")
    assert "packed" in caught.value.remedy


@pytest.mark.slow
def test_ties_go_to_the_lower_position() -> None:
    case = Case("llama", zero_routers=True)
    _, aux = case.found()
    for route in aux.routes:
        count = int(route.chosen[0].sum())
        assert route.chosen[:, :count].all()
        assert not route.chosen[:, count:].any()
    expected = case.expected()
    assert all(torch.equal(r.chosen, chosen) for r, chosen in zip(aux.routes, expected.selected, strict=True))


@pytest.mark.slow
def test_packed_rows_choose_per_row() -> None:
    agree(Case("llama", "packed"))


@pytest.mark.slow
@pytest.mark.parametrize("kv", KV)
def test_evaluate_is_the_module(kv: str) -> None:
    """The program's meaning, op by op, and the lowered module: forward and all gradients, bit for bit."""
    case = Case("llama", "padded", kv=kv)
    for training in (True, False):
        case.compiled.train(training)
        with Wide():
            one = logits_of(run(case.compiled.program, (), case.inputs, training=training))
            other = logits_of(case.compiled(**case.inputs))
        assert torch.equal(one, other)
        _, leaves = case.leaves()
        of = tuple(leaves.values())
        grads = [torch.autograd.grad(weighted(x, case.real), of, allow_unused=True) for x in (one, other)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True) if a is not None)


def test_a_carry_that_takes_no_gradient() -> None:
    """With frozen embeddings the first carry does not require grad; all other gradients are the same."""
    case = Case("llama", sharing="cycle", loops=2)
    embedding = case.model.get_input_embeddings().weight
    named = {n: p for n, p in case.compiled.named_parameters() if p is not embedding}
    free = torch.autograd.grad(weighted(case.found()[0], case.real), list(named.values()), allow_unused=True)
    embedding.requires_grad_(False)
    try:
        frozen = torch.autograd.grad(weighted(case.found()[0], case.real), list(named.values()), allow_unused=True)
    finally:
        embedding.requires_grad_(True)
    for name, a, b in zip(named, free, frozen, strict=True):
        assert (a is None and b is None) or torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize("kv", KV)
def test_a_later_token_changes_nothing_before_it(kv: str) -> None:
    case = Case("llama", kv=kv, causal=True)
    changed = changed_last("llama", case.inputs)
    (before, aux), (after, other) = case.found(), case.found(changed)
    assert (before[:, :-1] - after[:, :-1]).abs().max() < FORWARD
    assert (before[:, -1] - after[:, -1]).abs().max() > 1e-3
    for a, b in zip(aux.routes, other.routes, strict=True):
        assert torch.equal(a.chosen[:, :-1], b.chosen[:, :-1])
    case.settings = Settings(kv=kv)
    assert (case.found()[0][:, :-1] - case.found(changed)[0][:, :-1]).abs().max() > 1e-6  # top-k is not causal


STEPPED = [*(("llama", kv) for kv in KV), *((k, kv) for k in OTHERS for kv in KV if kv == KV[0] or k == "parallel")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kv"), [pytest.param(*case, marks=[] if case[0] == "llama" else pytest.mark.slow) for case in STEPPED]
)
def test_token_by_token_is_the_whole_sequence(kind: str, kv: str) -> None:
    case = Case(kind, "padded", kv=kv, causal=True)
    whole, aux = case.found()
    logits, past = stepped(kind, case.compiled.program, case.inputs)
    assert (logits - whole)[case.real].abs().max() < FORWARD
    if kv == "recursion":
        lengths = [int(r.chosen.sum(1).max()) for r in aux.routes]
        caches = [kept.keys.count for site, kept in past.caches.items() if "[" in site]
        assert sorted(set(caches)) == sorted(set(lengths))


# identity


@pytest.mark.slow
@pytest.mark.parametrize("kv", KV)
def test_everyone_without_a_gate_is_the_tied_model(kv: str) -> None:
    _, program, inputs = captured("llama", "full")
    tied = lower(run_recipe(program, recipe_of("tie", {"loops": 3, "sharing": "middle_cycle"}))[0]).eval()
    options = {"combine": "off", "capacities": (1.0, 1.0, 1.0), "kv": kv}
    routed = lower(run_recipe(program, recipe_of("mor", options))[0])
    with Wide():
        expected = tied(**inputs).logits
        for training in (True, False):
            found = routed.train(training)(**inputs).logits
            assert torch.equal(found, expected) or kv != "recursion"
            assert (found - expected).abs().max() < FORWARD or kv == "share_first"  # keys of recursion 0 alone


def test_one_recursion_without_a_gate_is_the_model() -> None:
    model, program, inputs = captured("llama", "full")
    routed = lower(run_recipe(program, recipe_of("mor", {"combine": "off", "loops": 1, "sharing": "cycle"}))[0])
    with Wide():
        assert torch.equal(routed.eval()(**inputs).logits, model(**inputs).logits)


# what is computed


@pytest.mark.parametrize("kv", KV)
def test_rows_that_reach_every_product(kv: str) -> None:
    """Of each recursion only the chosen tokens go through the layers' products; shared keys are projected once."""
    case = Case("llama", kv=kv, loops=3)
    case.found()  # what is traced is not counted
    seen = counted(case.found, case.model)
    batch, length = case.real.shape
    rows = [batch * max(1, int(c * length)) for c in (1, 2 / 3, 1 / 3)]
    for name in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert seen[name] == [batch * length, *(r for k in rows for r in [k, k]), batch * length], name
    for name in ("k_proj", "v_proj"):
        looped = [rows[0]] * 2 if kv == "share_first" else [r for k in rows for r in [k, k]]
        assert seen[name] == [batch * length, *looped, batch * length], name
