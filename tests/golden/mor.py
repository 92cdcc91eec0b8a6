# Model after 2. route(): what it computes, as PyTorch code. Written by depthc 0.1.0.
#
# What runs is what stands here, and it may be edited. `parameters` makes the program's parameters of the captured
# model's tensors, `forward` computes its outputs from them:
#
#     w = parameters(dict(model.named_buffers()) | model.state_dict())
#     out = forward(w, ids)
#
# `python FILE` does so with random numbers, and prints the shapes of the outputs.
#
# Functions marked @block run on some of the tokens, or with keys and values of other applications. depthc looks at what
# they do to every token, and moves the rows: see depthc.codegen.python.routed.

import math
import sys

import torch

from depthc.codegen.python.routed import block, everyone, on, threshold, topk

aten = torch.ops.aten


def prologue(ids: "i64[b, s]", embed_weight: "f32[13, 8]", *, device):
    s = ids.shape[1]
    h = aten.embedding(embed_weight, ids)
    row = aten.arange.default(s, device=device)
    past = aten.unsqueeze(row, 1) >= aten.unsqueeze(row, 0)
    return h, past


LAYER = (
    "norm.0.weight",
    "attention.q.weight",
    "attention.q.bias",
    "attention.kv.weight",
    "attention.out.weight",
    "attention.out.bias",
    "norm.1.weight",
    "mlp.up.weight",
    "mlp.up.bias",
    "mlp.down.weight",
    "mlp.down.bias",
)


@block(values=2)
def layer(
    h: "f32[b, s, 8]",
    past: "bool[s, s]",
    norm_0_weight: "f32[8]",
    attention_q_weight: "f32[8, 8]",
    attention_q_bias: "f32[8]",
    attention_kv_weight: "f32[16, 8]",
    attention_out_weight: "f32[8, 8]",
    attention_out_bias: "f32[8]",
    norm_1_weight: "f32[8]",
    mlp_up_weight: "f32[16, 8]",
    mlp_up_bias: "f32[16]",
    mlp_down_weight: "f32[8, 16]",
    mlp_down_bias: "f32[8]",
):
    b, s = h.shape[:2]
    norm = norm_0_weight * (h * aten.rsqrt(aten.mean.dim(h**2, [-1], True) + 1e-06))
    q = aten.reshape(aten.linear(norm, attention_q_weight, attention_q_bias), [b, s, 2, -1])
    kv = aten.chunk(aten.linear(norm, attention_kv_weight), 2, -1)
    transpose_1 = aten.transpose.int(aten.reshape(kv[0], [b, s, 2, -1]), 1, 2)
    transpose_2 = aten.transpose.int(aten.reshape(kv[1], [b, s, 2, -1]), 1, 2)
    q_1 = aten.transpose.int(q, 1, 2)
    mixed = aten.scaled_dot_product_attention(q_1, transpose_1, transpose_2, past)
    mixed_1 = aten.reshape(aten.transpose.int(mixed, 1, 2), [b, s, 8])
    x = h + aten.linear(mixed_1, attention_out_weight, attention_out_bias)
    norm_1 = norm_1_weight * (x * aten.rsqrt(aten.mean.dim(x**2, [-1], True) + 1e-06))
    gelu_1 = aten.gelu(aten.linear(norm_1, mlp_up_weight, mlp_up_bias))
    return x + aten.linear(gelu_1, mlp_down_weight, mlp_down_bias)


def router(h: "f32[b, s, 8]", router_weight: "f32[8]"):
    return aten.sum.dim_IntList(aten.to.dtype(h, torch.float32) * router_weight, [-1])


def combine(old: "f32[b, k, 8]", new: "f32[b, k, 8]", logit: "f32[b, k]"):
    return old + aten.unsqueeze(aten.sigmoid(logit) * 0.1, -1) * new


def router_loss(logit: "f32[b, s]", chosen: "bool[b, s]", candidates: "bool[b, s]"):
    bcewl = aten.binary_cross_entropy_with_logits(logit, aten.to.dtype(chosen, torch.float32), None, None, 0)
    div_1 = aten.sum.default(aten.masked_fill.Scalar(bcewl, ~candidates, 0.0)) / aten.clamp.default(
        aten.sum.default(candidates), 1
    )
    return div_1 * 0.001


def epilogue(h: "f32[b, s, 8]", norm_weight: "f32[8]", head_weight: "f32[13, 8]"):
    norm = norm_weight * (h * aten.rsqrt(aten.mean.dim(h**2, [-1], True) + 1e-06))
    return aten.linear(norm, head_weight)


def under(w, prefix, slots, others={}):
    """The parameters of some slots: those of their names under a prefix, or what `others` says instead."""
    return [w[others.get(slot, f"{prefix}.{slot}" if prefix else slot)] for slot in slots]


def normal(shape, std, seed, dtype):
    """A fresh tensor from a seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)


@torch.no_grad()
def parameters(weights):
    """The program's parameters by name, from the captured model's: its state dict and buffers that are not saved."""
    w = {}
    w["depth.r.0.router.weight"] = normal((8,), 0.02, seed=0, dtype=torch.float32)
    w["depth.r.1.router.weight"] = normal((8,), 0.02, seed=1, dtype=torch.float32)
    w["embed.weight"] = weights["embed.weight"]
    for l in range(2):
        w[f"layers.{l}.norm.0.weight"] = weights[f"layers.{l}.norm.0.weight"]
        w[f"layers.{l}.attention.q.weight"] = weights[f"layers.{l}.attention.q.weight"]
        w[f"layers.{l}.attention.q.bias"] = weights[f"layers.{l}.attention.q.bias"]
        w[f"layers.{l}.attention.kv.weight"] = weights[f"layers.{l}.attention.kv.weight"]
        w[f"layers.{l}.attention.out.weight"] = weights[f"layers.{l}.attention.out.weight"]
        w[f"layers.{l}.attention.out.bias"] = weights[f"layers.{l}.attention.out.bias"]
        w[f"layers.{l}.norm.1.weight"] = weights[f"layers.{l}.norm.1.weight"]
        w[f"layers.{l}.mlp.up.weight"] = weights[f"layers.{l}.mlp.up.weight"]
        w[f"layers.{l}.mlp.up.bias"] = weights[f"layers.{l}.mlp.up.bias"]
        w[f"layers.{l}.mlp.down.weight"] = weights[f"layers.{l}.mlp.down.weight"]
        w[f"layers.{l}.mlp.down.bias"] = weights[f"layers.{l}.mlp.down.bias"]
    w["layers.3.norm.0.weight"] = weights["layers.3.norm.0.weight"]
    w["layers.3.attention.q.weight"] = weights["layers.3.attention.q.weight"]
    w["layers.3.attention.q.bias"] = weights["layers.3.attention.q.bias"]
    w["layers.3.attention.kv.weight"] = weights["layers.3.attention.kv.weight"]
    w["layers.3.attention.out.weight"] = weights["layers.3.attention.out.weight"]
    w["layers.3.attention.out.bias"] = weights["layers.3.attention.out.bias"]
    w["layers.3.norm.1.weight"] = weights["layers.3.norm.1.weight"]
    w["layers.3.mlp.up.weight"] = weights["layers.3.mlp.up.weight"]
    w["layers.3.mlp.up.bias"] = weights["layers.3.mlp.up.bias"]
    w["layers.3.mlp.down.weight"] = weights["layers.3.mlp.down.weight"]
    w["layers.3.mlp.down.bias"] = weights["layers.3.mlp.down.bias"]
    w["norm.weight"] = weights["norm.weight"]
    w["head.weight"] = weights["head.weight"]
    return w


def forward(w, ids: "i64[b, s]", *, training=False, taps=None):
    """The program: its outputs, from its parameters by name and the tensors that the model was given.

    `taps`, a dict, is filled with the values that the program exposes: losses and routes.
    """
    taps = {} if taps is None else taps
    device = ids.device
    h, past = prologue(ids, w["embed.weight"], device=device)
    # layers: 4 layers
    h = layer(h, past, *under(w, "layers.0", LAYER))
    real = everyone(h)
    active = everyone(among=real)
    for r in range(2):
        with torch.autocast(device.type, enabled=False):
            logit = router(h, w[f"depth.r.{r}.router.weight"])
        chosen = (
            topk(logit, [1.0, 0.5][r], among=active, of=real)
            if training
            else threshold(logit, [-math.inf, 0.0][r], among=active)
        )
        rows = on(chosen, layer)
        h_rows = rows.take(h)
        y = layer(h_rows, past, *under(w, "layers.1", LAYER), on=rows)
        h = chosen.merge(h, y, combine, extra=(logit,))
        taps[f"route.r.{r}.logit"] = logit
        taps[f"route.r.{r}.candidates"] = active
        taps[f"route.r.{r}.chosen"] = chosen
        loss = router_loss(logit, chosen.mask, active.mask)
        taps[f"loss.r.{r}.router"] = loss
        active = everyone(among=chosen)
    h = layer(h, past, *under(w, "layers.3", LAYER))
    logits = epilogue(h, w["norm.weight"], w["head.weight"])
    return logits


if __name__ == "__main__":
    gigabytes, limit = 7680 / 1e9, float(sys.argv[1]) if len(sys.argv) > 1 else 8
    print(f"weights: {gigabytes:.3g} GB on the CPU; the limit is {limit:g} GB, the first argument of this file")
    if gigabytes > limit:
        sys.exit("too large; give a higher limit")
    torch.manual_seed(0)
    b, s = 2, 8
    weights = {}
    weights["embed.weight"] = 0.02 * torch.randn(13, 8, dtype=torch.float32)
    for l in range(2):
        weights[f"layers.{l}.norm.0.weight"] = 0.02 * torch.randn(8, dtype=torch.float32)
        weights[f"layers.{l}.attention.q.weight"] = 0.02 * torch.randn(8, 8, dtype=torch.float32)
        weights[f"layers.{l}.attention.q.bias"] = 0.02 * torch.randn(8, dtype=torch.float32)
        weights[f"layers.{l}.attention.kv.weight"] = 0.02 * torch.randn(16, 8, dtype=torch.float32)
        weights[f"layers.{l}.attention.out.weight"] = 0.02 * torch.randn(8, 8, dtype=torch.float32)
        weights[f"layers.{l}.attention.out.bias"] = 0.02 * torch.randn(8, dtype=torch.float32)
        weights[f"layers.{l}.norm.1.weight"] = 0.02 * torch.randn(8, dtype=torch.float32)
        weights[f"layers.{l}.mlp.up.weight"] = 0.02 * torch.randn(16, 8, dtype=torch.float32)
        weights[f"layers.{l}.mlp.up.bias"] = 0.02 * torch.randn(16, dtype=torch.float32)
        weights[f"layers.{l}.mlp.down.weight"] = 0.02 * torch.randn(8, 16, dtype=torch.float32)
        weights[f"layers.{l}.mlp.down.bias"] = 0.02 * torch.randn(8, dtype=torch.float32)
    weights["layers.3.norm.0.weight"] = 0.02 * torch.randn(8, dtype=torch.float32)
    weights["layers.3.attention.q.weight"] = 0.02 * torch.randn(8, 8, dtype=torch.float32)
    weights["layers.3.attention.q.bias"] = 0.02 * torch.randn(8, dtype=torch.float32)
    weights["layers.3.attention.kv.weight"] = 0.02 * torch.randn(16, 8, dtype=torch.float32)
    weights["layers.3.attention.out.weight"] = 0.02 * torch.randn(8, 8, dtype=torch.float32)
    weights["layers.3.attention.out.bias"] = 0.02 * torch.randn(8, dtype=torch.float32)
    weights["layers.3.norm.1.weight"] = 0.02 * torch.randn(8, dtype=torch.float32)
    weights["layers.3.mlp.up.weight"] = 0.02 * torch.randn(16, 8, dtype=torch.float32)
    weights["layers.3.mlp.up.bias"] = 0.02 * torch.randn(16, dtype=torch.float32)
    weights["layers.3.mlp.down.weight"] = 0.02 * torch.randn(8, 16, dtype=torch.float32)
    weights["layers.3.mlp.down.bias"] = 0.02 * torch.randn(8, dtype=torch.float32)
    weights["norm.weight"] = 0.02 * torch.randn(8, dtype=torch.float32)
    weights["head.weight"] = 0.02 * torch.randn(13, 8, dtype=torch.float32)
    inputs = {
        "ids": torch.randint(13, (b, s)).to(torch.int64),
    }
    with torch.no_grad():
        out = forward(parameters(weights), **inputs)
    print(torch.utils._pytree.tree_map(lambda x: tuple(x.shape) if torch.is_tensor(x) else x, out))
