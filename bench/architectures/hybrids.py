"""State-space, linear-attention and convolution layers, alone or between attention layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .base import HYBRID, SCANNED, VOCAB, WIDTH, Architecture, Options, causal, small

MAMBA2 = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
RWKV = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 4}
UNROLLED = {"dynamic": "batch", "other": (17, 5)}


def stateful(name: str, family: str, depths: tuple[int, ...], options: Options, **entry: Any) -> Architecture:
    """An entry whose layers carry a state over the tokens: they have no attention cache and no subset of tokens."""
    return causal(name, family, depths, options, **{"refuses": SCANNED} | entry)


def rwkv(name: str, config: dict[str, Any], notes: str) -> Architecture:
    """Its first forward in a mode rescales its weights in place, so it runs once before it is captured."""
    entry = stateful(name, "Rwkv", (4,), config, kind="ssm", **UNROLLED, notes=notes)

    def build() -> nn.Module:
        model = entry.build()
        with torch.no_grad():
            model(*entry.example()[0], **entry.example()[1])
        return model

    return replace(entry, build=build, refuses=(*entry.refuses, "train"))


HYBRIDS = (
    stateful(
        "qwen3_next",
        "Qwen3Next",
        (8,),
        small(
            num_hidden_layers=8,
            head_dim=16,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
        kind="hybrid",
        refuses=HYBRID,
        tolerance=1e-5,
        notes="three gated delta rules, one attention; slow to export: the delta rule is unrolled over its chunk",
    ),
    stateful(
        "jamba",
        "Jamba",
        (8,),
        small(
            num_hidden_layers=8,
            attn_layer_period=4,
            attn_layer_offset=2,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            mamba_d_state=8,
            mamba_dt_rank=8,
            use_mamba_kernels=False,
        ),
        kind="hybrid",
        refuses=HYBRID,
        **UNROLLED,
        notes="the scan is a Python loop over the tokens",
    ),
    stateful(
        "mamba",
        "Mamba",
        (4,),
        small(state_size=8),
        kind="ssm",
        **UNROLLED,
        notes="the scan is a Python loop over the tokens",
    ),
    stateful(
        "mamba2", "Mamba2", (4,), small(state_size=16, num_heads=8, head_dim=16, n_groups=2, chunk_size=8), kind="ssm"
    ),
    stateful(
        "zamba2",
        "Zamba2",
        (6,),
        small(
            num_hidden_layers=6,
            num_key_value_heads=4,
            layers_block_type=["mamba", "mamba", "hybrid"] * 2,
            n_mamba_heads=8,
            mamba_d_state=16,
            chunk_size=8,
            adapter_rank=8,
        ),
        kind="hybrid",
        notes="a shared block reads the embedding at both of its calls",
    ),
    stateful(
        "bamba",
        "Bamba",
        (6,),
        small(num_hidden_layers=6, attn_layer_indices=[2, 5]) | MAMBA2,
        kind="hybrid",
        refuses=HYBRID,
    ),
    stateful(
        "falcon_h1",
        "FalconH1",
        (4,),
        small(mamba_d_ssm=128) | MAMBA2,
        kind="hybrid",
        notes="attention and state space side by side in each layer",
    ),
    stateful(
        "lfm2",
        "Lfm2",
        (6,),
        small(num_hidden_layers=6, layer_types=["conv", "conv", "full_attention"] * 2, block_multiple_of=32),
        kind="hybrid",
        refuses=HYBRID,
        ci=True,
        notes="two short convolutions, one attention",
    ),
    stateful(
        "recurrent_gemma",
        "RecurrentGemma",
        (6,),
        small(num_hidden_layers=6, lru_width=WIDTH, attention_window_size=8),
        kind="hybrid",
        refuses=HYBRID,
        **UNROLLED,
        notes="the recurrence is a Python loop over the tokens",
    ),
    rwkv("rwkv", RWKV, "capture turns its cache off, or one state tensor would thread all layers"),
    rwkv("rwkv_nocache", RWKV | {"use_cache": False}, "as rwkv"),
)
