"""Decoders of Hugging Face, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import Key, Visible, attend, mix, rotate, scores_of
from .rows import Inputs


class Llama:
    """Pre-norm, rotary, grouped keys, gated MLP."""

    causal = True

    def __init__(self, model: Any) -> None:
        self.model, self.base, self.layers = model, model.model, model.model.layers

    def embed(self, inputs: Inputs, row: int) -> list[Tensor]:
        ids = inputs["input_ids"][row]
        positions = inputs["position_ids"][row] if "position_ids" in inputs else torch.arange(len(ids))
        states = self.model.get_input_embeddings()(ids)
        cos, sin = self.base.rotary_emb(states, positions[None])
        self.rotary = list(zip(cos[0], sin[0], strict=True))
        return list(states)

    def key(self, layer: Any, x: Tensor, t: int) -> Key:
        attention, x = layer.self_attn, layer.input_layernorm(x)
        k, v = (linear(x).view(-1, attention.head_dim) for linear in (attention.k_proj, attention.v_proj))
        return rotate(k, *self.rotary[t]), v

    def query(self, layer: Any, x: Tensor, t: int) -> Tensor:
        attention = layer.self_attn
        return rotate(attention.q_proj(layer.input_layernorm(x)).view(-1, attention.head_dim), *self.rotary[t])

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        mixed = attend(self.query(layer, x, t), visible, layer.self_attn.scaling)
        x = x + layer.self_attn.o_proj(mixed)
        return x + self.feed(layer.mlp, layer.post_attention_layernorm(x))

    def feed(self, mlp: Any, x: Tensor) -> Tensor:
        return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))

    def finish(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.base.norm(x))


class Mixtral(Llama):
    """The two best of four experts; the gate's softmax is fp32."""

    def feed(self, mlp: Any, x: Tensor) -> Tensor:
        shares = F.linear(x, mlp.gate.weight).float().softmax(-1)
        best = shares.topk(2).indices.tolist()
        parts = [self.expert(mlp.experts, e, x) * (shares[e] / shares[best].sum()) for e in best]
        return parts[0] + parts[1]

    def expert(self, experts: Any, e: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, experts.gate_up_proj[e]).chunk(2)
        return F.linear(F.silu(gate) * up, experts.down_proj[e])


class Gemma2(Llama):
    """Norms on both sides, capped scores, a window in every second layer; the softmax is fp32, over a whole row."""

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        config = self.base.config
        if config.layer_types[depth] == "sliding_attention":
            visible = [(j, key) for j, key in visible if t - j < config.sliding_window]
        mixed = self.capped(self.query(layer, x, t), visible, layer.self_attn.scaling)
        x = x + layer.post_attention_layernorm(layer.self_attn.o_proj(mixed))
        return x + layer.post_feedforward_layernorm(self.feed(layer.mlp, layer.pre_feedforward_layernorm(x)))

    def capped(self, q: Tensor, visible: Visible, scale: float) -> Tensor:
        if not visible:
            return torch.zeros_like(q).flatten()
        cap, at = self.base.config.attn_logit_softcapping, [j for j, _ in visible]
        scores = torch.full((len(q), len(self.rotary)), -torch.inf, dtype=q.dtype)
        scores[:, at] = torch.tanh(scores_of(q, visible, scale) / cap) * cap
        return mix(scores.softmax(-1, dtype=torch.float32).to(q.dtype)[:, at], visible)

    def feed(self, mlp: Any, x: Tensor) -> Tensor:
        return mlp.down_proj(F.gelu(mlp.gate_proj(x), approximate="tanh") * mlp.up_proj(x))

    def finish(self, x: Tensor) -> Tensor:
        cap = self.base.config.final_logit_softcapping
        return torch.tanh(super().finish(x) / cap) * cap


class NeoX(Llama):
    """Attention and MLP side by side, each with its norm; q, k, v interleaved by head; half of a head is rotary."""

    def __init__(self, model: Any) -> None:
        self.model, self.base, self.layers = model, model.gpt_neox, model.gpt_neox.layers

    def fused(self, layer: Any, x: Tensor) -> tuple[Tensor, ...]:
        attention = layer.attention
        return attention.query_key_value(layer.input_layernorm(x)).view(-1, 3 * attention.head_size).chunk(3, -1)

    def key(self, layer: Any, x: Tensor, t: int) -> Key:
        _, k, v = self.fused(layer, x)
        return rotate(k, *self.rotary[t]), v

    def query(self, layer: Any, x: Tensor, t: int) -> Tensor:
        return rotate(self.fused(layer, x)[0], *self.rotary[t])

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        mixed = attend(self.query(layer, x, t), visible, layer.attention.scaling)
        return x + layer.attention.dense(mixed) + self.feed(layer.mlp, layer.post_attention_layernorm(x))

    def feed(self, mlp: Any, x: Tensor) -> Tensor:
        return mlp.dense_4h_to_h(F.gelu(mlp.dense_h_to_4h(x)))

    def finish(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.base.final_layer_norm(x))
