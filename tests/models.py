"""Small transformers of every kind, and how to compare a program with the model that it was captured from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import depthc
from depthc.ir.evaluate import Evaluator, WeightParams
from depthc.ir.program import Call, Program, Segment
from depthc.ir.signature import device_of

WIDTH, HEADS, VOCAB = 8, 2, 13


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model in which no two parameters are equal: fresh ones often are, and would hide a wrong binding."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@cache
def stack_program(depth: int) -> Program:
    """The program of a small stack of layers over `ids()`, captured once."""
    return depthc.capture(seeded(lambda: Stacked(Spec(depth=depth))), (ids(),))


def ids(batch: int = 2, length: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def states(
    batch: int = 2, length: int = 5, width: int = WIDTH, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


# parts


class RmsNorm(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype is torch.bfloat16 else x
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(WIDTH),
    "rms": RmsNorm,
    "none": nn.Identity,
}


class Attention(nn.Module):
    """Kinds: "causal" (flag), "masked" (mask), "plain" (matmul, softmax, matmul), "grouped" (fewer key heads)."""

    def __init__(self, kind: str = "causal", dropout: float = 0.0) -> None:
        super().__init__()
        self.kind, self.rate = kind, dropout
        self.groups = 1 if kind == "grouped" else HEADS
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * self.groups * (WIDTH // HEADS), bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, HEADS, -1).transpose(1, 2)
        k, v = (part.reshape(batch, length, self.groups, -1).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        mixed = self.mix(q, k, v, mask).transpose(1, 2).reshape(batch, length, width)
        return self.out(mixed)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        rate = self.rate if self.training else 0.0
        if self.kind == "plain":
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if mask is not None:
                scores = scores.masked_fill(~mask, -1e4)
            return F.dropout(scores.softmax(-1), self.rate, self.training) @ v
        if self.kind == "masked":
            return F.scaled_dot_product_attention(q, k, v, mask, rate)
        return F.scaled_dot_product_attention(q, k, v, None, rate, is_causal=True, enable_gqa=self.kind == "grouped")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def rotary_tables(length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    half = WIDTH // HEADS // 2
    rates = 1.0 / 100 ** (torch.arange(half, device=like.device) / half)
    angles = torch.outer(torch.arange(length, device=like.device).float(), rates)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class Mlp(nn.Module):
    """Kinds: "gelu", "swiglu"."""

    def __init__(self, kind: str = "gelu") -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH) if kind == "swiglu" else None

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x) if self.gate is not None else F.gelu(self.up(x)))


class Residual(nn.Module):
    """The smallest layer with a residual stream."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.linear(self.norm(x)))


class Chain(nn.Module):
    """Residual layers in a row: a base for models that differ in what is around them."""

    def __init__(self, depth: int = 2, rate: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual(rate) for _ in range(depth))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass(frozen=True)
class Spec:
    """A stack. `attention` has the kind of each layer of a period; all layers, whatever their kind, are counted.

    `shared`: "" (own weights), "all" (one layer applied `depth` times), "mlp" (one MLP in all layers).
    `sides`: what a layer reads besides its carry: "rotary", "window" (every second layer has another mask), "extra"
    (an input with one slice a layer), "embeddings".
    `scaled`: what a layer adds to its carry shrinks with depth. `rising`: the dropout rate grows with depth, from 0.
    `returns`: "tensor", "tuple", "dict", "states" (a dict with the states between all layers).
    """

    norm: str = "layer"
    residual: str = "pre"
    attention: tuple[str, ...] = ("causal",)
    mlp: str = "gelu"
    depth: int = 3
    shared: str = ""
    sides: tuple[str, ...] = ()
    scaled: bool = False
    dropout: float = 0.0
    rising: bool = False
    returns: str = "tensor"
    dtype: torch.dtype = torch.float32


class Layer(nn.Module):
    """One layer of a `Spec`."""

    def __init__(self, spec: Spec, depth: int = 0, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.spec, self.scale = spec, 0.7**depth
        kind = spec.attention[depth % len(spec.attention)]
        rate = spec.dropout * (depth / spec.depth if spec.rising else 1)
        self.norm = nn.ModuleList(NORMS[spec.norm]() for _ in range(4 if spec.residual == "sandwich" else 2))
        self.attention = Attention(kind, rate) if kind != "none" else None
        self.mlp = mlp or Mlp(spec.mlp)
        self.drop = nn.Dropout(rate)
        self.extra = nn.Linear(WIDTH, WIDTH) if {"extra", "embeddings"} & set(spec.sides) else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        if extra is not None and self.extra is not None:
            x = x + self.extra(extra)
        attend = (lambda y: self.attention(y, mask, rotary)) if self.attention is not None else torch.zeros_like
        kind = self.spec.residual
        if kind == "parallel":
            y = self.norm[0](x)
            return x + self.add(attend(y) + self.mlp(y))
        for i, sublayer in enumerate([attend, self.mlp] if self.attention is not None else [self.mlp]):
            if kind == "pre":
                x = x + self.add(sublayer(self.norm[i](x)))
            elif kind == "post":
                x = self.norm[i](x + self.add(sublayer(x)))
            else:
                x = x + self.add(self.norm[2 + i](sublayer(self.norm[i](x))))
        return x

    def add(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        return x * self.scale if self.spec.scaled else x


class Stacked(nn.Module):
    """The model of a `Spec`: token ids to logits. `extra` has one slice of features a layer."""

    def __init__(self, spec: Spec = Spec()) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(VOCAB, WIDTH)
        shared = Mlp(spec.mlp) if spec.shared == "mlp" else None
        count = 1 if spec.shared == "all" else spec.depth
        self.layers = nn.ModuleList(Layer(spec, i, shared) for i in range(count))
        self.norm = NORMS[spec.norm]()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.to(spec.dtype)

    def forward(self, ids: Tensor, extra: Tensor | None = None) -> Any:
        spec, length = self.spec, ids.shape[1]
        h = first = self.embed(ids)
        rotary = rotary_tables(length, h) if "rotary" in spec.sides else None
        row = torch.arange(length, device=ids.device)
        past = row[:, None] >= row[None, :]
        near = past & (row[:, None] - row[None, :] < 3)
        between = [h]
        for i in range(spec.depth):
            layer = self.layers[i % len(self.layers)]
            side = first if "embeddings" in spec.sides else None
            if extra is not None:
                side = extra[:, :, i]
            h = layer(h, near if "window" in spec.sides and i % 2 else past, rotary, side)
            between.append(h)
        logits = self.head(self.norm(h))
        if spec.returns == "tensor":
            return logits
        if spec.returns == "tuple":
            return logits, None, h
        if spec.returns == "dict":
            return {"logits": logits, "last": h}
        return {"logits": logits, "states": tuple(between)}

    def example(self, batch: int = 2, length: int = 5) -> tuple[Tensor, ...]:
        """Arguments of these sizes."""
        if "extra" not in self.spec.sides:
            return (ids(batch, length),)
        shape = (batch, length, self.spec.depth * WIDTH)
        return ids(batch, length), states(*shape, dtype=self.spec.dtype).view(batch, length, -1, WIDTH)


# comparing


class Hybrid(nn.Module):
    """Attention in every third layer; the others mix tokens by a running sum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(13, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.attention = nn.ModuleList(Attention() for _ in range(6))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for i in range(6):
            h = h + (self.attention[i](h) if i % 3 == 1 else self.linear[i](h).cumsum(1))
        return h


def tensors(tree: Any) -> dict[str, Tensor]:
    """Every tensor of an output by its path."""
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_leaves_with_path(tree) if isinstance(leaf, Tensor)}


def assert_same(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Both outputs have the same structure and types, and the same bits (or differ by `tolerance` at most)."""
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    ours = tensors(found)
    for path, tensor in tensors(expected).items():
        torch.testing.assert_close(
            ours[path], tensor, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, p=path: f"{p}: {m}"
        )


def outputs(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a module or a program returns, without gradients and with a fixed seed."""
    torch.manual_seed(3)
    with torch.no_grad():
        return run(*args, **kwargs)


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> Program:
    """A program that equals its model on the example."""
    program = depthc.capture(model, args, kwargs)
    assert_same(outputs(program.run, *args, **kwargs), outputs(model, *args, **kwargs))
    return program


def gradients(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor | None]]:
    """A seeded forward, and the gradient of a fixed projection of its outputs for every parameter that has one."""
    torch.manual_seed(3)
    out = module(*args, **kwargs)
    floats = [t for t in tensors(out).values() if t.requires_grad]
    loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in floats)
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    return out, dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def assert_lowered(compiled: nn.Module, model: nn.Module, *args: Any, tolerance: float = 0.0, **kwargs: Any) -> None:
    """A lowered module is the model: names, outputs and gradients, in eval and in train mode."""
    assert list(compiled.state_dict()) == list(model.state_dict())
    assert [n for n, _ in compiled.named_parameters()] == [n for n, _ in model.named_parameters()]
    for training in (False, True):
        found, got = gradients(compiled.train(training), *args, **kwargs)
        expected, wanted = gradients(model.train(training), *args, **kwargs)
        assert_same(found, expected)
        assert_same(got, wanted, tolerance)
    model.eval()
    compiled.eval()


class Recorder(Evaluator):
    """Keeps the carry that every application of a block writes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.carries: list[Tensor] = []

    def apply(self, op: Segment | Call, values: dict[str, Any], indices: Any) -> None:
        super().apply(op, values, indices)
        if isinstance(op, Call):
            self.carries.append(values[op.writes[0]])


def carries(program: Program, *args: Any, **kwargs: Any) -> list[Tensor]:
    """What every layer of a program returns, in execution order."""
    given = program.signature.flatten(args, kwargs)
    recorder = Recorder(program, WeightParams(program), device_of(given))
    with torch.no_grad():
        recorder.run(program.body, dict(given))
    return recorder.carries


def layer_outputs(model: nn.Module, layers: Sequence[nn.Module], *args: Any, **kwargs: Any) -> list[Tensor]:
    """What every application of `layers` returns, in execution order."""
    seen: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda _m, _i, out: seen.append(out)) for m in dict.fromkeys(layers)]
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return seen
