"""The ops around a routed region as kernels and in plain torch, with the bytes that each moves at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from routing_layers import ALPHA, at, best, combined, combined_, scored
from routing_plan import Sizes
from routing_region import HALF
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention

from depthc.codegen.kernels.combine import combine, combine_
from depthc.codegen.kernels.combine.fused import combine_fused
from depthc.codegen.kernels.combine.reference import inverse_of
from depthc.codegen.kernels.gather_norm import gather_norm
from depthc.codegen.kernels.rows import take_rows
from depthc.codegen.kernels.score import score_rows
from depthc.codegen.kernels.select import select_topk
from depthc.codegen.kernels.shared_attention.op import shared_attention

EPS = 1e-6
BLOCK = 128  # queries of a block of FlexAttention


class Inputs(NamedTuple):
    """What ops read: a stream and its gradient, rows, logits, queries of the rows and keys of all tokens."""

    stream: Tensor
    grad: Tensor
    rows: Tensor
    router: Tensor
    weight: Tensor
    logits: Tensor
    gates: Tensor
    positions: Tensor
    inverse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


def inputs_of(s: Sizes, chosen: int, device: str, seed: int) -> Inputs:
    """One set of inputs; the tokens with the best logits are chosen."""
    generator, features = torch.Generator(device).manual_seed(seed), s.width // s.heads

    def draw(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    stream, rows = (s.batch, s.tokens, s.width), (s.batch, chosen, s.width)
    logits = draw(*stream[:2], dtype=torch.float32)
    positions = best(logits, chosen)
    q = draw(*rows[:2], s.heads, features)
    k, v = (draw(*stream[:2], s.key_heads, features).transpose(1, 2) for _ in range(2))
    router, weight = draw(s.width, dtype=torch.float32), draw(s.width)
    chosen_ones = logits.gather(1, positions), positions, inverse_of(positions, s.tokens)
    tensors = draw(*stream), draw(*stream), draw(*rows), router, weight, logits
    return Inputs(*tensors, *chosen_ones, q.transpose(1, 2), k, v)


Outputs = tuple[Tensor, ...]
Function = Callable[[Inputs], Outputs]
Pair = tuple[float, float]  # of the forward, and of the backward


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        kernel, plain: by depthc, and in plain torch.
        moved: the least bytes.
        wanted: the inputs that gradients are taken of.
        flops: the operations, where they matter.
        writes: whether it writes over the stream.
        others: further ways, always compiled.
    """

    kernel: Function
    plain: Function
    moved: Callable[[Inputs], Pair]
    wanted: tuple[str, ...] = ()
    flops: Callable[[Inputs], Pair] = lambda x: (0.0, 0.0)
    writes: bool = False
    others: tuple[tuple[str, Function], ...] = ()

    def least(self, x: Inputs, training: bool) -> Pair:
        """Operations, and bytes of memory."""
        steps = 2 if training else 1
        return sum(self.flops(x)[:steps]), sum(self.moved(x)[:steps])


def _selected(x: Inputs) -> Outputs:
    chosen = select_topk(x.logits, x.positions.shape[1])
    return chosen.positions, chosen.mask, chosen.inverse


def _best(x: Inputs) -> Outputs:
    """Positions, mask and inverse of the best tokens, by torch's own top-k."""
    positions = best(x.logits, x.positions.shape[1])
    inverse = inverse_of(positions, x.logits.shape[1])
    return positions, inverse >= 0, inverse


def _with_router(select: Function, score: Callable[[Tensor, Tensor], Tensor]) -> Function:
    return lambda x: select(x._replace(logits=score(x.stream, x.router)))


def _normed(x: Inputs) -> Outputs:
    rows = x.stream.gather(1, at(x.positions, x.stream))
    return rows, rms_norm(rows, rows.shape[-1:], x.weight, EPS)


def _masked(x: Inputs) -> Outputs:
    """Attention with a mask by position; key heads are repeated, since no fast kernel with a mask shares them."""
    heads = x.q.shape[1] // x.k.shape[1]
    mask = x.positions[:, None, :, None] >= torch.arange(x.k.shape[2], device=x.k.device)
    k, v = (t.repeat_interleave(heads, 1) for t in (x.k, x.v))
    return (scaled_dot_product_attention(x.q, k, v, mask),)


def by_position(positions: Tensor, size: int) -> BlockMask:
    """Keys up to the position of every query. Masks are asked about whole blocks, beyond the last query too."""
    batch, rows = positions.shape
    filled = pad(positions, (0, -rows % BLOCK))
    return create_block_mask(lambda b, _, q, k: filled[b, q] >= k, batch, None, rows, size, device=positions.device)


def flex(x: Inputs, mask: BlockMask | None = None) -> Outputs:
    """The same by FlexAttention, whose mask is made anew, as a router would have it."""
    mask = by_position(x.positions, x.k.shape[2]) if mask is None else mask
    return (flex_attention(x.q, x.k, x.v, block_mask=mask, enable_gqa=True),)


def _bytes(count: Callable[[int, int, int], Pair]) -> Callable[[Inputs], Pair]:
    """Bytes by the number of tokens, that of rows, and the bytes of one row: docs/kernels.md, Floors."""
    return lambda x: count(x.logits.numel(), x.gates.numel(), x.rows.shape[2] * x.rows.dtype.itemsize)


def _attention_bytes(x: Inputs) -> Pair:
    """Queries and results, keys and values; and the logsumexp and positions of every query."""
    rows, keys = x.q.numel() * x.q.dtype.itemsize, x.k.numel() * x.k.dtype.itemsize
    beside = 4 * x.q[..., 0].numel() + 8 * x.positions.numel()
    return 2 * (rows + keys) + beside, 4 * (rows + keys) + beside


def _pairs(x: Inputs) -> Pair:
    """4 operations a pair of a query and a key that it sees, feature and head; 10 of the backward."""
    seen = int((x.positions + 1).sum()) * x.q.shape[1] * x.q.shape[3]
    return 4.0 * seen, 10.0 * seen


def _combined(into: Callable[..., Tensor]) -> Function:
    return lambda x: (into(x.stream, x.rows, x.gates, x.positions, x.inverse, alpha=ALPHA),)


def _fused(x: Inputs) -> Outputs:
    """What a compiler that takes the whole module is given."""
    return (combine_fused(x.stream, x.rows, x.gates, x.positions, x.inverse, alpha=ALPHA),)


OPS = {
    "choose": Op(
        _with_router(_selected, score_rows),
        _with_router(_best, scored),
        _bytes(lambda t, n, w: (t * w + 9 * t + 9 * n, 0)),
    ),
    "select": Op(_selected, _best, _bytes(lambda t, n, w: (9 * t + 9 * n, 0))),
    "take": Op(
        lambda x: (take_rows(x.stream, x.positions, x.inverse),),
        lambda x: (x.stream.gather(1, at(x.positions, x.stream)),),
        _bytes(lambda t, n, w: (2 * n * w + 8 * n, (t + n) * w + 4 * t)),
        ("stream",),
    ),
    "combine": Op(
        _combined(combine),
        lambda x: (combined(x.stream, x.rows, x.logits, x.positions),),
        _bytes(lambda t, n, w: ((2 * t + n) * w + 4 * t + 4 * n, 3 * n * w)),
        ("rows", "stream"),
        others=(("fused, compiled", _fused),),
    ),
    "combine in place": Op(
        _combined(combine_),
        lambda x: (combined_(x.stream, x.rows, x.logits, x.positions),),
        _bytes(lambda t, n, w: (3 * n * w + 16 * n, 0)),
        writes=True,
    ),
    "gather_norm": Op(
        lambda x: gather_norm(x.stream, x.positions, x.weight, eps=EPS),
        _normed,
        _bytes(lambda t, n, w: (3 * n * w + 12 * n, t * w + 3 * n * w + 12 * n)),
        ("stream", "weight"),
    ),
    "shared attention": Op(
        lambda x: shared_attention(x.q, x.k, x.v, x.positions)[:1],
        _masked,
        _attention_bytes,
        ("q", "k", "v"),
        _pairs,
        others=(("FlexAttention", flex),),
    ),
}
