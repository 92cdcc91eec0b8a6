"""Whole modules with their kernels on: the same function as with all of them off, and the kernels that run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from architectures import ZOO
from architectures.base import perturb
from compare import without_cache
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.codegen.routing import KERNELS
from depthc.ir.errors import InputError, RoutingError
from depthc.ir.program import Loop, Merge, Tap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MORE = pytest.mark.thorough
ROUTED = ("olmo2", *(pytest.param(n, marks=MORE) for n in ("gpt_neox", "mixtral")))  # post-norm, parallel, MoE


class Ops(TorchDispatchMode):
    """Counts the ops of this package that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "depthc":
            self.seen[func._opname] += 1
        return func(*args, **kwargs or {})


@contextmanager
def ops() -> Iterator[Counter[str]]:
    with Ops() as mode:
        yield mode.seen


def routed(name: str, recipe: str = "mor", **options: Any) -> tuple[DepthModule, dict[str, Any]]:
    """A routed module of the zoo with all kernels on, and arguments for it."""
    module, given = _routed(name, recipe, tuple(options.items()))
    module.kernels, module.selection = KERNELS, "inference"
    return module.eval(), given


@cache
def _routed(name: str, recipe: str, options: tuple[tuple[str, Any], ...]) -> tuple[DepthModule, dict[str, Any]]:
    entry, more = ZOO[name], dict(options)
    model = perturb(entry.build()).to(DEVICE).eval()
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), entry.example())
    kwargs = without_cache(model, kwargs)
    if more.pop("masked", False):
        kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
        kwargs["attention_mask"][0, :3] = 0
    sizes = {"mor": {"loops": 2, "capacities": [1.0, 0.5]}, "mod": {"capacity": 0.5}, "mor_token": {"loops": 2}}
    more |= sizes[recipe]
    return depthc.compile(model, recipe, args, kwargs, std=1.0, **more).to(DEVICE), {"args": args, "kwargs": kwargs}


def step(module: Any, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """A weighted sum of the output and its gradients by name."""
    torch.manual_seed(0)  # of dropout
    out = module(*given["args"], **given["kwargs"])
    first = next(t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point())
    total = (first * torch.linspace(-1, 1, first.numel(), device=first.device).view_as(first)).sum()
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return first.detach(), {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def assert_same(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item() + 1e-7)


@pytest.mark.parametrize("name", ROUTED)
def test_a_training_step(name: str) -> None:
    torch.use_deterministic_algorithms(False)  # experts are counted by an op that is not
    module, given = routed(name)
    module.train()
    with ops() as seen:
        found = step(module, given)
    assert seen["select_topk"] == seen["combine"] == 1  # the first of two recursions takes all tokens
    module.kernels = ()
    with ops() as seen:
        wanted = step(module, given)
    assert not seen
    assert_same(found, wanted)


@pytest.mark.parametrize(
    ("kv", "masked"),
    [
        pytest.param("share_first", False, marks=MORE),
        ("share_first", True),
        *(pytest.param(kv, masked, marks=MORE) for kv in ("recursion", "update") for masked in (False, True)),
    ],
)
def test_plans(kv: str, masked: bool) -> None:
    """Short rows, which padding makes, are filled up; padding is a mask that the attention kernel does not know."""
    module, given = routed("llama", masked=masked, kv=kv)
    with ops() as seen:
        found = step(module.train(), given)
    assert (seen["shared_attention"] > 0) == (kv != "recursion" and not masked)
    assert seen["combine"]
    assert seen["select_topk"]
    module.kernels = ()
    assert_same(found, step(module, given))


@pytest.mark.parametrize(
    ("name", "masked"), [*(pytest.param(name, False, marks=MORE) for name in ("llama", "olmo2")), ("llama", True)]
)
def test_tokens_that_choose_their_depth(name: str, masked: bool) -> None:
    """Packed rows are one batch row: the same kernels move them, also where rows of other tokens follow."""
    module, given = routed(name, "mor_token", masked=masked)
    module.kernels = ()
    wanted = step(module.train(), given)
    for module.bounded in (True, False):
        module.kernels = KERNELS
        with ops() as seen:
            assert_same(step(module, given), wanted)
        assert seen["copy_rows"]
        assert seen["combine"]
    module.kernels = ()
    module.eval()
    with torch.no_grad():
        wanted = module(*given["args"], **given["kwargs"])[0]
        module.kernels = KERNELS
        torch.testing.assert_close(module(*given["args"], **given["kwargs"])[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"f": "block"}, pytest.param({"f": "difference", "predictor": True}, marks=MORE)])
def test_layers_that_choose(options: dict[str, Any]) -> None:
    module, given = routed("llama", "mod", **options)
    with ops() as seen:
        found = step(module.train(), given)
    assert seen["combine"] == seen["select_topk"] == 2
    module.kernels = ()
    assert_same(found, step(module, given))


NAMES = {
    "score": "score",
    "select": "select_topk",
    "rows": "copy_rows",
    "combine": "combine",
    "attention": "shared_attention",
}


@pytest.mark.parametrize(
    "kernel", ["select", *(pytest.param(kernel, marks=MORE) for kernel in KERNELS if kernel != "select")]
)
def test_each_can_be_turned_off(kernel: str) -> None:
    module, given = routed("llama", kv="share_first")
    with ops() as seen:
        wanted = step(module.train(), given)
    assert {*NAMES.values()} <= seen.keys()
    module.kernels = {*KERNELS} - {kernel}
    with ops() as seen:
        found = step(module, given)
    assert NAMES[kernel] not in seen
    assert_same(found, wanted)


def test_an_unknown_kernel_is_an_error() -> None:
    module, _ = routed("llama")
    with pytest.raises(InputError, match="a kernel is 'softmax'"):
        module.kernels = ("softmax",)
    assert module.kernels == {*KERNELS}


def test_in_place_where_no_gradient_is_wanted() -> None:
    """Streams are written in place, and what the caller holds is not."""
    module, given = routed("llama")
    module.eval().selection = "training"
    with torch.no_grad(), ops() as seen:
        found = module(*given["args"], **given["kwargs"])[0]
    assert seen["combine_"] == 1
    assert not seen["combine"]
    module.kernels = ()
    torch.testing.assert_close(found, module(*given["args"], **given["kwargs"])[0])


def test_embeddings_of_the_caller_stay() -> None:
    """The first routed stream may be the argument itself."""
    layers = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh()) for _ in range(3)])
    x = torch.randn(2, 8, 16, device=DEVICE)
    module = depthc.compile(layers.to(DEVICE), "tie(loops=3) | route(capacities=[0.5, 0.5, 0.25])", args=(x,), std=1.0)
    module.kernels = KERNELS
    module.eval().selection = "training"
    before = x.clone()
    with torch.no_grad(), ops() as seen:
        found = module(x)
    assert torch.equal(x, before)
    assert seen["combine"] == 1
    assert seen["combine_"] == 2
    module.kernels = ()
    torch.testing.assert_close(found, module(x))


def test_what_is_tapped_stays() -> None:
    """A stream that a tap holds is not written in place."""
    layers = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh()) for _ in range(3)])
    recipe = "tie(loops=3) | route(capacities=[0.5, 0.5, 0.25], alpha=1)"
    x = torch.randn(2, 8, 16, device=DEVICE)
    program = depthc.compile(layers.to(DEVICE), recipe, args=(x,), std=1.0).program
    (stack,) = program.stacks
    (loop,) = [op for op in stack.ops if isinstance(op, Loop)]
    h = next(op.read for op in loop.body if isinstance(op, Merge))
    tapped = replace(loop, body=(*loop.body, Tap("state.{r}", h)))
    ops = tuple(tapped if op is loop else op for op in stack.ops)
    body = tuple(replace(stack, ops=ops) if item is stack else item for item in program.body)
    module = lower(replace(program, body=body)).eval()
    module.selection = "training"
    states: dict[bool, list[Tensor]] = {}
    for on in (True, False):
        module.kernels = KERNELS if on else ()
        with torch.no_grad():
            _, aux = module.forward_with_aux(x)
        states[on] = [aux.taps[f"state.{r}"] for r in range(3)]
    for found, wanted in zip(states[True], states[False], strict=True):
        torch.testing.assert_close(found, wanted)


def test_nan_is_refused_where_all_are_chosen() -> None:
    layers = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh()) for _ in range(3)])
    x = torch.randn(2, 8, 16, device=DEVICE)
    module = depthc.compile(layers.to(DEVICE), "tie(loops=3) | route(capacities=[1.0, 1.0, 1.0])", args=(x,)).train()
    module.kernels = KERNELS
    x[0, 3, 2] = torch.nan
    if DEVICE == "cpu":  # elsewhere the device finds it
        with pytest.raises(RoutingError, match="row 0, token 3"):
            module(x)


@pytest.mark.parametrize("kv", ["recursion", pytest.param("share_first", marks=MORE)])
def test_compiled_as_a_whole(kv: str) -> None:
    module, given = routed("llama", kv=kv)
    wanted = step(module.train(), given)
    whole = torch.compile(module, backend="aot_eager", fullgraph=True)
    found, grads = step(whole, given)
    assert_same((found, {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}), wanted)


def test_the_choices_say_what_runs() -> None:
    module, _ = routed("llama", kv="share_first")
    text = str(module.explain_kernels())
    for kernel in ("select_topk", "take_rows", "shared_attention", "combine"):
        assert kernel in text
    module.kernels = ("select",)
    text = str(module.explain_kernels())
    assert "select_topk" in text
    assert "turned off" in text
    assert "shared_attention " not in text
