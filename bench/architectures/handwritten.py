"""Models outside any library: torch's own layers, a scrambled nanoGPT, long skips, and a full-size Llama on meta."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from .base import NOT_CAUSAL, RECURSIONS, VOCAB, WIDTH, Architecture, Inputs, draw, ids, seeded, token_inputs


class Marmalade(nn.Module):
    """A GPT-2 layer in which no name says what it is."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.peel = nn.LayerNorm(width)
        self.pulp = nn.ModuleList([nn.Linear(width, 3 * width), nn.Dropout(0.1), nn.Linear(width, width)])
        self.jar = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, spoon: torch.Tensor) -> torch.Tensor:
        batch, length, width = spoon.shape
        parts = self.pulp[0](self.peel(spoon)).split(width, dim=-1)
        q, k, v = (part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        dropped = 0.1 if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropped)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        spoon = spoon + self.pulp[1](self.pulp[2](mixed))
        return spoon + self.jar(spoon)


class Breakfast(nn.Module):
    """nanoGPT with people's names for layers, called one by one: nothing here but the data flow says "stack"."""

    def __init__(self, vocab: int = VOCAB, width: int = WIDTH, heads: int = 4, longest: int = 128) -> None:
        super().__init__()
        self.erin = Marmalade(width, heads)
        self.toast = nn.Embedding(vocab, width)
        self.alpha = Marmalade(width, heads)
        self.crumbs = nn.Embedding(longest, width)
        self.carol = Marmalade(width, heads)
        self.bob = Marmalade(width, heads)
        self.zed = Marmalade(width, heads)
        self.plate = nn.LayerNorm(width)
        self.table = nn.Linear(width, vocab, bias=False)
        nn.init.normal_(self.toast.weight, std=0.1)
        self.table.weight = self.toast.weight

    def forward(self, order: torch.Tensor) -> torch.Tensor:
        where = torch.arange(order.shape[1], device=order.device)
        spoon = self.alpha(self.toast(order) + self.crumbs(where))
        spoon = self.zed(self.erin(self.carol(self.bob(spoon))))
        return self.table(self.plate(spoon))


class Layer(nn.Module):
    """A pre-norm bidirectional layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        wide = 2 * width
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        batch, length, width = h.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in self.qkv(self.norm(h)).chunk(3, dim=-1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return h + self.mlp(h)


class LongSkips(nn.Module):
    """U-ViT: each layer of the second half also reads the output of its mirror image in the first half."""

    def __init__(self, width: int = WIDTH, heads: int = 4, half: int = 3, features: int = 24) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.down = nn.ModuleList(Layer(width, heads) for _ in range(half))
        self.middle = Layer(width, heads)
        self.up = nn.ModuleList(nn.ModuleList([nn.Linear(2 * width, width), Layer(width, heads)]) for _ in range(half))
        self.head = nn.Linear(width, features)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        h = self.embed(patches)
        skips = []
        for layer in self.down:
            h = layer(h)
            skips.append(h)
        h = self.middle(h)
        for join, layer in self.up:
            h = layer(join(torch.cat([h, skips.pop()], dim=-1)))
        return self.head(h)


def torch_encoder(norm_first: bool) -> nn.Module:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=True, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    return seeded(make)


def torch_decoder() -> nn.Module:
    return seeded(lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 4, 128, batch_first=True), 4))


def llama_8b_meta(**options: object) -> nn.Module:
    """Llama 3 8B at its real sizes on the meta device: 32 layers and no memory. `options` change the configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**(sizes | options))).eval()


def meta_inputs(length: int = 17, batch: int = 3) -> Inputs:
    args, kwargs = token_inputs(length, batch)
    return args, {name: value.to("meta") for name, value in kwargs.items()}


def id_inputs(length: int = 17, batch: int = 3) -> Inputs:
    return (ids(batch, length),), {}


def feature_inputs(features: int, length: int = 17, batch: int = 3) -> Inputs:
    return (draw(batch, length, features),), {}


def memory_inputs(hint: bool, length: int = 17, batch: int = 3) -> Inputs:
    """Decoder inputs with a causal mask as a tensor, and with or without the hint that it is causal."""
    decoded = length - 6
    inputs = {"tgt": draw(batch, decoded, WIDTH), "memory": draw(batch, length, WIDTH, seed=2)}
    inputs["tgt_mask"] = nn.Transformer.generate_square_subsequent_mask(decoded)
    return (), inputs | ({"tgt_is_causal": True} if hint else {})


HAND_WRITTEN = (
    Architecture(
        "nanogpt",
        partial(seeded, Breakfast),
        id_inputs,
        (5,),
        kind="hand-written",
        stream={0: "bt"},
        ci=True,
        notes="layers named after people, called one by one",
    ),
    Architecture(
        "uvit_skip",
        partial(seeded, LongSkips),
        partial(feature_inputs, 24),
        (3, 3),
        kind="long-skip",
        refuses=(*NOT_CAUSAL, *RECURSIONS),
        stream={0: "btf"},
        notes="long skips: the middle layer is left out, or the whole refused with a reason",
    ),
    Architecture(
        "torch_encoder",
        partial(torch_encoder, False),
        partial(feature_inputs, WIDTH),
        (4,),
        kind="post-norm",
        refuses=NOT_CAUSAL,
        stream={0: "btf"},
        tolerance=1e-5,
        notes="eager eval takes torch's fused encoder path: equal to 1e-6, not bitwise",
    ),
    Architecture(
        "torch_encoder_prenorm",
        partial(torch_encoder, True),
        partial(feature_inputs, WIDTH),
        (4,),
        kind="hand-written",
        stream={0: "btf"},
        refuses=NOT_CAUSAL,
        tolerance=1e-5,
        notes="eager eval takes torch's fused encoder path",
    ),
    Architecture(
        "torch_decoder",
        torch_decoder,
        partial(memory_inputs, False),
        (4,),
        kind="hand-written",
        stream={"tgt": "btf", "tgt_mask": "tk"},
        refuses=("captured",),
        notes="a data-dependent branch in torch reads the mask: not exported",
    ),
    Architecture(
        "torch_decoder_causal",
        torch_decoder,
        partial(memory_inputs, True),
        (4,),
        kind="hand-written",
        stream={"tgt": "btf", "tgt_mask": "tk"},
        refuses=("incremental",),
        notes="the hint removes the data-dependent branch, and with it every use of the mask",
    ),
)

META = Architecture(
    "llama_8b_meta",
    llama_8b_meta,
    meta_inputs,
    (32,),
    kind="meta",
    stream={"input_ids": "bt"},
    notes="capture and outline only: there are no values",
)
