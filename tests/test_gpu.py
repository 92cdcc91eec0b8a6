"""On a GPU: the same numbers as on the CPU, saved and loaded, generated; skipped where there is none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import depthc
from depthc.codegen.module import DepthModule

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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:TensorFloat32")
def test_compiled_by_inductor() -> None:
    torch.compiler.reset()
    module = routed("cuda")
    expected = judged(module, ids(3, 9).cuda())
    module.compile()
    for name, tensor in judged(module, ids(3, 9).cuda()).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4, msg=name)
