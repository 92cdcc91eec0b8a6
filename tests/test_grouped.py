"""Key heads as they are: the same function, without keys that are repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depthc
from depthc.codegen.grouped import grouped
from depthc.ir.evaluate import run

WIDTH, HEADS, KEY_HEADS = 16, 4, 2


class Layer(nn.Module):
    """Attention with a mask; keys are repeated head by head, or the whole of them, or values alone."""

    def __init__(self, repeated: str, dropout: float) -> None:
        super().__init__()
        self.repeated, self.dropout = repeated, dropout
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(HEADS, 1, 1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        def heads(rows: Tensor) -> Tensor:
            return rows.unflatten(2, (-1, WIDTH // HEADS)).transpose(1, 2)

        def by_head(rows: Tensor) -> Tensor:
            batch, count, tokens, features = rows.shape
            wide = rows[:, :, None].expand(batch, count, HEADS // KEY_HEADS, tokens, features)
            return wide.reshape(batch, HEADS, tokens, features)

        k, v = (heads(rows) for rows in self.kv(x).chunk(2, 2))
        v = by_head(v)
        k = by_head(k) if self.repeated == "by head" else torch.cat([k, k], 1)
        rate = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(heads(self.q(x)), k, v, mask * self.scale.exp(), dropout_p=rate, scale=0.3)
        return x + out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(*given) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        behind = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        for layer in self.layers:
            x = layer(x, torch.where(behind >= 0, -behind.float(), -torch.inf))
        return x


@pytest.mark.parametrize(("repeated", "told"), [("by head", True), ("as a whole", False)])
@pytest.mark.parametrize("training", [False, True])
def test_the_same_function(repeated: str, told: bool, training: bool) -> None:
    """With a mask a head, a scale and dropout; keys repeated in another order stay as they are."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, WIDTH)
    program = depthc.capture(Model(repeated, 0.5), (x,))
    made, results = grouped(program), []
    for one in (program, made):
        torch.manual_seed(1)
        results.append(run(one, (x,), {}, training=training))
    torch.testing.assert_close(*results)
    ops = str(made)
    assert ("enable_gqa=True" in ops) == told
    assert ("expand(" in ops) == (not told)
