"""Training: under the Trainer, autocast, bf16, checkpointing of activations, and on two processes."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from oracles import expert
from processes import run_ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import depthc
from depthc.codegen.aux import Aux
from depthc.codegen.module import DepthModule, lower
from depthc.ir.errors import InputError
from depthc.ir.evaluate import run, select
from depthc.ir.program import Program
from depthc.ir.settle import settle
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of

from .models import Spec, Stacked, ids, seeded

KV = ("recursion", "share_first")
TOKENS = torch.randint(oracles.VOCAB, (8, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS[:2], "labels": TOKENS[:2]}
STEPS, RATE = 6, 1e-2


@cache
def llama() -> tuple[nn.Module, Program]:
    """A language model that returns its loss, and its program."""
    model = oracles.build("llama", layers=5, noise=0.05).float()
    return model, depthc.capture(model, kwargs=BATCH)


@cache
def stacked() -> Program:
    return depthc.capture(seeded(lambda: Stacked(Spec(depth=5, dtype=torch.float64))), (ids(2, 9),))


def routed(program: Program, **options: Any) -> DepthModule:
    """A mixture of recursions with parameters of its own, in training mode; what `depthc.compile` makes."""
    names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in BATCH]
    return lower(settle(run_recipe(program, recipe_of("mor", options))[0]), inspect.Signature(names)).train()


def flat(grads: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([g.double().flatten() for g in grads.values()])


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, of the whole tensor."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


# the Trainer


class Recorded:
    """A collator that remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        self.batches.append({name: torch.tensor([row[name] for row in rows]) for name in rows[0]})
        return self.batches[-1]


def trainer_of(module: nn.Module, folder: Path, collator: Recorded, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in TOKENS.tolist()]
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": RATE,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**settings | options)
    return Trainer(module, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)


def train_by_hand(module: DepthModule, batches: list[dict[str, Tensor]]) -> None:
    """What the Trainer is to do: AdamW on a falling rate, clipped; every loss is the mean over what is accumulated."""
    optimizer = torch.optim.AdamW(module.parameters(), RATE, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        for batch in batches[2 * step : 2 * step + 2]:
            out, aux = module.forward_with_aux(**batch)
            ((out.loss + aux.loss) / 2).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # the Trainer's newer name
def test_trainer_is_a_loop_by_hand(tmp_path: Path) -> None:
    module = routed(llama()[1], loss=1.0, std=0.5)
    module.add_losses = True
    mine, before = copy.deepcopy(module), copy.deepcopy(module.state_dict())
    trainer = trainer_of(module, tmp_path, collator := Recorded(), gradient_checkpointing=True)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])
    train_by_hand(mine, collator.batches)
    for name, weight in mine.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], weight, rtol=0, atol=1e-5, msg=name)
        assert (weight - before[name]).abs().max() > 1e-3, name  # routers as well
    assert set(mine.new_parameters()) < set(before)
    _evaluates(trainer, module)
    _saves(trainer, module, tmp_path / "saved")


def _evaluates(trainer: Any, module: DepthModule) -> None:
    """The loss of the causal rule, without the auxiliary losses."""
    found = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        halves = [module.eval()(input_ids=t, labels=t).loss for t in TOKENS.split(4)]
    assert found == pytest.approx(float(sum(halves) / 2), rel=1e-5)


def _saves(trainer: Any, module: DepthModule, folder: Path) -> None:
    trainer.save_model(str(folder))
    fresh = routed(llama()[1], loss=1.0).eval()
    assert not torch.equal(fresh(**BATCH).logits, module(**BATCH).logits)
    fresh.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.equal(fresh(**BATCH).logits, module(**BATCH).logits)


@pytest.mark.slow
def test_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = routed(llama()[1], loss=1.0)
    whole.add_losses = True
    resumed, start = copy.deepcopy(whole), copy.deepcopy(whole.state_dict())
    options = {"save_strategy": "steps", "save_steps": STEPS // 2}
    trainer_of(whole, tmp_path, Recorded(), **options).train()
    halfway = str(tmp_path / f"checkpoint-{STEPS // 2}")
    trainer_of(resumed, tmp_path, seen := Recorded(), **options).train(resume_from_checkpoint=halfway)
    assert len(seen.batches) < 2 * STEPS
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
        assert not torch.equal(start[name], weight), name


@pytest.mark.slow
def test_trainer_does_not_save_tied_embeddings_but_save_does(tmp_path: Path) -> None:
    """The Trainer hands the state dict to safetensors, which takes no tensor under two names."""
    import transformers

    sizes = oracles.SHARED | {"num_hidden_layers": 5, "tie_word_embeddings": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    module = depthc.compile(model, "mor", kwargs=BATCH)
    with pytest.raises(RuntimeError, match="share memory"):
        trainer_of(module, tmp_path, Recorded()).save_model(str(tmp_path / "saved"))
    depthc.save(module, tmp_path / "ours")
    assert torch.equal(depthc.load(tmp_path / "ours").eval()(**BATCH).logits, module.eval()(**BATCH).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"every_n_layers": 2}, {"offload": True}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}],
)
def test_checkpointing_that_is_not_known_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="checkpoints of activations have no") as caught:
        routed(stacked()).gradient_checkpointing_enable(**options)
    assert caught.value.remedy


# precision


def margin(aux: Aux) -> float:
    """The smallest gap between the logits of a token that was chosen and one that was not, in standard deviations."""
    gaps = [torch.inf]
    for route in aux.routes:
        for logit, chosen, candidates in zip(route.logit, route.chosen, route.candidates, strict=True):
            if not torch.equal(chosen, candidates):
                gap = logit[chosen].min() - logit[candidates & ~chosen].max()
                gaps.append(float(gap / logit[candidates].std()))
    return min(gaps)


def decide(module: DepthModule, inputs: Mapping[str, Tensor]) -> None:
    """Gives the routers weights whose choices are no matter of rounding, which would turn both sides apart."""
    for seed in range(100):
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in module.new_parameters().values():
                weight.copy_(torch.randn(weight.shape, generator=draw))
            if margin(module.forward_with_aux(**inputs)[1]) > 0.2:
                return
    pytest.fail("no routers were found whose choices are clear")


def stepped(module: nn.Module, cast: bool) -> tuple[dict[str, Tensor], Aux]:
    """Gradients and what is tapped, of one step under autocast or without."""
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        out, aux = module.forward_with_aux(**BATCH) if isinstance(module, DepthModule) else (module(**BATCH), Aux({}))
        loss = out.loss if aux.loss is None else out.loss + aux.loss
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}, aux


@pytest.mark.slow
@pytest.mark.parametrize(("kv", "checkpointed"), [("recursion", True), ("share_first", False)])
def test_autocast_errs_as_the_model_does(kv: str, checkpointed: bool) -> None:
    """Routers, scores and losses stay fp32, and bf16 costs the gradients no more than it costs those of the model."""
    model, program = llama()
    module = routed(program, kv=kv, loss=0.1)
    if checkpointed:
        module.activation_checkpointing_enable()
    decide(module, BATCH)
    (wide, wide_aux), (narrow, aux) = stepped(module, False), stepped(module, True)
    assert [int(r.chosen.sum()) for r in aux.routes] == [24, 16, 8]
    for route, other in zip(aux.routes, wide_aux.routes, strict=True):
        assert torch.equal(route.chosen, other.chosen)
        assert route.logit.dtype == torch.float32
        assert (route.logit.bfloat16() != route.logit).float().mean() > 0.9  # not rounded on the way
    assert all(loss.dtype == torch.float32 for loss in aux.losses.values())
    model.train()
    allowed = 2 * error(flat(stepped(model, True)[0]), flat(stepped(model, False)[0]))
    assert 1e-3 < error(flat(narrow), flat(wide)) < allowed < 0.1
    for name in module.new_parameters():
        assert error(narrow[name], wide[name]) < allowed, name


@pytest.mark.slow
def test_rows_under_autocast_are_evaluate() -> None:
    """Blocks on rows are traced once: with the dtypes that autocast gives caches and scores, and anew without it."""
    spec = Spec(depth=2, residual="post", norm="none", attention=("plain",))
    program = depthc.capture(seeded(lambda: Stacked(spec)), (ids(2, 9),))
    for kv in KV:
        module = routed(program, kv=kv, std=1.0, loops=2, sharing="cycle")
        for cast in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast), torch.no_grad():
                assert torch.equal(module(ids(2, 9)), run(module.program, (ids(2, 9),), {}, training=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["post_norm", pytest.param("llama", marks=pytest.mark.thorough)])
def test_bf16_errs_as_the_model_does(kind: str) -> None:
    """Against the oracle in fp64 on the same bf16 weights: output, loss and gradients."""
    model = oracles.build(kind, layers=5).bfloat16()
    exact, real = copy.deepcopy(model).double(), torch.ones(2, 9, dtype=torch.bool)
    inputs = oracles.inputs_of(kind, real)
    program = depthc.capture(model, kwargs=inputs)
    with oracles.Wide():
        original = exact(**inputs)
    plain, want_plain = _projected(model, model(**inputs)), _projected(exact, original)
    allowed = [2 * error(a, b) for a, b in zip(plain, want_plain, strict=True)]
    for kv in KV:
        module = lower(run_recipe(program, recipe_of("mor", {"kv": kv, "loss": 0.1}))[0]).train()
        decide(module, inputs)
        settings = expert.Settings(kv=kv, loss=0.1)
        routers = [{"weight": p.detach().double()[None]} for p in module.new_parameters().values()]
        with oracles.Wide():
            expected = expert.route(oracles.math_of(kind, exact), settings, routers, inputs, real)
        out, aux = module.forward_with_aux(**inputs)
        assert all(torch.equal(r.chosen, s) for r, s in zip(aux.routes, expected.selected, strict=True))
        assert aux.loss.dtype == aux.routes[1].logit.dtype == torch.float32
        assert aux.loss.item() == pytest.approx(expected.loss.item(), rel=allowed[0])
        found = _projected(model, out)
        for what, want, most in zip(found, _projected(exact, expected.logits), allowed, strict=True):
            assert error(what, want) < most < 0.2


def _projected(model: nn.Module, out: Any) -> tuple[Tensor, Tensor]:
    """Logits, and the gradients of a projection of them for all weights of the model."""
    logits = (out if isinstance(out, Tensor) else out.logits).double()
    used = [p for p in model.parameters() if p.requires_grad]
    loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
    grads = torch.autograd.grad(loss, used, allow_unused=True)
    return logits.detach(), torch.cat([g.double().flatten() for g in grads if g is not None])


# checkpointing


class Counted(TorchDispatchMode):
    """Counts the ops that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kv", KV)
def test_checkpointing_chooses_once(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward, the blocks are run again and the choices are not."""
    chosen: list[str] = []
    monkeypatch.setattr("depthc.ir.evaluate.select", lambda rule, *rest: chosen.append(rule) or select(rule, *rest))
    module = routed(stacked(), kv=kv)
    module(ids(2, 9))  # what is traced is not counted
    chosen.clear()
    attended = []
    for turn in (module.activation_checkpointing_disable, module.activation_checkpointing_enable):
        turn()
        with Counted() as counted:
            out, aux = module.forward_with_aux(ids(2, 9))
            made, forward = len(chosen), counted.seen.copy()
            (out.pow(2).sum() + aux.loss).backward()
        backward = counted.seen - forward
        assert made == len(chosen) == 2 + 3 * 2
        assert forward["sort"] >= 2
        assert not backward["sort"]
        attended.append((_attentions(forward), _attentions(backward)))
        chosen.clear()
    assert attended == [(5, 0), (5, 5)]


def _attentions(seen: Counter[str]) -> int:
    return sum(count for name, count in seen.items() if "attention" in name and "backward" not in name)


# descent


@pytest.mark.parametrize("combine", ["weighted", "additive", "delta", "off"])
def test_a_step_lowers_the_loss_as_the_gradient_foretells(combine: str) -> None:
    module, tokens, rate = routed(stacked(), combine=combine, std=1.0, loss=0.1), ids(2, 9), 1e-5

    def loss() -> Tensor:
        out, aux = module.forward_with_aux(tokens)
        return nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) + aux.loss

    before = loss()
    before.backward()
    foretold = sum(rate * float(p.grad.pow(2).sum()) for p in module.parameters())
    assert all(p.grad.abs().max() > 0 for p in module.new_parameters().values())
    torch.optim.SGD(module.parameters(), rate).step()
    assert (before - loss()).item() == pytest.approx(foretold, rel=0.01)


# two processes


@pytest.mark.slow
def test_two_processes_are_the_mean_of_both(tmp_path: Path) -> None:
    """New weights are equal on every rank without a word between them; gradients are the mean of the halves'."""
    run_ranks(Path(__file__).with_name("data_parallel.py"), 2, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["noise"] != other["noise"]  # the ranks did draw differently
    assert [name for name in one["weights"] if name.startswith("depth.")]
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name
    for turn in ("plain", "checkpointed"):
        for name, grad in one[turn].items():
            assert torch.equal(grad, other[turn][name]), name
            mean = (one["alone"][name] + other["alone"][name]) / 2
            torch.testing.assert_close(grad, mean, rtol=1e-10, atol=1e-12, msg=name)
            assert not torch.equal(one["alone"][name], other["alone"][name])
    loads = torch.stack([one["balance"]["load"], other["balance"]["load"]])
    moves = [0.25 * (load.double().mean() - load).sign() for load in (loads.sum(0), *loads)]
    assert all(torch.equal(rank["balance"]["bias"], moves[0].float()) for rank in (one, other))
    assert not any(torch.equal(moves[0], alone) for alone in moves[1:])
