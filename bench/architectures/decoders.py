"""Decoder-only language models whose layers all attend (or all mix with experts): no state-space layers here."""

from __future__ import annotations

from .base import RECURSIONS, VOCAB, WIDTH, causal, small

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32}
GROUPS = {"n_group": 2, "topk_group": 1}
OLD_STYLE = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 4, "n_head": 4, "n_positions": 128}
BLOOM = {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": 4, "n_head": 4}
MPT = {"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": 4, "n_heads": 4, "max_seq_len": 128}
ALTUP = {"altup_num_inputs": 2, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB}
LOCAL_GLOBAL = {"attention_types": [[["global", "local"], 2]], "window_size": 8, "max_position_embeddings": 128}
GPT_NEO = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_layers": 4, "num_heads": 4, **LOCAL_GLOBAL}

LLAMA_LIKE = (
    causal("llama", "Llama", (4,), small()),
    causal("qwen2", "Qwen2", (4,), small()),
    causal("qwen3", "Qwen3", (4,), small(head_dim=16)),
    causal("mistral", "Mistral", (4,), small(sliding_window=8), kind="sliding"),
    causal("gemma", "Gemma", (4,), small(head_dim=16)),
    causal("phi3", "Phi3", (4,), small()),
    causal("opt", "OPT", (4,), small(word_embed_proj_dim=WIDTH, ffn_dim=128)),
    causal("biogpt", "BioGpt", (4,), small()),
    causal("stablelm", "StableLm", (4,), small()),
    causal("starcoder2", "Starcoder2", (4,), small()),
    causal("olmo", "Olmo", (4,), small()),
    causal("olmo2", "Olmo2", (4,), small(), kind="post-norm"),
    causal("granite", "Granite", (4,), small(residual_multiplier=0.5, attention_multiplier=0.25)),
    causal("glm4", "Glm4", (4,), small(head_dim=16), kind="sandwich-norm"),
    causal("gpt2", "GPT2", (4,), OLD_STYLE, model="GPT2LMHeadModel"),
    causal("llama_28L", "Llama", (28,), small(num_hidden_layers=28), notes="deep: outline time"),
)

PARALLEL = (
    causal("phi", "Phi", (4,), small(), kind="parallel"),
    causal("gpt_neox", "GPTNeoX", (4,), small(hidden_dropout=0.1, attention_dropout=0.1), kind="parallel"),
    causal("gptj", "GPTJ", (4,), OLD_STYLE | {"rotary_dim": 8}, kind="parallel"),
    causal("falcon", "Falcon", (4,), small(num_kv_heads=2, new_decoder_architecture=True), kind="parallel", ci=True),
    causal("cohere", "Cohere", (4,), small(), kind="parallel"),
    causal(
        "cohere2",
        "Cohere2",
        (8,),
        small(num_hidden_layers=8, sliding_window=8),
        kind="parallel",
        notes="three sliding layers, then a full one without rotary positions",
    ),
)

ALIBI = (causal("bloom", "Bloom", (4,), BLOOM, kind="alibi", ci=True), causal("mpt", "Mpt", (4,), MPT, kind="alibi"))

SLIDING = (
    causal(
        "gemma2",
        "Gemma2",
        (6,),
        small(num_hidden_layers=6, head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
        kind="sliding",
        ci=True,
        notes="soft-capped scores, sliding and full layers alternate",
    ),
    causal(
        "gemma3_text",
        "Gemma3",
        (12,),
        small(num_hidden_layers=12, head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
        config="Gemma3TextConfig",
        kind="sliding",
        notes="five sliding, one full; two rotary bases",
    ),
    causal(
        "gemma3n_text",
        "Gemma3n",
        (10,),
        small(num_hidden_layers=10, head_dim=16, sliding_window=8, laurel_rank=8, num_kv_shared_layers=0, **ALTUP),
        config="Gemma3nTextConfig",
        kind="altup",
        refuses=("train", *RECURSIONS, "mod"),
        notes="AltUp: the carry is [streams, batch, token, feature]; each layer reads an embedding of its own; train"
        " mode clamps weights in place",
    ),
    causal("gpt_neo", "GPTNeo", (4,), GPT_NEO, kind="sliding"),
    causal(
        "smollm3",
        "SmolLM3",
        (8,),
        small(num_hidden_layers=8),
        kind="nope",
        notes="every fourth layer has no rotary positions; all layers attend to the full past",
    ),
    causal(
        "gpt_oss",
        "GptOss",
        (6,),
        small(num_hidden_layers=6, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        kind="moe",
        notes="attention sinks, sliding and full layers alternate",
    ),
)

MOE = (
    causal("qwen3_moe", "Qwen3Moe", (4,), small(head_dim=16) | EXPERTS, kind="moe"),
    causal("mixtral", "Mixtral", (4,), small(num_local_experts=4, num_experts_per_tok=2), kind="moe"),
    causal("olmoe", "Olmoe", (4,), small(num_experts=4, num_experts_per_tok=2), kind="moe", ci=True),
    causal(
        "llama4_text",
        "Llama4",
        (8,),
        small(
            num_hidden_layers=8,
            head_dim=16,
            intermediate_size_mlp=128,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            attention_chunk_size=8,
            floor_scale=8,
        ),
        config="Llama4TextConfig",
        kind="moe",
        notes="chunked attention, one in four without rotary positions",
    ),
    causal(
        "qwen3_moe_28L",
        "Qwen3Moe",
        (28,),
        small(num_hidden_layers=28, head_dim=16) | EXPERTS,
        kind="moe",
        notes="deep: outline time",
    ),
)

MLA = (
    causal(
        "deepseek_v2",
        "DeepseekV2",
        (5,),
        small(num_hidden_layers=6, num_key_value_heads=4, first_k_dense_replace=1) | LATENT | ROUTED,
        kind="mla",
        ci=True,
        notes="the one dense first layer repeats nothing and is not counted",
    ),
    causal(
        "deepseek_v3",
        "DeepseekV3",
        (6,),
        small(num_hidden_layers=6, num_key_value_heads=4, first_k_dense_replace=2) | LATENT | ROUTED | GROUPS,
        kind="mla",
        notes="two dense layers and four with experts on one trunk",
    ),
)

DECODERS = LLAMA_LIKE + PARALLEL + ALIBI + SLIDING + MOE + MLA
