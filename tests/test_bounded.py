"""Sets packed at the size of all tokens: the oracle's results, without a look at the data or work for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depthc
from depthc.codegen.module import DepthModule
from depthc.ir.rows import counted, varlen
from depthc.ir.rows.run import run_rows

from .models import Spec, Stacked, ids, seeded
from .routed import captured, forward
from .test_packing import masked_attention
from .test_tokenchoice import KV, OTHERS, Case, agree

PRODUCTS = 5  # of a layer


def bounded(case: Case) -> Case:
    case.compiled.bounded = True
    return case


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rows", "kv"),
    [
        ("llama", "padded", KV[0]),
        *(pytest.param("llama", "padded", kv, marks=pytest.mark.thorough) for kv in KV[1:]),
        pytest.param("llama", "full", KV[0], marks=pytest.mark.thorough),
        *(pytest.param(kind, "padded", "recursion", marks=pytest.mark.thorough) for kind in OTHERS),
    ],
)
def test_depths_are_the_oracles(kind: str, rows: str, kv: str) -> None:
    agree(bounded(Case(kind, rows, kv=kv)))


@pytest.mark.slow
def test_nobody_goes_deeper_and_everybody_does() -> None:
    for bias in ([9.0, 0.0, 0.0], [0.0, 0.0, 9.0]):
        agree(bounded(Case("llama", "full", bias=torch.tensor(bias, dtype=torch.float64))))


@pytest.mark.parametrize("kv", ["recursion", "share_first"])
def test_thresholds_and_a_single_sequence(kv: str) -> None:
    """Expert choice in inference."""
    _, program, inputs = captured("llama", "full")
    module = depthc.compile(program, "mor", kv=kv, std=1.0)
    one = {name: value[:1] for name, value in inputs.items()}
    for given in (inputs, one):
        module.bounded = False
        expected, aux = forward(module, given, causal=True)
        assert sum(int(route.chosen.sum()) for route in aux.routes[1:]) > 0
        module.bounded = True
        torch.testing.assert_close(forward(module, given, causal=True)[0], expected, rtol=0, atol=1e-10)


class Conditioned(nn.Module):
    """Layers that a vector a sequence scales: their rows cannot be packed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scaled() for _ in range(6)])

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, scale)
        return x


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + self.linear(x).tanh() * scale[:, None]


@pytest.mark.parametrize("recipe", ["mor", "mor_token"])
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_that_cannot_be_packed(recipe: str, batch: int) -> None:
    torch.manual_seed(0)
    model, scale = Conditioned(), torch.randn(3, 8, dtype=torch.float64)
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    module = depthc.compile(model, recipe, args=(x, scale), std=2.0, sharing="cycle").eval()
    expected = module(x[:batch], scale[:batch])
    module.bounded = True
    torch.testing.assert_close(module(x[:batch], scale[:batch]), expected)


class Products(nn.Module):
    """Every form of a product of rows; one that scales what it adds is no such form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Product(form) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Product(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.weight = form, nn.Parameter(torch.randn(8, 8) * 0.4)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        made = {
            "linear": lambda: nn.functional.linear(x, self.weight, self.bias),
            "mm": lambda: torch.mm(flat, self.weight).unflatten(0, x.shape[:2]),
            "addmm": lambda: torch.addmm(self.bias, flat, self.weight).unflatten(0, x.shape[:2]),
            "scaled": lambda: torch.addmm(self.bias, flat, self.weight, alpha=0.5).unflatten(0, x.shape[:2]),
        }[self.form]()
        return x + made.tanh()


@pytest.mark.slow
@pytest.mark.parametrize(("form", "taken"), [("linear", True), ("mm", True), ("addmm", True), ("scaled", False)])
def test_forms_of_products(form: str, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library's own product, in bf16."""
    torch.manual_seed(0)
    x = torch.randn(3, 16, 8).bfloat16()
    model = Products(form).bfloat16()
    module = depthc.compile(model, "mor_token", args=(x,), std=2.0, sharing="cycle").eval()
    plain, calls = module(x), list[int]()
    own = torch.nn.functional.grouped_mm
    monkeypatch.setattr("torch.nn.functional.grouped_mm", lambda *a, **k: calls.append(1) or own(*a, **k))
    module.bounded = True
    found = module(x)
    assert bool(calls) == taken
    assert (found - plain).norm() <= 0.02 * plain.norm()


# without a look at the data


def chosen(module: DepthModule, tokens: Tensor) -> list[int]:
    return [int(route.chosen.sum()) for route in module.forward_with_aux(tokens)[1].routes]


def choosing() -> DepthModule:
    """Token choice in a small model, of which tokens of a batch take different depths."""
    model = seeded(lambda: Stacked(Spec(depth=6, dtype=torch.float64)))
    module = depthc.compile(model, "mor_token", args=(ids(),), std=2.0, sharing="cycle").train()
    module.bounded = True
    return module


@pytest.mark.slow
def test_one_graph_serves_whatever_tokens_choose() -> None:
    """In training and in inference; a graph that waits for the data would not be whole."""
    torch.compiler.reset()
    module, graphs = choosing(), []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    module(ids())  # rows are traced before the whole is
    whole = torch.compile(module, fullgraph=True, backend=count)
    counts = []
    for seed in range(3):
        tokens = ids(seed=seed)
        counts.append(chosen(module, tokens))
        params = [p for p in module.parameters() if p.requires_grad]
        found, wanted = (run(tokens) for run in (whole, module))
        torch.testing.assert_close(found, wanted)
        grads = [torch.autograd.grad(logits.square().sum(), params, allow_unused=True) for logits in (found, wanted)]
        torch.testing.assert_close(*grads)
    assert len({tuple(one) for one in counts}) > 1
    assert len(graphs) == 1


# what is behind the members is not computed


class _Poison(torch.autograd.Function):
    """NaN behind the first rows, in the gradient too: what kernels leave there may be anything."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: Tensor) -> Tensor:
        ctx.count = int(count)
        return _Poison.poisoned(rows, ctx.count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Poison.poisoned(grad, ctx.count), None

    @staticmethod
    def poisoned(rows: Tensor, count: int) -> Tensor:
        return torch.cat([rows[:count], torch.full_like(rows[count:], torch.nan)])


@pytest.mark.slow
def test_products_and_attention_take_the_members_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins that leave NaN where the library's kernels leave what was there."""
    products, attentions = list[int](), list[int]()

    def grouped(rows: Tensor, matrix: Tensor, *, offs: Tensor) -> Tensor:
        products.append(int(offs))
        return padded(_Poison.apply(rows, offs)[: int(offs)] @ matrix[0], rows, offs)

    def attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *rest: Any, **options: Any) -> Tensor:
        attentions.append(int(ends[-1]))
        own = [_Poison.apply(x, ends[-1])[: int(ends[-1])] for x in (q, k, v)]
        return padded(masked_attention(*own, ends, *rest, **options), q, ends[-1])

    def padded(made: Tensor, rows: Tensor, count: Tensor) -> Tensor:
        return _Poison.apply(torch.cat([made, made.new_zeros(len(rows) - len(made), *made.shape[1:])]), count)

    module = choosing()
    module._rows = run_rows  # type: ignore[assignment]  # not traced: the stand-ins look at the data
    module.bounded = False
    expected = loss_and_gradients(module)
    monkeypatch.setattr(counted, "runs", lambda *_: True)
    monkeypatch.setattr("torch.nn.functional.grouped_mm", grouped)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend)
    monkeypatch.setattr(varlen, "available", lambda device: True)
    monkeypatch.setattr(varlen, "runs", lambda *rows: True)
    module.bounded = True
    found = loss_and_gradients(module)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    products.clear()
    attentions.clear()
    members = [
        count for count in chosen(module, ids())[1:] for _ in range(2)
    ]  # of two layers a recursion behind the first
    assert attentions == members
    assert products == [count for count in members for _ in range(len(products) // len(members))]
    assert len(products) // len(members) == PRODUCTS


def loss_and_gradients(module: DepthModule) -> list[Tensor]:
    logits = module(ids())
    params = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(logits.square().mean(), params, allow_unused=True)
    return [logits, *(torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True))]
