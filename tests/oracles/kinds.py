"""Tiny models of every kind, their inputs, and how the oracles read them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .decoders import Gemma2, Llama, Mixtral, NeoX, Qwen3
from .encoder import Bert
from .encoder_decoder import T5, T5Encoder
from .post_norm import PostNorm, PostNormModel
from .rows import LayerMath
from .sizes import VOCAB, WIDTH, WINDOW

KINDS = ("llama", "post_norm", "parallel", "encoder_decoder", "moe", "hybrid")  # decoders
QK_NORM = "qk_norm"  # a decoder, too
ENCODER, RELATIVE_ENCODER = ENCODERS = ("encoder", "relative_encoder")  # of positions, of distances

SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "use_cache": False,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "attn_implementation": "eager"}
GEMMA |= {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}
T5_SIZES = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_heads": 2, "use_cache": False}
T5_SIZES |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
FAMILIES: dict[str, tuple[type, str, dict[str, Any]]] = {
    "llama": (Llama, "Llama", SHARED),
    "parallel": (NeoX, "GPTNeoX", SHARED | {"rotary_pct": 0.5}),
    "encoder_decoder": (T5, "T5", T5_SIZES | {"num_layers": 2}),
    RELATIVE_ENCODER: (T5Encoder, "T5", T5_SIZES),
    "moe": (Mixtral, "Mixtral", SHARED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "hybrid": (Gemma2, "Gemma2", SHARED | GEMMA),
    QK_NORM: (Qwen3, "Qwen3", SHARED | {"head_dim": 8, "attention_bias": True}),
    ENCODER: (Bert, "Bert", {name: value for name, value in SHARED.items() if name != "num_key_value_heads"}),
}

HEADS = {"encoder_decoder": "ForConditionalGeneration", ENCODER: "ForMaskedLM", RELATIVE_ENCODER: "EncoderModel"}
DEPTHS = {"encoder_decoder": "num_decoder_layers", RELATIVE_ENCODER: "num_layers"}


def build(kind: str, layers: int = 8, seed: int = 0, noise: float = 0.2, **sizes: int) -> nn.Module:
    """A tiny model in fp64, in eval mode, with no two parameters equal; caches off. `sizes` are for its config."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "post_norm":
            model: nn.Module = PostNormModel(layers)
        else:
            _, family, options = FAMILIES[kind]
            options = options | {DEPTHS.get(kind, "num_hidden_layers"): layers} | sizes
            head = HEADS.get(kind, "ForCausalLM")
            model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**options))
        model = model.double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * noise)
    return model


def math_of(kind: str, model: nn.Module) -> LayerMath:
    return PostNorm(model) if kind == "post_norm" else FAMILIES[kind][0](model)


def token_input(kind: str) -> str:
    """The argument with the tokens that are routed; a mask of theirs is named alike."""
    return {"post_norm": "ids", "encoder_decoder": "decoder_input_ids"}.get(kind, "input_ids")


def inputs_of(kind: str, real: Tensor, seed: int = 0, documents: Tensor | None = None) -> dict[str, Tensor]:
    """Keyword arguments of a model for tokens of which `real` [B, S] are no padding; packed rows have no padding."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(1, VOCAB, shape, generator=generator)

    name = token_input(kind)
    mask = "decoder_attention_mask" if kind == "encoder_decoder" else "attention_mask"
    inputs = {name: ids(*real.shape)} | ({} if real.all() else {mask: real.long()})
    if documents is not None:
        inputs |= packed(kind, documents)
    if kind == "encoder_decoder":
        encoder = torch.ones(len(real), 5, dtype=torch.long)
        encoder[-1, -2:] = 0
        inputs |= {"input_ids": ids(*encoder.shape), "attention_mask": encoder}
    return inputs


def packed(kind: str, documents: Tensor) -> dict[str, Tensor]:
    """Positions that restart (Hugging Face decoders read the documents from them), or a mask of pairs."""
    same = documents[:, :, None] == documents[:, None]
    if kind == "encoder_decoder":
        return {"decoder_attention_mask": same.tril()[:, None]}
    if kind == "post_norm":
        return {"attention_mask": same}
    if kind == RELATIVE_ENCODER:
        return {"attention_mask": same[:, None]}
    positions = {"position_ids": same.tril().sum(-1) - 1}
    return positions | ({"attention_mask": same[:, None]} if kind == ENCODER else {})
