"""A Llama-like layer, and routing of such layers as one writes it by hand: what depthc is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from routing_plan import Sizes
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

ALPHA, BASE = 0.1, 10000.0

Keys = tuple[Tensor, Tensor]  # keys and values [batch, key head, key, feature]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Norm(nn.Module):
    """RMSNorm as models write it: in fp32, rounded before the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention among the rows at hand, in their order."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class Layer(nn.Module):
    """Attention with grouped key heads and rotary positions, and a SwiGLU."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.features = s.width // s.heads
        self.norm, self.inner_norm = Norm(s.width), Norm(s.width)
        self.q, self.out = (nn.Linear(s.width, s.width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(s.width, s.key_heads * self.features, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(s.width, s.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(s.inner, s.width, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.features).transpose(1, 2)

    def keys(self, normed: Tensor, cos: Tensor, sin: Tensor) -> Keys:
        """Those of all given tokens."""
        return rotated(self.heads(self.k(normed)), cos, sin), self.heads(self.v(normed))

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, keys: Keys | None = None, attend: Attend = causal) -> Tensor:
        normed = self.norm(h)
        q = rotated(self.heads(self.q(normed)), cos, sin)
        k, v = self.keys(normed, cos, sin) if keys is None else keys
        h = h + self.out(attend(q, k, v).transpose(1, 2).reshape(h.shape))
        normed = self.inner_norm(h)
        return h + self.down(silu(self.gate(normed)) * self.up(normed))


class Layers(nn.Module):
    """Layers on a stream [batch, tokens, features], or on the embedding of tokens [batch, tokens]."""

    rates: Tensor

    def __init__(self, s: Sizes, count: int, vocabulary: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, s.width).requires_grad_(False) if vocabulary else nn.Identity()
        self.layers = nn.ModuleList(Layer(s) for _ in range(count))
        features = s.width // s.heads
        rates = BASE ** -(torch.arange(0, features, 2, dtype=torch.float32) / features)
        self.register_buffer("rates", rates, persistent=False)

    def tables(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [tokens, features] of the positions of a stream."""
        angles = torch.outer(torch.arange(h.shape[1], device=h.device).float(), self.rates.float())
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(h.dtype), angles.sin().to(h.dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        cos, sin = self.tables(h)
        return applied(self.layers, h, cos, sin)


def applied(layers: Iterable[nn.Module], h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A stream behind some layers."""
    for layer in layers:
        h = layer(h, cos, sin)
    return h


def scored(h: Tensor, router: Tensor) -> Tensor:
    """The logit of every token, fp32 [batch, tokens]."""
    return (h.float() * router).sum(-1)


def best(logit: Tensor, count: int) -> Tensor:
    """The positions of the best tokens of every row, in order."""
    return logit.topk(count, dim=1, sorted=False).indices.sort(1).values


def combined(h: Tensor, y: Tensor, logit: Tensor, positions: Tensor) -> Tensor:
    """The stream with a share of every row added where it came from."""
    return h.scatter_add(1, *_shares(h, y, logit, positions))


def combined_(h: Tensor, y: Tensor, logit: Tensor, positions: Tensor) -> Tensor:
    """The same in place."""
    return h.scatter_add_(1, *_shares(h, y, logit, positions))


def _shares(h: Tensor, y: Tensor, logit: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    share = ALPHA * logit.gather(1, positions).sigmoid()[..., None]
    return at(positions, h), (share * y.float()).to(h.dtype)


def at(positions: Tensor, h: Tensor) -> Tensor:
    """The places of rows [batch, rows, features] in a stream."""
    return positions[..., None].expand(-1, -1, h.shape[2])


def routed(layers: Iterable[nn.Module], router: Tensor, count: int, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Layers on the best tokens of every row: router, top-k and sort, gather, layers, gated scatter-add."""
    logit = scored(h, router)
    positions = best(logit, count)
    y = applied(layers, h.gather(1, at(positions, h)), cos[positions][:, None], sin[positions][:, None])
    return combined(h, y, logit, positions)
