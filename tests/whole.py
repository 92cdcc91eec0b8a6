"""Layers of the tiny decoders on all positions at once, by the models' own modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

WHOLE = ("llama", "post_norm", "parallel", "moe")  # the kinds


@dataclass(frozen=True)
class Whole:
    embed: Callable[[Tensor, Tensor], Tensor]  # of ids and a table
    first_half: Callable[[Any, Tensor], Tensor]  # nothing, where attention and MLP are side by side
    second_half: Callable[[Any, Tensor], Tensor]
    turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # rotary positions on queries and keys

    def layer(self, layer: Any, x: Tensor) -> Tensor:
        return self.second_half(layer, self.first_half(layer, x))


def whole_of(kind: str, model: Any, positions: Tensor) -> Whole:
    """Of tokens at these positions [S], which see those before them."""
    causal = (positions[:, None] >= positions)[None, None]
    if kind == "post_norm":
        return post_norm(model, positions, causal)
    base, code = (model.gpt_neox, modeling_gpt_neox) if kind == "parallel" else (model.model, modeling_llama)
    table = base.rotary_emb(torch.zeros(1, dtype=torch.float64), positions[None])
    more = {"attention_mask": causal, "position_embeddings": table}

    def first_half(layer: Any, x: Tensor) -> Tensor:
        return x if kind == "parallel" else x + layer.self_attn(layer.input_layernorm(x), **more)[0]

    def second_half(layer: Any, x: Tensor) -> Tensor:
        if kind == "parallel":
            return layer(x, **more)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    return Whole(F.embedding, first_half, second_half, lambda q, k: code.apply_rotary_pos_emb(q, k, *table))


def post_norm(model: Any, positions: Tensor, causal: Tensor) -> Whole:
    def first_half(layer: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
        mixed = F.scaled_dot_product_attention(q, k, v, causal)
        return layer.first(x + layer.out(mixed.transpose(1, 2).flatten(2)))

    def second_half(layer: Any, x: Tensor) -> Tensor:
        return layer.second(x + layer.down(F.gelu(layer.up(x))))

    def embed(ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, table) + model.positions(positions)

    return Whole(embed, first_half, second_half, lambda q, k: (q, k))
