"""Small layers of every legality, each as a block: what runs on a subset of its tokens, and what must be refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from traced import HEAD, HEADS, WIDTH, Case, block_cases

# Layers. An attention layer says how weights come from scores; the rest is shared.

Mix = Callable[["Attention", Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.mix = mix
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.extra = nn.Parameter(torch.randn(HEADS, 3, HEAD) * 0.3)
        self.side = nn.Linear(WIDTH, HEADS)
        self.talk = nn.Parameter(torch.randn(HEADS, HEADS) * 0.5)
        self.table = nn.Parameter(torch.randn(7, HEADS) * 0.5)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, HEAD).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], WIDTH)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(h)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return h + self.o(self.merge(self.mix(self, x, q, k, v, mask)))


ROOT = 1 / math.sqrt(HEAD)


def scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * ROOT + mask


def transposed(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.softmax(k @ q.transpose(-1, -2) * ROOT + mask.transpose(-1, -2), dim=-2)
    return weights.transpose(-1, -2) @ v


def by_hand(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores(q, k, mask)
    weights = torch.exp(s - s.amax(-1, keepdim=True))
    return weights @ v / weights.sum(-1, keepdim=True)


def sigmoid(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.sigmoid(scores(q, k, mask) - 1.0) @ v


def rectified(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.relu(scores(q, k, mask))
    return weights @ v / (weights.sum(-1, keepdim=True) + 1.0)


def differential(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    one = torch.softmax(scores(q, k, mask), -1)
    two = torch.softmax(scores(q.flip(1), k * 0.5, mask), -1)
    return (one - 0.3 * two) @ v


def key_bias(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    forget = F.logsigmoid(layer.side(x)).transpose(1, 2).unsqueeze(2)
    return torch.softmax(scores(q, k, mask) + forget, -1) @ v


def memory_keys(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    extra = layer.extra.unsqueeze(0).expand(k.shape[0], -1, -1, -1)
    wide = torch.cat([torch.zeros_like(mask[..., :1]).expand(-1, -1, -1, 3), mask], -1)
    return F.scaled_dot_product_attention(q, torch.cat([extra, k], 2), torch.cat([-extra, v], 2), wide)


def memory_keys_by_hand(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    extra = layer.extra.unsqueeze(0).expand(k.shape[0], -1, -1, -1)
    wide = torch.cat([mask, torch.zeros_like(mask[..., :1]).expand(-1, -1, -1, 3)], -1)
    return torch.softmax(scores(q, torch.cat([k, extra], 2), wide), -1) @ torch.cat([v, extra], 2)


def sinks(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    column = layer.talk[0].reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    s = torch.cat([scores(q, k, mask), column], -1)
    return torch.softmax(s - s.max(-1, keepdim=True).values, -1)[..., :-1] @ v


def softcapped(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = torch.tanh(q @ k.transpose(-1, -2) * ROOT / 5.0) * 5.0 + mask
    return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v


def heads_in_batch(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, s = q.shape[0], q.shape[2]
    q, k, v = (t.reshape(b * HEADS, s, HEAD) for t in (q, k, v))
    bias = mask.expand(b, HEADS, s, s).reshape(b * HEADS, s, s)
    weights = torch.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=ROOT), -1)
    return torch.bmm(weights, v).view(b, HEADS, s, HEAD)


def einsum(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * ROOT + mask, -1)
    weights = torch.einsum("bhqk,hg->bgqk", weights, layer.talk)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def additive(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = torch.tanh(q.unsqueeze(3) + k.unsqueeze(2)) @ layer.extra[0, 0]
    return torch.softmax(s + mask, -1) @ v


def two_hops(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.softmax(scores(q, k, mask), -1)
    return weights @ torch.tanh(weights @ v)


def gqa(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], mask, enable_gqa=True)


def causal_flag(layer: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


MIXES: dict[str, Mix] = {
    "fused": lambda layer, x, q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask),
    "eager": lambda layer, x, q, k, v, mask: torch.softmax(scores(q, k, mask), -1) @ v,
    **{
        fn.__name__: fn
        for fn in (transposed, by_hand, sigmoid, rectified, differential, key_bias, memory_keys, memory_keys_by_hand)
    },
    **{fn.__name__: fn for fn in (sinks, softcapped, heads_in_batch, einsum, additive, two_hops, gqa)},
}


class Rotary(Attention):
    """Rotary positions by complex numbers and by tables, a fused projection, and a bias from a table of distances."""

    def __init__(self) -> None:
        super().__init__(MIXES["eager"])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, h: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, distance: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (self.split(part) for part in self.qkv(self.norm(h)).chunk(3, -1))
        q = q * cos + torch.cat([-q[..., HEAD // 2 :], q[..., : HEAD // 2]], -1) * sin
        k = k * cos + torch.cat([-k[..., HEAD // 2 :], k[..., : HEAD // 2]], -1) * sin
        bias = self.table[distance].permute(2, 0, 1)
        return h + self.o(self.merge(torch.softmax(scores(q, k, mask) + bias, -1) @ v))


class Disentangled(Attention):
    """DeBERTa: scores from content to relative position and back, looked up by distance."""

    def __init__(self) -> None:
        super().__init__(MIXES["eager"])
        self.far = nn.Parameter(torch.randn(7, HEAD) * 0.5)

    def forward(self, h: Tensor, mask: Tensor, distance: Tensor) -> Tensor:  # type: ignore[override]
        x = self.norm(h)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        index = distance.expand(h.shape[0], HEADS, -1, -1)
        to_place = torch.gather(q @ self.far.T, -1, index)
        from_place = torch.gather(k @ self.far.T, -1, index.transpose(-1, -2)).transpose(-1, -2)
        return h + self.o(self.merge(torch.softmax(scores(q, k, mask) + to_place + from_place, -1) @ v))


class Cross(Attention):
    """Attention to a foreign sequence after attention to the own one."""

    def __init__(self, fused: bool) -> None:
        super().__init__(MIXES["fused" if fused else "eager"])
        self.fused = fused

    def forward(self, h: Tensor, mask: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        h = super().forward(h, mask)
        q, k, v = self.split(self.q(h)), self.split(self.k(memory)), self.split(self.v(memory))
        if self.fused:
            return h + self.o(self.merge(F.scaled_dot_product_attention(q, k, v)))
        return h + self.o(self.merge(torch.softmax(q @ k.transpose(-1, -2) * ROOT, -1) @ v))


class Conditioned(Attention):
    """An attention, then features scaled by what a sequence is conditioned on."""

    def __init__(self) -> None:
        super().__init__(MIXES["fused"])

    def forward(self, h: Tensor, mask: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(h, mask) * (1 + memory.mean(1, keepdim=True))


class Latent(Attention):
    """Keys and values come out of a small latent and one rotary key that the heads share, put together in place."""

    def __init__(self) -> None:
        super().__init__(MIXES["fused"])
        self.down = nn.Linear(WIDTH, 5)
        self.up = nn.Linear(5, WIDTH + HEADS * (HEAD - 2))
        self.turn = nn.Linear(WIDTH, 2)

    def forward(self, h: Tensor, mask: Tensor, cos: Tensor) -> Tensor:  # type: ignore[override]
        x = self.norm(h)
        b, s, _ = x.shape
        wide = self.up(self.down(x)).view(b, s, HEADS, -1).transpose(1, 2)
        shared = self.turn(x).unsqueeze(1) * cos[:, :2]
        k = torch.empty(b, HEADS, s, HEAD, dtype=h.dtype, device=h.device)
        k = torch.slice_scatter(k, wide[..., : HEAD - 2], 3, 0, HEAD - 2)
        k = torch.slice_scatter(k, shared.expand(-1, HEADS, -1, -1), 3, HEAD - 2, HEAD)
        mixed = F.scaled_dot_product_attention(self.split(self.q(x)), k, wide[..., HEAD - 2 :], mask)
        return h + self.o(self.merge(mixed))


class Hybrid(Attention):
    """A convolution along the tokens, then an MLP, an attention and another MLP."""

    def __init__(self) -> None:
        super().__init__(MIXES["fused"])
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH)) for _ in range(2)
        )

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        h = h + self.conv(h.transpose(1, 2)).transpose(1, 2)
        h = h + self.mlps[0](h)
        h = super().forward(h, mask)
        return h + self.mlps[1](h)


class Tokenwise(Attention):
    """Many ops that treat every token alike, none an attention."""

    def __init__(self) -> None:
        super().__init__(MIXES["fused"])
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH)
        self.experts = nn.Parameter(torch.randn(4, WIDTH, WIDTH) * 0.3)
        self.router = nn.Linear(WIDTH, 4)

    def forward(self, h: Tensor, place: Tensor) -> Tensor:  # type: ignore[override]
        b, s, _ = h.shape
        a, g = self.gate(h.reshape(b * s, WIDTH)).chunk(2, -1)
        h = h + (a * F.silu(g)).view(b, s, WIDTH)
        h = h + self.conv(h.transpose(1, 2)).transpose(1, 2)
        z = torch.view_as_complex(h.reshape(b, s, WIDTH // 2, 2))
        h = h + torch.view_as_real(z * z.abs()).reshape(b, s, WIDTH)
        q, k, v = (f(h).view(b, s, HEADS, HEAD) for f in (self.q, self.k, self.v))
        h = h + F.scaled_dot_product_attention(q, k, v).reshape(b, s, WIDTH)  # among the heads of a token
        top, which = torch.softmax(self.router(h), -1).topk(2, -1)
        dense = torch.zeros_like(self.router(h)).scatter(-1, which, top)
        h = h + torch.einsum("bse,bsef->bsf", dense, torch.einsum("bsd,edf->bsef", h, self.experts))
        h = h * (1 + place.to(h.dtype)[:, None] * 0.01)
        h = h + torch.frexp(h)[0] + torch.movedim(h, 1, 2).mT * F.normalize(h, dim=-1)
        h = h - torch.std_mean(h.unflatten(-1, (2, -1)), -1, keepdim=True)[1].expand(-1, -1, -1, 8).flatten(2)
        h = h + h.narrow(-1, 8, 8).repeat(1, 1, 2)
        groups = F.group_norm(h.reshape(b * s, WIDTH), 4).view(b, s, WIDTH)
        return groups + F.rms_norm(h.transpose(0, 1), (WIDTH,)).transpose(0, 1)


class Sorted(nn.Module):
    """Experts: tokens are sorted by expert, and back by a second sort or by adding rows to their tokens."""

    def __init__(self, back: str) -> None:
        super().__init__()
        self.back = back
        self.router = nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(4, WIDTH, WIDTH) * 0.3)

    def forward(self, h: Tensor) -> Tensor:
        x = h.reshape(-1, WIDTH)
        top, which = torch.softmax(self.router(x), -1).topk(2, -1)
        order = which.flatten().argsort(stable=True)
        rows = x[order // 2]
        out = torch.einsum("nd,ndf->nf", rows, self.up[which.flatten()[order]]) * top.flatten()[order].unsqueeze(-1)
        if self.back == "add":
            return h + torch.zeros_like(x).index_add(0, order // 2, out).view(h.shape)
        return h + out[order.argsort()].view(-1, 2, WIDTH).sum(1).view(h.shape)


class Looped(nn.Module):
    """Experts one after the other, each on the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        x = h.reshape(-1, WIDTH)
        top, which = torch.softmax(self.router(x), -1).topk(2, -1)
        chosen = F.one_hot(which, 3).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            choice, token = torch.where(chosen[number])
            out = out.index_add(0, token, expert(x[token]) * top[token, choice, None])
        return h + out.view(h.shape)


class Mixer(nn.Module):
    """A layer that is not an attention: `mix` says what it does to the hidden states."""

    def __init__(self, mix: Callable[[Mixer, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.latents = nn.Parameter(torch.randn(1, HEADS, 5, HEAD))
        self.router = nn.Linear(WIDTH, 4)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mix(self, self.inner(h))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, HEAD).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], WIDTH)


def convolution(layer: Mixer, x: Tensor) -> Tensor:
    return F.conv1d(x.transpose(1, 2), layer.conv.weight, layer.conv.bias, padding=1).transpose(1, 2)


def wrong_softmax(layer: Mixer, x: Tensor) -> Tensor:
    q = layer.heads(x)
    return merged(torch.softmax(q @ q.transpose(-1, -2), -2) @ q)


def capacity(layer: Mixer, x: Tensor) -> Tensor:
    chosen = F.one_hot(layer.router(x).argmax(-1), 4)
    place = (chosen.cumsum(1) * chosen).sum(-1)
    return x * (place <= 3).unsqueeze(-1)


def pooled(layer: Mixer, x: Tensor) -> Tensor:
    q, k = layer.latents.expand(x.shape[0], -1, -1, -1), layer.heads(x)
    seen = F.scaled_dot_product_attention(q, k, k)
    return merged(F.scaled_dot_product_attention(k, seen, seen))


def expert_choice(layer: Mixer, x: Tensor) -> Tensor:
    top = layer.router(x)[..., 0].topk(3, 1)
    rows = x.gather(1, top.indices.unsqueeze(-1).expand(-1, -1, WIDTH))
    return torch.zeros_like(x).scatter(1, top.indices.unsqueeze(-1).expand(-1, -1, WIDTH), rows)


def unnormalised_mean(layer: Mixer, x: Tensor) -> Tensor:
    q = layer.heads(x)
    s = q @ q.transpose(-1, -2)
    return merged(torch.sigmoid(s - s.mean(-1, keepdim=True)) @ q)


def sorted_features(layer: Mixer, x: Tensor) -> Tensor:
    order = layer.router(x)[..., 0].flatten().argsort()
    return x.reshape(-1, WIDTH)[order].view(x.shape)


def counted(layer: Mixer, x: Tensor) -> Tensor:
    load = F.one_hot(layer.router(x).argmax(-1), 4).sum((0, 1)).to(x.dtype)
    return x * load.sum()


def top_keys(layer: Mixer, x: Tensor) -> Tensor:
    q = layer.heads(x)
    s = q @ q.transpose(-1, -2)
    return merged(torch.softmax(s.masked_fill(s < s.topk(3, -1).values[..., -1:], -1e30), -1) @ q)


def triangle(layer: Mixer, x: Tensor) -> Tensor:
    q = layer.heads(x)
    return merged((q @ q.transpose(-1, -2)).tril() @ q)


def ranks(layer: Mixer, x: Tensor) -> Tensor:
    """How many tokens score less: the place of a token in the order, used as a number."""
    order = layer.router(x)[..., 0].flatten().argsort()
    return order.argsort().unsqueeze(-1).expand(-1, 2).unbind(-1)[1].view(x.shape[:2]).unsqueeze(-1) * x


def ranks_by_lookup(layer: Mixer, x: Tensor) -> Tensor:
    order = layer.router(x)[..., 0].flatten().argsort()
    return order[order.argsort()].to(x.dtype).view(x.shape[:2]).unsqueeze(-1) * x


def sorted_choices(layer: Mixer, x: Tensor) -> Tensor:
    """Half of the places of a sort are sorted again: they are no permutation."""
    rows = x.reshape(-1, WIDTH)
    order = layer.router(rows)[:, :2].flatten().argsort() // 2
    return rows[order][order.argsort()].view(x.shape[0], x.shape[1], 2, WIDTH).sum(2)


def in_sorted_order(layer: Mixer, x: Tensor) -> Tensor:
    rows = x.reshape(-1, WIDTH)
    order = layer.router(rows)[:, 0].argsort()
    rows = rows[order] * torch.arange(rows.shape[0], device=x.device)[:, None]
    return rows[order.argsort()].view(x.shape)


def grouped(layer: Mixer, x: Tensor, *, descending: bool = False, other: bool = False, sums: int = 1) -> Tensor:
    """A grouped product, its groups counted by histogram; right as it stands."""
    scores = layer.router(x.reshape(-1, WIDTH))
    chosen = scores.argmax(-1)
    order = chosen.argsort(descending=descending)
    counted = scores.argmin(-1) if other else chosen[order]
    ends = torch.histc(counted.float(), 4, 0, 3)
    for _ in range(sums):
        ends = ends.cumsum(0, dtype=torch.int32)
    experts = layer.latents[0, :1, :4, :1, None].expand(1, 4, WIDTH, WIDTH)[0]
    rows = torch._grouped_mm(x.reshape(-1, WIDTH)[order].bfloat16(), experts.bfloat16(), offs=ends.int())
    return rows.to(x.dtype)[order.argsort()].view(x.shape)


def first_gathered(layer: Mixer, x: Tensor) -> Tensor:
    return x.gather(2, torch.zeros_like(x[..., :1], dtype=torch.long).expand_as(x)[:, :1])


def gathered_from_longer(layer: Mixer, x: Tensor) -> Tensor:
    index = torch.zeros(x.shape[0], 1, WIDTH, dtype=torch.long, device=x.device)
    return x.gather(2, index)


def scattered_ahead(layer: Mixer, x: Tensor) -> Tensor:
    index = torch.arange(WIDTH, device=x.device).expand(x.shape[0], x.shape[1], WIDTH)
    wide = torch.zeros(x.shape[0], x.shape[1] + 2, WIDTH, dtype=x.dtype, device=x.device)
    return wide.scatter(2, index, x)[:, 2:]


def histogram(layer: Mixer, x: Tensor) -> Tensor:
    chosen = layer.router(x).argmax(-1).flatten()
    ones = torch.ones(1, dtype=x.dtype, device=x.device)
    return x * torch.zeros(4, dtype=x.dtype, device=x.device).index_put((chosen,), ones, accumulate=True).sum()


def more_queries(layer: Mixer, x: Tensor) -> Tensor:
    k = layer.heads(x)
    q = torch.cat([layer.latents[:, :, :3].expand(x.shape[0], -1, -1, -1), k], 2)
    return merged(F.scaled_dot_product_attention(q, k, k, is_causal=True)[:, :, 3:])


def centred(layer: Mixer, x: Tensor) -> Tensor:
    q = layer.heads(x)
    s = q @ q.transpose(-1, -2)
    return merged(torch.softmax(s - s.mean(-1).unsqueeze(-2), -1) @ q)


def largest_key(layer: Mixer, x: Tensor) -> Tensor:
    q = layer.heads(x)
    return x * (q @ q.transpose(-1, -2)).max(-1).indices.sum(1).unsqueeze(-1)


def largest_score(layer: Mixer, x: Tensor) -> Tensor:
    q = layer.heads(x)
    return x * (q @ q.transpose(-1, -2)).amax(-1).sum(1).unsqueeze(-1)


# Each with the op that must be named, and the axis.
ILLEGAL: dict[str, tuple[Callable[[Mixer, Tensor], Tensor], str, str]] = {
    "mean_of_tokens": (lambda m, x: x.mean(1, keepdim=True), "mean", "token"),
    "mean_of_batch": (lambda m, x: x - x.mean(0), "mean", "batch"),
    "batch_norm": (lambda m, x: x / x.std((0, 1)), "std|var", "batch"),
    "cumsum": (lambda m, x: x.cumsum(1), "cumsum", "token"),
    "cumprod": (lambda m, x: torch.sigmoid(x).cumprod(1), "cumprod", "token"),
    "convolution": (convolution, "conv", "token"),
    "shift": (lambda m, x: torch.cat([x[:, :1] * 0, x[:, :-1]], 1), "slice", "token"),
    "padded_shift": (lambda m, x: F.pad(x, (0, 0, 1, 0))[:, :-1], "pad", "token"),
    "shift_of_one_size": (lambda m, x: F.pad(x, (0, 0, 1, -1)), "pad", "token"),
    "reflected_shift": (lambda m, x: F.pad(x, (0, 0, 2, -2), "reflect"), "pad", "token"),
    "roll_everything": (lambda m, x: x.roll(1), "roll|cat|slice|index|view|reshape", "batch|token"),
    "windows": (lambda m, x: x.unfold(1, 1, 1)[..., 0] + x.unfold(2, 1, 1)[..., 0], "unfold", "token"),
    "renormalised": (lambda m, x: torch.renorm(x, 2, 2, 0.5), "renorm", "batch|token"),
    "shift_by_convolution": (
        lambda m, x: (
            F.conv_transpose1d(
                x.mT, torch.ones(WIDTH, WIDTH, 1, dtype=x.dtype, device=x.device), None, 1, 1, 2, 1, 3
            ).mT
        ),
        "conv_transpose1d",
        "batch|token",
    ),
    "roll_tokens": (lambda m, x: x.roll(1, 1), "roll|cat|slice|index", "token"),
    "roll_batch": (lambda m, x: x.roll(1, 0), "roll|cat|slice|index", "batch"),
    "reverse": (lambda m, x: x.flip(1), "flip", "token"),
    "gram": (lambda m, x: x @ (x.transpose(1, 2) @ x), "matmul|bmm", "token"),
    "similar_rows": (lambda m, x: (x.flatten(1) @ x.flatten(1).T).sum() * x, "mm|matmul", "batch|token"),
    "max_of_tokens": (lambda m, x: x.amax(1, keepdim=True), "amax", "token"),
    "softmax_of_tokens": (lambda m, x: torch.softmax(x, 1), "softmax", "token"),
    "first_token": (lambda m, x: x[:, :1], "slice", "token"),
    "last_token": (lambda m, x: x[:, -1:], "slice", "token"),
    "scrambled": (lambda m, x: x.reshape(x.shape[0], WIDTH, x.shape[1]).transpose(1, 2), "view|reshape", "token"),
    "attention_in_batch": (
        lambda m, x: F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3).transpose(0, 1),
        "scaled_dot_product_attention",
        "batch",
    ),
    "wrong_softmax": (wrong_softmax, "softmax|matmul", "token"),
    "capacity": (capacity, "cumsum", "token"),
    "pooled": (pooled, "scaled_dot_product_attention", "token"),
    "expert_choice": (expert_choice, "topk", "token"),
    "unnormalised_mean": (unnormalised_mean, "mean", "key"),
    "group_norm": (lambda m, x: F.group_norm(x.transpose(1, 2), 4).transpose(1, 2), "group_norm", "token"),
    "norm_of_tokens": (lambda m, x: F.layer_norm(x, x.shape[1:]), "layer_norm", "token"),
    "sorted": (sorted_features, "view|reshape", "sorted"),
    "counted": (counted, "to|mul|sum|_to_copy", "token"),
    "top_keys": (top_keys, "topk", "key"),
    "triangle": (triangle, "tril", "token|key"),
    "ranks": (ranks, "mul", "token"),
    "ranks_by_lookup": (ranks_by_lookup, "mul", "token"),
    "sorted_choices": (sorted_choices, "argsort", "token"),
    "in_sorted_order": (in_sorted_order, "mul", "token"),
    "groups_descend": (lambda m, x: grouped(m, x, descending=True), "grouped_mm", "token"),
    "groups_of_others": (lambda m, x: grouped(m, x, other=True), "grouped_mm", "token"),
    "groups_summed_twice": (lambda m, x: grouped(m, x, sums=2), "grouped_mm", "token"),
    "first_gathered": (first_gathered, "slice|gather", "token"),
    "gathered_from_longer": (gathered_from_longer, "gather", "token"),
    "scattered_ahead": (scattered_ahead, "scatter", "token"),
    "histogram": (histogram, "index_put", "batch"),
    "more_queries": (more_queries, "scaled_dot_product_attention", "key"),
    "centred": (centred, "mean", "key"),
    "largest_key": (largest_key, "max", "key"),
    "largest_score": (largest_score, "matmul", "key"),
    "slope_by_place": (lambda m, x: F.prelu(x, torch.arange(x.shape[1], device=x.device).to(x)), "prelu", "token"),
    "bits": (lambda m, x: x.mT.contiguous().view(torch.float32)[..., ::2].mT.to(x.dtype), "view", "batch"),
}


@lru_cache(maxsize=1)
def legal_cases() -> dict[str, Case]:
    """Every legal layer, with attention masks as the side input `mask`."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {name: Attention(mix) for name, mix in MIXES.items()}
    layers |= {"causal_flag": Attention(causal_flag), "rotary": Rotary(), "disentangled": Disentangled()}
    layers |= {"cross": Cross(True), "cross_by_hand": Cross(False), "tokenwise": Tokenwise()}
    layers |= {"grouped": Mixer(grouped)}
    layers |= {
        "latent": Latent(),
        "conditioned": Conditioned(),
        "sorted_back": Sorted("sort"),
        "sorted_add": Sorted("add"),
        "looped": Looped(),
    }
    return block_cases(layers)


@lru_cache(maxsize=1)
def illegal_cases() -> dict[str, Case]:
    """Every illegal layer, and "hybrid", which is legal in parts."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {name: Mixer(mix) for name, (mix, _, _) in ILLEGAL.items()}
    return block_cases(layers | {"hybrid": Hybrid()})


LEGAL = (
    *MIXES,
    *("causal_flag", "rotary", "disentangled", "cross", "cross_by_hand", "latent", "conditioned"),
    *("tokenwise", "sorted_back", "sorted_add", "looped", "grouped"),
)
