"""Architectures that the research behind the compiler never saw: they keep the rules honest."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from .base import (
    HYBRID,
    NOT_CAUSAL,
    RECURSIONS,
    SCANNED,
    WIDTH,
    Architecture,
    Inputs,
    Options,
    causal,
    draw,
    hugging_face,
    ids,
    seeded,
    small,
)
from .encoders import BART, CLIP_TEXT, DECODER_TOKENS, IMAGE, pair_inputs

IMAGE_TOKEN, PATCHES = 1, 16


def audio_inputs(length: int = 17, batch: int = 3) -> Inputs:
    """Raw audio: the feature extractor shortens it 320 times, to about `length` tokens."""
    return (), {"input_values": draw(batch, 320 * length + 80)}


def two_tower_inputs(length: int = 17, batch: int = 3) -> Inputs:
    return (), {"input_ids": ids(batch, length), "pixel_values": draw(batch, 3, 32, 32)}


def image_and_text_inputs(length: int = 24, batch: int = 3) -> Inputs:
    """Every prompt starts with the places of one image's patches."""
    tokens = ids(batch, length)
    tokens[:, :PATCHES] = IMAGE_TOKEN
    return (), {"input_ids": tokens, "pixel_values": draw(batch, 3, 32, 32)}


def two_tower(text: Options, image: Options) -> nn.Module:
    import transformers

    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=32)
    return seeded(lambda: transformers.CLIPModel(config))


def image_and_text(text: Options, image: Options) -> nn.Module:
    import transformers

    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**image),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
    )
    return seeded(lambda: transformers.LlavaForConditionalGeneration(config))


TEXT = (
    causal(
        "nemotron_h",
        "NemotronH",
        (2,),  # layers are mixers closed by an MLP: (scan MLP) once, then (scan attention MLP) twice
        small(
            layer_types=[
                "linear_attention",
                "mlp",
                "linear_attention",
                "full_attention",
                "mlp",
                "linear_attention",
                "full_attention",
                "mlp",
            ],
            head_dim=16,
            ssm_state_size=16,
            mamba_num_heads=8,
            mamba_head_dim=16,
            n_groups=2,
            chunk_size=8,
        ),
        kind="hybrid",
        refuses=SCANNED,
        notes="irregular: three layer kinds in no period",
    ),
    causal(
        "minimax",
        "MiniMax",
        (4,),
        small(
            num_local_experts=4,
            num_experts_per_tok=2,
            block_size=8,
            layer_types=["linear_attention", "full_attention"] * 2,
        ),
        kind="hybrid",
        refuses=HYBRID,
        dynamic="batch",
        other=(17, 5),
        notes="lightning attention: one Python loop step a block of tokens",
    ),
    causal("persimmon", "Persimmon", (4,), small(), kind="plain", notes="fused projections, norms on queries and keys"),
    causal(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        (5,),
        small(num_hidden_layers=6, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_intermediate_size=32),
        kind="moe",
        notes="the one dense first layer repeats nothing and is not counted",
    ),
    causal("granitemoe", "GraniteMoe", (4,), small(num_local_experts=4, num_experts_per_tok=2), kind="moe"),
    causal(
        "exaone4",
        "Exaone4",
        (8,),
        small(num_hidden_layers=8, sliding_window=8),
        kind="sliding",
        notes="post-norm; three sliding layers with rotary positions, one full without",
    ),
    causal("apertus", "Apertus", (4,), small(), notes="an activation with its own parameters"),
    causal("arcee", "Arcee", (4,), small(), notes="squared relu, no gate"),
    causal(
        "diffllama",
        "DiffLlama",
        (4,),
        small(),
        refuses=RECURSIONS,
        notes="differential attention; one constant differs per layer",
    ),
)

OTHER = (
    Architecture(
        "hubert",
        partial(
            hugging_face,
            "HubertConfig",
            "HubertModel",
            {
                "hidden_size": WIDTH,
                "intermediate_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "conv_dim": [32] * 7,
                "num_conv_pos_embeddings": 16,
                "num_conv_pos_embedding_groups": 4,
            },
        ),
        audio_inputs,
        (4,),
        kind="audio",
        refuses=(*NOT_CAUSAL, "train"),
        notes="in train mode layers are dropped, and features masked by numpy's random state",
    ),
    Architecture(
        "pegasus",
        partial(hugging_face, "PegasusConfig", "PegasusForConditionalGeneration", BART),
        pair_inputs,
        (4, 4),
        kind="encoder-decoder",
        stream=DECODER_TOKENS,
    ),
    Architecture(
        "clip",
        partial(two_tower, CLIP_TEXT, IMAGE | {"num_hidden_layers": 3}),
        two_tower_inputs,
        (3, 4),
        kind="two-tower",
        refuses=NOT_CAUSAL,
        notes="vision runs first; neither tower reads the other",
    ),
    Architecture(
        "llava",
        partial(image_and_text, small(), IMAGE),
        image_and_text_inputs,
        (3, 4),
        kind="vision-language",
        refuses=NOT_CAUSAL,
        length=24,
        other=(30, 3),
        dynamic="length",
        stream={"input_ids": "bt"},
        notes="the features of the last but one vision layer: one of four layers is dead",
    ),
)

HELD_OUT = tuple(replace(entry, held_out=True) for entry in TEXT + OTHER)
