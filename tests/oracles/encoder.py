"""BERT, token by token: every token sees every other."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .attention import Key, Visible, attend
from .rows import Inputs


class Bert:
    """Norms behind the residual sums, learned positions."""

    causal = False

    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, model.bert.encoder.layer

    def embed(self, inputs: Inputs, row: int) -> list[Tensor]:
        ids = inputs["input_ids"][row, None]
        positions = inputs["position_ids"][row, None] if "position_ids" in inputs else None
        return list(self.model.bert.embeddings(input_ids=ids, position_ids=positions)[0])

    def key(self, layer: Any, x: Tensor, t: int) -> Key:
        attention = layer.attention.self
        heads = attention.num_attention_heads
        return attention.key(x).view(heads, -1), attention.value(x).view(heads, -1)

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        attention, out = layer.attention.self, layer.attention.output
        q = attention.query(x).view(attention.num_attention_heads, -1)
        x = out.LayerNorm(x + out.dense(attend(q, visible, attention.scaling)))
        return layer.output.LayerNorm(x + layer.output.dense(F.gelu(layer.intermediate.dense(x))))

    def finish(self, x: Tensor) -> Tensor:
        return self.model.cls(x)
