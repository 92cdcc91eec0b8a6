"""T5, token by token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Key, Visible, attend
from .rows import Inputs, lookup, named


class Relative:
    """A stack of T5's layers. The bias table of all of them is in the first; scores are not scaled."""

    causal: bool
    table: Any

    def key(self, layer: Any, x: Tensor, t: int) -> Key:
        return self.pair(layer.layer[0].SelfAttention, layer.layer[0].layer_norm(x))

    def pair(self, attention: Any, x: Tensor) -> Key:
        k, v = (linear(x).unflatten(-1, (attention.n_heads, -1)) for linear in (attention.k, attention.v))
        return k, v

    def attention(self, part: Any, x: Tensor, t: int, visible: Visible) -> Tensor:
        attention = part.SelfAttention
        q = attention.q(part.layer_norm(x)).view(attention.n_heads, -1)
        return x + attention.o(self.attend(part, q, t, visible))

    def attend(self, layer: Any, q: Tensor, t: int, visible: Visible) -> Tensor:
        return attend(q, visible, 1.0, lambda j: self.table.weight[self.bucket(t - j)])

    def feed_forward(self, part: Any, x: Tensor) -> Tensor:
        return x + part.DenseReluDense.wo(F.relu(part.DenseReluDense.wi(part.layer_norm(x))))

    def bucket(self, distance: int) -> int:
        """Exact for near positions, then logarithmic; an encoder has other buckets for later positions."""
        count, most = self.table.num_embeddings, self.model.config.relative_attention_max_distance
        count, first = (count, 0) if self.causal else (count // 2, count // 2 if distance < 0 else 0)
        exact, distance = count // 2, abs(distance)
        if distance < exact:
            return first + distance
        far = torch.log(torch.tensor(distance).float() / exact) / math.log(most / exact)
        return first + min(exact + int(far * (count - exact)), count - 1)


class T5Encoder(Relative):
    """The encoder alone; what it finishes with are states."""

    causal = False

    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, model.encoder.block
        self.table = self.layers[0].layer[0].SelfAttention.relative_attention_bias

    def embed(self, inputs: Inputs, row: int) -> list[Tensor]:
        return list(self.model.encoder.embed_tokens(inputs["input_ids"][row]))

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        own, feed = layer.layer
        return self.feed_forward(feed, self.attention(own, x, t, visible))

    def finish(self, x: Tensor) -> Tensor:
        return self.model.encoder.final_layer_norm(x)


class T5(Relative):
    """The decoder of an encoder-decoder."""

    causal = True
    cross_first = False

    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, model.decoder.block
        self.table = self.layers[0].layer[0].SelfAttention.relative_attention_bias

    def embed(self, inputs: Inputs, row: int, table: Tensor | None = None) -> list[Tensor]:
        ids, mask = inputs["input_ids"][row], inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask[row]
        encoded = self.model.encoder(ids[None], mask[None]).last_hidden_state[0]
        self.encoded = encoded[mask.bool()]
        return list(lookup(self.model.decoder.embed_tokens, inputs["decoder_input_ids"][row], table))

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        return self.second_half(layer, self.first_half(layer, depth, x, t, visible))

    def first_half(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        own, cross, _ = layer.layer
        x = self.attention(own, x, t, visible)
        attention = cross.EncDecAttention
        q = attention.q(cross.layer_norm(x)).view(attention.n_heads, -1)
        return x + attention.o(attend(q, list(enumerate(zip(*self.pair(attention, self.encoded), strict=True))), 1.0))

    def second_half(self, layer: Any, x: Tensor) -> Tensor:
        return self.feed_forward(layer.layer[2], x)

    def turn(self, x: Tensor, t: int) -> Tensor:
        return x

    def norms(self, layer: Any) -> dict[str, nn.Module]:
        return {"norm": layer.layer[0].layer_norm}

    def projections(self, layer: Any) -> dict[str, Tensor]:
        attention = layer.layer[0].SelfAttention
        return named(q=attention.q, k=attention.k, v=attention.v, o=attention.o)

    def head_size(self, layer: Any) -> int:
        return layer.layer[0].SelfAttention.key_value_proj_dim

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.model.decoder.embed_tokens.weight, self.model.lm_head.weight

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.final_norm(x), self.model.lm_head.weight)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.model.decoder.final_layer_norm(x)

    def head(self, x: Tensor, weight: Tensor) -> Tensor:
        scale = self.model.config.d_model**-0.5 if self.model.config.scale_decoder_outputs else 1.0
        return weight @ (x * scale)

    def cap(self, logits: Tensor) -> Tensor:
        return logits
