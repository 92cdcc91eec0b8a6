"""torch.compile, of the whole module and of its bodies: the same outputs and gradients, and as few graphs as can be."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.ir.evaluate import run
from depthc.ir.program import Program
from depthc.ir.settle import settle
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of

from .models import Layer, Spec, Stacked, ids, seeded, states

# Dynamo looks at `.grad` of what it is given, and torch warns where that is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

SPEC = Spec(depth=5, dtype=torch.float64)
TIED = {"loops": 3, "sharing": "middle_cycle"}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tie": ("tie", TIED),
    "recursion": ("mor", {"std": 1.0}),
    "share_first": ("mor", {"std": 1.0, "kv": "share_first"}),
    "packed": ("mor_token", {"std": 1.0}),
}
WHOLE = [name for name in RECIPES if name != "packed"]  # how many rows are packed depends on the data, also in training


class OnStates(nn.Module):
    """Layers on hidden states that are given: the first carry is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(SPEC, i) for i in range(SPEC.depth))
        self.to(SPEC.dtype)

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
        return h


@cache
def program_of(kind: str, depth: int = SPEC.depth, dtype: torch.dtype = SPEC.dtype) -> Program:
    if kind == "states":
        return depthc.capture(seeded(OnStates), (states(dtype=SPEC.dtype),))
    return depthc.capture(seeded(lambda: Stacked(Spec(depth=depth, dtype=dtype))), (ids(),))


def lowered(program: Program, recipe: str, options: dict[str, Any]) -> DepthModule:
    return lower(settle(run_recipe(program, recipe_of(recipe, options))[0]))


class Counting:
    """A backend that remembers its graphs; they run as another backend makes them."""

    def __init__(self, inner: str = "eager") -> None:
        self.graphs: list[fx.GraphModule] = []
        self.inner = torch._dynamo.lookup_backend(inner)

    def __call__(self, graph: fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return self.inner(graph, examples)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """What Dynamo gives up on is an error; else it would run uncompiled, and every test here would pass."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


# the same outputs and gradients


def judged(call: Callable[[Tensor], Tensor], module: nn.Module, given: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of a projection of it for what takes any: parameters and the input."""
    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    leaves |= {"given": given} if given.requires_grad else {}
    out = call(given)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {"out": out.detach()} | {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}


def givens(kind: str, module: nn.Module) -> Iterator[Tensor]:
    """An input whose first carry takes no gradient, and one whose first carry does; of two lengths."""
    for trained, length in ((False, 9), (True, 7)):
        if kind == "states":
            yield states(2, length, dtype=SPEC.dtype).requires_grad_(trained)
        else:
            module.embed.weight.requires_grad_(trained)
            yield ids(2, length)


def assert_judged_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


QUICK = {("tie", "bodies", True, "states"), ("recursion", "bodies", True, "states")}
SLOW = {
    ("share_first", "bodies", True, "states"),
    ("recursion", "whole", True, "states"),
    ("packed", "bodies", True, "states"),
}
CASES = [
    pytest.param(
        *case,
        id="-".join(map(str, case)),
        marks=[] if case in QUICK else pytest.mark.slow if case in SLOW else pytest.mark.thorough,
    )
    for case in (
        *itertools.product(WHOLE, ["bodies"], (True, False), ("tokens", "states")),
        *itertools.product(WHOLE, ["whole"], (True, False), ["states"]),
        ("packed", "bodies", True, "states"),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "part", "training", "kind"), CASES)
def test_compiled_is_evaluate(
    recipe: str, part: str, training: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first carry of the loop takes no gradient, which the later ones do.

    A whole module is one graph, but where the number of chosen tokens depends on the data, outside of training: then
    Dynamo compiles frame by frame, and may give up on some. That must not change a number.
    """
    one_graph = part == "whole" and (recipe == "tie" or training)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", part == "bodies" or one_graph)
    module = lowered(program_of(kind), *RECIPES[recipe]).train(training)
    backend = Counting("aot_eager")
    whole = torch.compile(module, backend=backend, fullgraph=one_graph) if part == "whole" else module
    for turn, given in enumerate(givens(kind, module)):
        expected = judged(lambda x: run(module.program, (x,), {}, training=training), module, given)
        if not backend.graphs:
            assert_judged_alike(judged(module, module, given), expected, 0.0)
            if part == "bodies":
                module.compile(backend=backend)
        looped = [name for name in expected if name.startswith("layers.1.")]
        assert len(looped) >= 10
        assert all(expected[name].abs().max() > 1e-6 for name in looped)
        assert ("given" in expected or "embed.weight" in expected) == bool(turn)
        assert_judged_alike(judged(whole, module, given), expected, 1e-12)
    assert len(backend.graphs) > 1
    if recipe != "tie" and training:
        assert any("router" in name for name in expected)


@pytest.mark.thorough
@pytest.mark.skipif(not (os.environ.get("CXX") or shutil.which("g++")), reason="there is no C++ compiler")
def test_inductor_is_eager() -> None:
    """In fp32: attention in fp64 is beyond the Inductor of torch 2.11. Few graphs: each takes seconds."""
    module = lowered(program_of("tokens", 4, torch.float32), "mor", {"loops": 2}).train()
    expected = judged(module, module, ids(2, 9))
    module.compile()
    assert_judged_alike(judged(module, module, ids(2, 9)), expected, 1e-5)
    assert torch._dynamo.utils.counters["inductor"]


# as few graphs as can be


def compiled_graphs(module: DepthModule, lengths: tuple[int, ...]) -> list[int]:
    """How many graphs were compiled after a step on every length."""
    torch.compiler.reset()  # what was met with other sizes before is compiled with symbols at once
    backend, counts = Counting(), []
    module.compile(backend=backend)
    for length in lengths:
        module(ids(2, length)).sum().backward()
        counts.append(len(backend.graphs))
    return counts


LENGTHS = (6, 9, 11, 14)
DEEPER = 32


@pytest.mark.thorough
def test_graphs_of_tied_layers_do_not_grow_with_depth() -> None:
    """One a body at the first length, at most one more each, with symbolic sizes, at the second; then no more."""
    shallow, deep = (lowered(program_of("tokens", n), "tie", {"loops": n}).train() for n in (8, DEEPER))
    assert len(deep.program.blocks) == 1
    first, *later = compiled_graphs(deep, LENGTHS)
    assert first == len(deep._bodies) == 3
    assert later == [later[0]] * 3
    assert later[0] <= 2 * first
    assert compiled_graphs(shallow, LENGTHS) == [first, *later]


@pytest.mark.thorough
@pytest.mark.parametrize("kv", ["recursion", "share_first"])
def test_graphs_of_routed_layers_do_not_grow_with_depth(kv: str) -> None:
    """Six bodies and the block on rows (twice with shared keys); more where recursions hold other numbers of rows."""
    shallow, deep = (lowered(program_of("tokens", n), "mor", {"kv": kv}).train() for n in (8, DEEPER))
    bodies = len(deep._bodies) + (2 if kv == "share_first" else 1)
    first, *later = compiled_graphs(deep, LENGTHS)
    assert bodies <= first <= 2 * bodies
    assert later == [later[0]] * 3
    assert later[0] <= 3 * bodies
    assert compiled_graphs(shallow, LENGTHS) == [first, *later]


@pytest.mark.slow
def test_bodies_do_not_use_up_each_others_limit() -> None:
    """Dynamo takes no more than eight graphs for a piece of code; every body is one of its own."""
    modules = [lowered(program_of("tokens"), "mor", {}).train() for _ in range(2)]
    assert all(compiled_graphs(module, (6,))[0] > 6 for module in modules)


@pytest.mark.slow
def test_modes_do_not_use_up_each_others_limit() -> None:
    """Training and evaluation by turns, with sizes of one among others: all is compiled in the first round."""
    module = lowered(program_of("tokens"), "mor", {})
    module.compile(backend=(backend := Counting()))
    made = []
    for _ in range(2):
        for training, sizes in itertools.product((True, False), ((2, 6), (3, 9), (1, 11), (1, 1))):
            with torch.set_grad_enabled(training):
                module.train(training)(ids(*sizes))
        made.append(len(backend.graphs))
    assert made[0] == made[1]
