"""A decoder with norms behind its residual sums, and the same token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Key, Visible, attend
from .rows import Inputs, lookup, named
from .sizes import VOCAB, WIDTH


class PostNormLayer(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask)
        x = self.first(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.second(x + self.down(F.gelu(self.up(x))))


class PostNormModel(nn.Module):
    """Causal, learned positions. The mask is of keys, [B, S], or of pairs, [B, S, S]."""

    def __init__(self, layers: int, positions: int = 64) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(positions, WIDTH)
        self.layers = nn.ModuleList(PostNormLayer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)
        mask = (at[:, None] >= at)[None, None]
        if attention_mask is not None:
            allowed = attention_mask.bool()
            mask = mask & (allowed[:, None, None] if allowed.dim() == 2 else allowed[:, None])
        x = self.embed(ids) + self.positions(at)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


class PostNorm:
    causal = True
    cross_first = False

    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, model.layers

    def embed(self, inputs: Inputs, row: int, table: Tensor | None = None) -> list[Tensor]:
        states = lookup(self.model.embed, inputs["ids"][row], table)
        return [x + self.model.positions.weight[t] for t, x in enumerate(states)]

    def key(self, layer: Any, x: Tensor, t: int) -> Key:
        return layer.k(x).view(layer.heads, -1), layer.v(x).view(layer.heads, -1)

    def turn(self, x: Tensor, t: int) -> Tensor:
        return x

    def attend(self, layer: Any, q: Tensor, t: int, visible: Visible) -> Tensor:
        return attend(q, visible, q.shape[-1] ** -0.5)

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        return self.second_half(layer, self.first_half(layer, depth, x, t, visible))

    def first_half(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        q = layer.q(x).view(layer.heads, -1)
        return layer.first(x + layer.out(self.attend(layer, q, t, visible)))

    def second_half(self, layer: Any, x: Tensor) -> Tensor:
        return layer.second(x + layer.down(F.gelu(layer.up(x))))

    def norms(self, layer: Any) -> dict[str, nn.Module]:
        return {}

    def projections(self, layer: Any) -> dict[str, Tensor]:
        return named(q=layer.q, k=layer.k, v=layer.v, o=layer.out)

    def head_size(self, layer: Any) -> int:
        return WIDTH // layer.heads

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.model.embed.weight, self.model.head.weight

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x, self.model.head.weight)

    def final_norm(self, x: Tensor) -> Tensor:
        return x

    def head(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight @ x

    def cap(self, logits: Tensor) -> Tensor:
        return logits
