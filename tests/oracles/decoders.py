"""Decoders of Hugging Face, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Key, Visible, attend, mix, rotate, scores_of
from .rows import Inputs, lookup, named


class Llama:
    """Pre-norm, rotary, grouped keys, gated MLP."""

    causal = True
    cross_first = False  # where a new cross-attention stands: in front of the layer, or between its halves

    def __init__(self, model: Any) -> None:
        self.model, self.base, self.layers = model, model.model, model.model.layers

    def embed(self, inputs: Inputs, row: int, table: Tensor | None = None) -> list[Tensor]:
        ids = inputs["input_ids"][row]
        positions = inputs["position_ids"][row] if "position_ids" in inputs else torch.arange(len(ids))
        states = lookup(self.model.get_input_embeddings(), ids, table)
        cos, sin = self.base.rotary_emb(states, positions[None])
        self.rotary = list(zip(cos[0], sin[0], strict=True))
        return list(states)

    def key(self, layer: Any, x: Tensor, t: int) -> Key:
        attention, x = layer.self_attn, layer.input_layernorm(x)
        k, v = (linear(x).view(-1, attention.head_dim) for linear in (attention.k_proj, attention.v_proj))
        return self.turn(k, t), v

    def query(self, layer: Any, x: Tensor, t: int) -> Tensor:
        attention = layer.self_attn
        return self.turn(attention.q_proj(layer.input_layernorm(x)).view(-1, attention.head_dim), t)

    def turn(self, x: Tensor, t: int) -> Tensor:
        return rotate(x, *self.rotary[t])

    def attend(self, layer: Any, q: Tensor, t: int, visible: Visible) -> Tensor:
        return attend(q, visible, layer.self_attn.scaling)

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        return self.second_half(layer, self.first_half(layer, depth, x, t, visible))

    def first_half(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        return x + layer.self_attn.o_proj(self.attend(layer, self.query(layer, x, t), t, visible))

    def second_half(self, layer: Any, x: Tensor) -> Tensor:
        return x + self.feed(layer.mlp, layer.post_attention_layernorm(x))

    def feed(self, mlp: Any, x: Tensor) -> Tensor:
        return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))

    def norms(self, layer: Any) -> dict[str, nn.Module]:
        return {"norm": layer.input_layernorm}

    def projections(self, layer: Any) -> dict[str, Tensor]:
        attention = layer.self_attn
        return named(q=attention.q_proj, k=attention.k_proj, v=attention.v_proj, o=attention.o_proj)

    def head_size(self, layer: Any) -> int:
        return layer.self_attn.head_dim

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.model.get_input_embeddings().weight, self.model.lm_head.weight

    def finish(self, x: Tensor) -> Tensor:
        return self.cap(self.head(self.final_norm(x), self.model.lm_head.weight))

    def final_norm(self, x: Tensor) -> Tensor:
        return self.base.norm(x)

    def head(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight @ x

    def cap(self, logits: Tensor) -> Tensor:
        return logits


class Qwen3(Llama):
    """Norms on the heads of queries and keys."""

    def key(self, layer: Any, x: Tensor, t: int) -> Key:
        attention, x = layer.self_attn, layer.input_layernorm(x)
        k, v = (linear(x).view(-1, attention.head_dim) for linear in (attention.k_proj, attention.v_proj))
        return self.turn(attention.k_norm(k), t), v

    def query(self, layer: Any, x: Tensor, t: int) -> Tensor:
        attention = layer.self_attn
        return self.turn(attention.q_norm(attention.q_proj(layer.input_layernorm(x)).view(-1, attention.head_dim)), t)

    def norms(self, layer: Any) -> dict[str, nn.Module]:
        return super().norms(layer) | {"q_norm": layer.self_attn.q_norm, "k_norm": layer.self_attn.k_norm}


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

    def first_half(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        config = self.base.config
        if config.layer_types[depth] == "sliding_attention":
            visible = [(j, key) for j, key in visible if t - j < config.sliding_window]
        mixed = self.attend(layer, self.query(layer, x, t), t, visible)
        return x + layer.post_attention_layernorm(layer.self_attn.o_proj(mixed))

    def second_half(self, layer: Any, x: Tensor) -> Tensor:
        return x + layer.post_feedforward_layernorm(self.feed(layer.mlp, layer.pre_feedforward_layernorm(x)))

    def attend(self, layer: Any, q: Tensor, t: int, visible: Visible) -> Tensor:
        if not visible:
            return torch.zeros_like(q).flatten()
        cap, at = self.base.config.attn_logit_softcapping, [j for j, _ in visible]
        scores = torch.full((len(q), len(self.rotary)), -torch.inf, dtype=q.dtype)
        scores[:, at] = torch.tanh(scores_of(q, visible, layer.self_attn.scaling) / cap) * cap
        return mix(scores.softmax(-1, dtype=torch.float32).to(q.dtype)[:, at], visible)

    def feed(self, mlp: Any, x: Tensor) -> Tensor:
        return mlp.down_proj(F.gelu(mlp.gate_proj(x), approximate="tanh") * mlp.up_proj(x))

    def cap(self, logits: Tensor) -> Tensor:
        cap = self.base.config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap


class NeoX(Llama):
    """Attention and MLP side by side, each with its norm; q, k, v interleaved by head; half of a head is rotary."""

    cross_first = True

    def __init__(self, model: Any) -> None:
        self.model, self.base, self.layers = model, model.gpt_neox, model.gpt_neox.layers

    def fused(self, layer: Any, x: Tensor) -> tuple[Tensor, ...]:
        attention = layer.attention
        return attention.query_key_value(layer.input_layernorm(x)).view(-1, 3 * attention.head_size).chunk(3, -1)

    def key(self, layer: Any, x: Tensor, t: int) -> Key:
        _, k, v = self.fused(layer, x)
        return self.turn(k, t), v

    def query(self, layer: Any, x: Tensor, t: int) -> Tensor:
        return self.turn(self.fused(layer, x)[0], t)

    def attend(self, layer: Any, q: Tensor, t: int, visible: Visible) -> Tensor:
        return attend(q, visible, layer.attention.scaling)

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        mixed = self.attend(layer, self.query(layer, x, t), t, visible)
        return x + layer.attention.dense(mixed) + self.feed(layer.mlp, layer.post_attention_layernorm(x))

    def feed(self, mlp: Any, x: Tensor) -> Tensor:
        return mlp.dense_4h_to_h(F.gelu(mlp.dense_h_to_4h(x)))

    def projections(self, layer: Any) -> dict[str, Tensor]:
        found = named(o=layer.attention.dense)
        for name, fused in layer.attention.query_key_value.named_parameters():
            split = fused.unflatten(0, (-1, 3, layer.attention.head_size)).unbind(1)
            found |= {f"{part}.{name}": p.flatten(0, 1) for part, p in zip("qkv", split, strict=True)}
        return found

    def head_size(self, layer: Any) -> int:
        return layer.attention.head_size

    def final_norm(self, x: Tensor) -> Tensor:
        return self.base.final_layer_norm(x)
