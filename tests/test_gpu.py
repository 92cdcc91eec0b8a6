"""On a GPU: the same numbers as on the CPU, saved and loaded, generated; skipped where there is none."""

from __future__ import annotations

import copy
from functools import wraps
from pathlib import Path

import oracles
import pytest
import torch
from torch import Tensor, nn

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.ir.rows import varlen

from .models import Spec, Stacked, ids, seeded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = 1e-5  # fp32, TF32 off


def routed(device: str, kv: str = "recursion") -> DepthModule:
    model: nn.Module = seeded(lambda: Stacked(Spec(depth=8, sides=("rotary",))))
    return depthc.compile(model.to(device), "mor", args=(ids().to(device),), kv=kv, std=1.0)


def judged(module: DepthModule, given: Tensor) -> dict[str, Tensor]:
    """Output, auxiliary loss and all gradients of a training step, on the CPU."""
    out, aux = module.train().forward_with_aux(given)
    module.zero_grad()
    (out.pow(2).mean() + aux.loss).backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: t.detach().cpu() for name, t in {"out": out, "loss": aux.loss, **grads}.items()}


@pytest.mark.parametrize("kv", ["recursion", "share_first"])
def test_a_step_is_that_of_the_cpu(kv: str) -> None:
    found, expected = judged(routed("cuda", kv), ids(3, 9).cuda()), judged(routed("cpu", kv), ids(3, 9))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


def test_a_module_moves_between_devices() -> None:
    module = routed("cpu").eval()
    there = copy.deepcopy(module).to("cuda")
    torch.testing.assert_close(there(ids().cuda()).cpu(), module(ids()), rtol=TOLERANCE, atol=TOLERANCE)


def test_saved_on_a_gpu_and_loaded_on_both(tmp_path: Path) -> None:
    module = routed("cuda").eval()
    depthc.save(module, tmp_path / "saved")
    again = depthc.load(tmp_path / "saved", device="cuda").eval()
    assert torch.equal(again(ids().cuda()), module(ids().cuda()))
    here = depthc.load(tmp_path / "saved").eval()
    torch.testing.assert_close(here(ids()), module(ids().cuda()).cpu(), rtol=TOLERANCE, atol=TOLERANCE)


def test_generation_is_that_of_the_cpu() -> None:
    found = depthc.generate(routed("cuda").eval(), ids(2, 4).cuda(), 6)
    assert torch.equal(found.cpu(), depthc.generate(routed("cpu").eval(), ids(2, 4), 6))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:TensorFloat32",
)
def test_compiled_by_inductor() -> None:
    torch.compiler.reset()
    module = routed("cuda")
    expected = judged(module, ids(3, 9).cuda())
    module.compile()
    for name, tensor in judged(module, ids(3, 9).cuda()).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4, msg=name)


# Packed rows: attention by the library's kernel.


def chooser(model: nn.Module, device: str) -> DepthModule:
    """Token choice on sequences whose tokens go to unequal depths."""
    tokens = oracles.inputs_of("llama", torch.ones(3, 12, dtype=torch.bool))["input_ids"].to(device)
    return depthc.compile(model.to(device), "mor_token", kwargs={"input_ids": tokens}, std=1.0).train()


def judged_bf16(module: DepthModule, device: str, cast: bool) -> Tensor:
    """Logits and gradients of a step one behind the other; in bf16, or in fp32 under autocast to it."""
    tokens = oracles.inputs_of("llama", torch.ones(3, 12, dtype=torch.bool))["input_ids"].to(device)
    with torch.autocast(device, torch.bfloat16, enabled=cast):
        logits = module(input_ids=tokens).logits
    module.zero_grad()
    logits.float().pow(2).mean().backward()
    return torch.cat([t.detach().float().flatten() for t in (logits, *(p.grad for p in module.parameters()))])


def packed_against_padded(monkeypatch: pytest.MonkeyPatch, device: str, cast: bool, compile: bool = False) -> None:
    from torch.nn.attention import varlen as library

    calls, kernel = [], library.varlen_attn

    @wraps(kernel)
    def counted(*args: object, **options: object) -> object:
        calls.append(args)
        return kernel(*args, **options)

    monkeypatch.setattr(library, "varlen_attn", counted)
    dtype = torch.float32 if cast else torch.bfloat16
    module = chooser(oracles.build("llama").to(dtype), device)
    assert not calls
    found = judged_bf16(module, device, cast)
    assert calls
    if compile:
        module.compile()
        found = judged_bf16(module, device, cast)
    monkeypatch.setattr(varlen, "available", lambda device: False)
    monkeypatch.setattr(varlen, "runs", lambda *rows: False)
    again = lower(module.program).train()
    expected = judged_bf16(again, device, cast)
    assert (found - expected).norm() / expected.norm() < 2e-2  # two orders of sums, each rounded to bf16


@pytest.mark.parametrize("cast", [False, True])
def test_packed_rows_are_padded_ones(cast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_against_padded(monkeypatch, "cuda", cast)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:TensorFloat32")
def test_packed_rows_compiled_by_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    packed_against_padded(monkeypatch, "cuda", cast=True, compile=True)


def test_token_choice_is_that_of_the_cpu() -> None:
    """In fp32, which the kernel does not take."""
    model: nn.Module = seeded(lambda: Stacked(Spec(depth=8, sides=("rotary",))))
    here, there = (
        depthc.compile(copy.deepcopy(model).to(device), "mor_token", args=(ids().to(device),), std=1.0)
        for device in ("cpu", "cuda")
    )
    found, expected = judged(there, ids(3, 9).cuda()), judged(here, ids(3, 9))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("recipe", ["mod", "keep(capacities=(1.0, 0.5))"])
def test_layers_on_some_tokens_are_those_of_the_cpu(recipe: str) -> None:
    model: nn.Module = seeded(lambda: Stacked(Spec(depth=2, sides=("rotary",))))
    here, there = (
        depthc.compile(copy.deepcopy(model).to(device), recipe, args=(ids().to(device),)).eval()
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(there(ids(3, 9).cuda()).cpu(), here(ids(3, 9)), rtol=TOLERANCE, atol=TOLERANCE)
