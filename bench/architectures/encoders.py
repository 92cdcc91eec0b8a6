"""Bidirectional text encoders, vision encoders, and encoder-decoders."""

from __future__ import annotations

from functools import partial

from .base import (
    SCANNED,
    STATEFUL,
    VOCAB,
    WIDTH,
    Architecture,
    Inputs,
    causal,
    draw,
    encoder,
    hugging_face,
    ids,
    small,
    vision,
)

IMAGE = {
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
CLIP_TEXT = small(max_position_embeddings=77, eos_token_id=2)
DISTILBERT = {"vocab_size": VOCAB, "dim": WIDTH, "hidden_dim": 128, "n_layers": 4, "n_heads": 4}
XLNET = {"vocab_size": VOCAB, "d_model": WIDTH, "n_layer": 4, "n_head": 4, "d_inner": 128, "use_mems_eval": False}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
MODERNBERT = {"local_attention": 8, "eos_token_id": 2, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 2}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2, 4], "num_heads": [2, 2, 4]}
T5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 4,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "max_position_embeddings": 128,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
MEL_BINS, MEL_FRAMES = 16, 64
WHISPER = BART | {
    "num_mel_bins": MEL_BINS,
    "max_source_positions": MEL_FRAMES // 2,
    "max_target_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
DECODER_TOKENS: dict[str | int, str] = {"decoder_input_ids": "bt"}


def pair_inputs(length: int = 17, batch: int = 3) -> Inputs:
    """Encoder and decoder tokens of different lengths, so that the two token axes cannot be confused."""
    return (), {"input_ids": ids(batch, length), "decoder_input_ids": ids(batch, length - 6, seed=2)}


def whisper_inputs(length: int = 17, batch: int = 3) -> Inputs:
    features = draw(batch, MEL_BINS, MEL_FRAMES)
    return (), {"input_features": features, "decoder_input_ids": ids(batch, length - 6, seed=2)}


def frame_inputs(length: int = 0, batch: int = 3) -> Inputs:
    """Two video frames an example."""
    return (), {"pixel_values": draw(batch, 2, 3, 32, 32)}


TEXT_ENCODERS = (
    encoder("bert", "Bert", (4,), small(), kind="post-norm", ci=True),
    encoder("roberta", "Roberta", (4,), small(), kind="post-norm", notes="positions count the tokens, not the padding"),
    encoder(
        "albert",
        "Albert",
        (4,),
        small(embedding_size=32, hidden_dropout_prob=0.1),
        kind="tied",
        ci=True,
        notes="one set of weights, applied four times",
    ),
    encoder("distilbert", "DistilBert", (4,), DISTILBERT, kind="post-norm"),
    encoder(
        "deberta_v2",
        "DebertaV2",
        (4,),
        small(share_att_key=True, **DISENTANGLED),
        kind="relative-bias",
        refuses=STATEFUL,
        notes="disentangled attention: content and position scores",
    ),
    encoder("electra", "Electra", (4,), small(embedding_size=32), kind="post-norm"),
    encoder(
        "modernbert",
        "ModernBert",
        (5,),
        small(num_hidden_layers=6, **MODERNBERT),
        kind="sliding",
        notes="layer 0 has no attention norm and is not counted",
    ),
    encoder(
        "xlnet",
        "XLNet",
        (4,),
        XLNET,
        model="XLNetLMHeadModel",
        kind="relative-bias",
        refuses=SCANNED,
        notes="the carry is [token, batch, feature]; memories are off",
    ),
)

VISION = (
    vision("vit", "ViT", (4,), IMAGE, ci=True),
    vision("deit", "DeiT", (4,), IMAGE),
    vision("dinov2", "Dinov2", (4,), IMAGE),
    vision("clip_vision", "CLIPVision", (4,), IMAGE, model="CLIPVisionModel"),
    vision("siglip_vision", "SiglipVision", (4,), IMAGE, model="SiglipVisionModel"),
    vision(
        "swin",
        "Swin",
        (4,),
        SWIN | {"window_size": 2},
        refuses=(*SCANNED, "train"),
        notes="shift pairs, dropped at random in train mode; only the last stage repeats",
    ),
    vision(
        "timesformer",
        "Timesformer",
        (4,),
        IMAGE | {"num_frames": 2},
        inputs=frame_inputs,
        refuses=SCANNED,
        notes="attention over time, then over space",
    ),
    causal(
        "clip_text",
        "CLIPText",
        (4,),
        CLIP_TEXT,
        model="CLIPTextModel",
        refuses=("incremental",),
        notes="causal; pools the position of the largest id",
    ),
)

ENCODER_DECODERS = (
    Architecture(
        "t5",
        partial(hugging_face, "T5Config", "T5ForConditionalGeneration", T5),
        pair_inputs,
        (4, 4),
        kind="relative-bias",
        stream=DECODER_TOKENS,
        ci=True,
    ),
    Architecture(
        "bart",
        partial(hugging_face, "BartConfig", "BartForConditionalGeneration", BART),
        pair_inputs,
        (4, 4),
        kind="encoder-decoder",
        stream=DECODER_TOKENS,
        ci=True,
    ),
    Architecture(
        "whisper",
        partial(hugging_face, "WhisperConfig", "WhisperForConditionalGeneration", WHISPER),
        whisper_inputs,
        (4, 4),
        kind="encoder-decoder",
        stream=DECODER_TOKENS,
        notes="the encoder's length is fixed; dynamic means the decoder's",
    ),
)

ENCODERS = TEXT_ENCODERS + VISION + ENCODER_DECODERS
