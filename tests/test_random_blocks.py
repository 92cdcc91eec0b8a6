"""Blocks of random ops: those that the axis analysis accepts treat tokens alike and every row of the batch alone.

A layer without positions that treats tokens alike commutes with any reordering of its tokens, and a row of the batch
gives the same alone. Neither property is told to the analysis, so every op that it misjudges can show here.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from traced import BATCH, LENGTH, WIDTH, block_cases, draw

from depthc.ir.axes.analysis import analyse
from depthc.ir.errors import SubsetError
from depthc.ir.rows.run import run_rows

Op = Callable[..., Tensor]


def _integers(x: Tensor, last: int) -> Tensor:
    """A decision from values: 0 to `last`."""
    return (x.sigmoid() * (last + 1)).long().clamp(0, last)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).index_put((order,), torch.arange(order.shape[0], device=order.device))


# Ops on one or two earlier values; those that do not take the shapes or dtypes at hand are left out of the program.
OPS: dict[str, Op] = {
    "linear": lambda x: F.linear(x, torch.linspace(-1, 1, 2 * x.shape[-1], dtype=x.dtype, device=x.device).view(2, -1)),
    "tanh": lambda x: x.tanh(),
    "double": lambda x: x * 2,
    "one_less": lambda x: 1 - x,
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "outer": lambda x, y: x.unsqueeze(2) * y.unsqueeze(1),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "matmul": lambda x, y: x @ y,
    "scores": lambda x, y: x @ y.transpose(-1, -2),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, y, y),
    "softmax": lambda x: x.softmax(-1),
    "softmax_before": lambda x: x.softmax(-2),
    "transpose": lambda x: x.transpose(-1, -2),
    "swap": lambda x: x.transpose(0, 1),
    "flatten": lambda x: x.flatten(0, 1),
    "score": lambda x: x.flatten(0, 1)[:, 0],
    "choices": lambda x: x.flatten(0, 1).topk(2, -1).indices.flatten(),
    "sort_rows": lambda x: x.flatten().sort().values,
    "places": lambda x: x.flatten().sort().indices,
    "order": lambda x: x.flatten().argsort(stable=True),
    "order_down": lambda x: x.flatten().argsort(stable=True, descending=True),
    "pair": lambda x: x.unflatten(0, (-1, 2)).sum(1),
    "merge": lambda x: x.flatten(1),
    "heads": lambda x: x.unflatten(-1, (2, -1)),
    "heads_first": lambda x: x.unflatten(-1, (2, -1)).transpose(1, 2),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "unsqueeze_first": lambda x: x.unsqueeze(1),
    "first": lambda x: x[..., 0],
    "half": lambda x: x[..., : x.shape[-1] // 2],
    "chunk": lambda x: x.chunk(2, -1)[1],
    "row": lambda x: x[:, 0],
    "cat": lambda x, y: torch.cat([x, y], -1),
    "cat_rows": lambda x, y: torch.cat([x, y], 1),
    "stack": lambda x, y: torch.stack([x, y], -1),
    "sum": lambda x: x.sum(-1),
    "sum_kept": lambda x: x.sum(-1, keepdim=True),
    "sum_before": lambda x: x.sum(-2),
    "sum_rows": lambda x: x.sum(1),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "amax": lambda x: x.amax(-1, keepdim=True),
    "largest": lambda x: x.max(-1).values,
    "place_of_largest": lambda x: x.max(-1).indices,
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True),
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "norm_two": lambda x: F.layer_norm(x, x.shape[-2:]),
    "cumsum": lambda x: x.cumsum(-1),
    "topk": lambda x: x.topk(2, -1).values,
    "topk_places": lambda x: x.topk(2, -1).indices,
    "sort": lambda x: x.sort(-1).values,
    "argsort": lambda x: x.argsort(-1, stable=True),
    "inverse": _inverse,
    "halved": lambda x: x // 2,
    "choose": lambda x: _integers(x, 3),
    "one_hot": lambda x: F.one_hot(x, 4),
    "number": lambda x: x.double(),
    "index": lambda x, y: x[y],
    "index_last": lambda x, y: x[..., y],
    "index_add": lambda x, y: torch.zeros_like(x).index_add(0, y, x),
    "index_put": lambda x, y: torch.zeros_like(x).index_put((y,), x, accumulate=True),
    "gather": lambda x, y: x.gather(-1, y),
    "scatter": lambda x, y: torch.zeros_like(x).scatter_add(-1, y, x),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "pad": lambda x: F.pad(x, (1, -1)),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 2, *x.shape[1:]),
    "repeat": lambda x: torch.cat([x, x], -1),
    "conv": lambda x: F.conv1d(x, torch.ones(1, x.shape[1], 1, dtype=x.dtype, device=x.device)),
    "squeeze": lambda x: x.squeeze(-1),
    "masked": lambda x, y: x.masked_fill(y > 0, 0.0),
    "back": lambda x, y: x.reshape(y.shape),
    "into_scores": lambda x: torch.exp(x - x.amax(-1, keepdim=True)),
    "divide": lambda x, y: x / (1 + y.abs()),
}

# Some programs draw from ops that meet in attentions, or in a mixture of experts; others from any.
_SCORES = """linear double add mul outer matmul scores softmax softmax_before transpose heads_first sum sum_before
    amax logsumexp mean masked into_scores divide where attention topk cat""".split()
_EXPERTS = """linear tanh flatten score choices order order order_down places sort_rows inverse index index index
    index_add index_put halved pair mul unsqueeze choose one_hot sum_rows cumsum number gather""".split()


class Program(nn.Module):
    """A layer of random ops; every op is drawn so that it takes what came before, at the sizes of the tests."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.steps: list[tuple[Op, list[int]]] = []
        self.names: list[str] = []
        tries = 0
        values, rng = [draw(BATCH, LENGTH, WIDTH)], random.Random(seed)
        pool = rng.choice([_SCORES, _EXPERTS, rng.sample(list(OPS), 16)])
        while len(self.steps) < 16 and tries < 400:
            tries += 1
            name = rng.choice(pool)
            recent = [max(rng.randrange(len(values)), rng.randrange(len(values))) for _ in range(2)]
            places = recent[: OPS[name].__code__.co_argcount]
            try:
                value = OPS[name](*(values[p] for p in places))
            except (RuntimeError, IndexError, ValueError, TypeError):
                continue
            if 0 < value.numel() < 20000 and value.dim() < 6:
                values.append(value)
                self.steps.append((OPS[name], places))
                self.names.append(f"{len(values) - 1} = {name}{places}")

        self.last, self.close = next((i, close) for i in reversed(range(len(values))) if (close := _close(values[i])))
        self.needed = {self.last}
        for number in reversed(range(1, self.last + 1)):
            if number in self.needed:
                self.needed.update(self.steps[number - 1][1])

    def forward(self, h: Tensor) -> Tensor:
        values = {0: h}
        for number, (op, places) in enumerate(self.steps, 1):
            if number in self.needed:
                values[number] = op(*(values[p] for p in places))
        return h + self.close(torch.tanh(values[self.last].to(h.dtype)), h)

    def __str__(self) -> str:
        return "\n".join(name for number, name in enumerate(self.names, 1) if number in self.needed)


def _close(value: Tensor) -> Op | None:
    """How a value becomes a change of the hidden states, if it can."""
    if value.numel() == BATCH * LENGTH * WIDTH:
        return lambda x, h: x.reshape(h.shape)
    if value.numel() == BATCH * LENGTH:
        return lambda x, h: x.reshape(h.shape[0], h.shape[1], 1)
    return None


def check(seed: int) -> bool:
    """Whether a program is accepted; if so, it commutes with reordering and takes rows of the batch one by one."""
    program = Program(seed)
    try:
        case = block_cases({"random": program})["random"]
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return False  # it does not take other sizes
    try:
        refused = bool(analyse(case.block).refusals)
    except SubsetError:
        return False
    if refused or len(program.needed) < 3:
        return False
    h = draw(BATCH, LENGTH, WIDTH, seed=seed)
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(seed))
    try:
        full = program(h)
    except (RuntimeError, IndexError):
        return False  # an index that these numbers take out of bounds

    def equal(found: Tensor, expected: Tensor) -> None:
        assert_close(found, expected, atol=1e-9, rtol=1e-9, msg=lambda m: f"{m}\n{program}")

    equal(program(h[:, order]), full[:, order])
    equal(program(h[1:2]), full[1:2])
    (rows,), _ = run_rows(case.block, [h[:, order[:5]]], [], case.params, positions=order[None, :5])
    equal(rows, program(h[:, order[:5]]))
    return True


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20))
def test_accepted_blocks_treat_tokens_alike(seed: int) -> None:
    assume(check(seed))
