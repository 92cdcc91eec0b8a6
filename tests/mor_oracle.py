"""An oracle for Mixture-of-Recursions: expert-choice routing over tied layers, token by token, in fp64.

Written from shared/recipes.md, sections 1 and 4, as plain loops over rows and tokens. It shares no code with the
compiler. The weights are the model's own parameters, so that autograd through the loops gives the gradients.

A model is a `LayerMath`: how one token goes through one layer, given the tokens that it may see. Norms, linears and
MLPs are the model's own modules, called on one token; attention and experts are written out here.

Hugging Face models hold islands of fp32 (norms, the softmax of eager attention, expert gates, rotary tables). Called
plainly, both sides keep them, and agree as long as each island sums in the same order: a softmax over fewer keys, or a
weight's gradient summed inside an island, does not. `with Wide():` around whatever is compared (the model, its capture,
this oracle) makes every island fp64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

VOCAB, WIDTH, WINDOW = 23, 16, 4
KINDS = ("llama", "post_norm", "parallel", "encoder_decoder", "moe", "hybrid")
Inputs = Mapping[str, Tensor]
Key = tuple[Tensor, Tensor]  # the key and the value of a token: [heads, head size] each
Visible = Sequence[tuple[int, Key]]  # with original positions


class Wide(TorchFunctionMode):
    """Everything that asks for fp32 gets fp64, and a grouped product, which has no fp64, its own fallback."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        if func is torch._grouped_mm:
            return torch.ops.transformers.grouped_mm_fallback(*args[:2], kwargs["offs"])
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


# tying: recipes.md, section 1


def unique_layers(sharing: str, depth: int, loops: int) -> int:
    """U: the layers of a loop, without the two that the middle forms keep."""
    looped = depth - 2 * sharing.startswith("middle")
    if looped < loops or looped % loops:
        raise ValueError(f"{loops} loops do not divide {looped} layers")
    return looped // loops


def slot_of(sharing: str, depth: int, loops: int, layer: int) -> int:
    """The slot that a layer takes its weights from."""
    unique = unique_layers(sharing, depth, loops)
    if sharing.startswith("middle"):
        if layer in (0, depth - 1):
            return 0 if layer == 0 else unique + 1
        return 1 + ((layer - 1) % unique if sharing == "middle_cycle" else (layer - 1) // loops)
    if sharing == "sequence":
        return layer // loops
    turned = sharing == "cycle_rev" and layer // unique % 2
    return unique - 1 - layer % unique if turned else layer % unique


def sources_of(sharing: str, depth: int, loops: int, init: str) -> list[tuple[int, ...]]:
    """The original layers of each slot: one that is taken as it is, or several to average."""
    unique = unique_layers(sharing, depth, loops)
    first, last = (1, depth - 2) if sharing.startswith("middle") else (0, depth - 1)
    if init == "average":
        return [
            tuple(layer for layer in range(depth) if slot_of(sharing, depth, loops, layer) == slot)
            for slot in range(unique + 2 * first)
        ]
    chosen = {
        "stepwise": [first + k * (last - first) // max(unique - 1, 1) for k in range(unique)],
        "lower": list(range(first, first + unique)),
        "upper": list(range(last + 1 - unique, last + 1)),
    }[init]
    return [(layer,) for layer in ([0, *chosen, depth - 1] if first else chosen)]


@dataclass(frozen=True)
class Tied:
    """A looped model: a layer for each slot, and the slot of each depth."""

    slots: list[nn.Module]
    order: list[int]


def tie(math_: LayerMath, sharing: str, loops: int, init: str = "stepwise") -> Tied:
    """Slots of one source are the model's own layers; an average is a new layer with parameters of its own."""
    depth = len(math_.layers)
    slots = [
        math_.layers[source[0]] if len(source) == 1 else average([math_.layers[layer] for layer in source])
        for source in sources_of(sharing, depth, loops, init)
    ]
    return Tied(slots, [slot_of(sharing, depth, loops, layer) for layer in range(depth)])


def average(layers: Sequence[nn.Module]) -> nn.Module:
    made = copy.deepcopy(layers[-1])  # not the first: T5 keeps the bias table of all layers there
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.stack([layer.get_parameter(name) for layer in layers]).mean(0))
    return made


# one row through layers


class LayerMath(Protocol):
    """A model, token by token. A layer's weights are in `layer`; its constants, such as its window, are of `depth`."""

    layers: Sequence[nn.Module]

    def embed(self, inputs: Inputs, row: int) -> list[Tensor]:
        """Begin a row of the batch: the state of every token before the first layer."""

    def key(self, layer: nn.Module, x: Tensor, t: int) -> Key:
        """What token `t` shows to the others."""

    def apply(self, layer: nn.Module, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        """The whole layer for token `t`."""

    def finish(self, x: Tensor) -> Tensor:
        """Logits."""


@dataclass(frozen=True)
class Row:
    """Who sees whom: real tokens, no later ones, of the same document. A padded token sees too, but is not seen."""

    math: LayerMath
    real: list[bool]
    documents: list[int]

    def keys(self, layer: nn.Module, states: Mapping[int, Tensor]) -> dict[int, Key]:
        return {t: self.math.key(layer, x, t) for t, x in states.items() if self.real[t]}

    def run(self, layer: Any, depth: int, states: Mapping[int, Tensor], keys: Any = None) -> dict[int, Tensor]:
        """A layer for the tokens given, which see each other, or `keys` where those are given."""
        keys = self.keys(layer, states) if keys is None else keys
        return {
            t: self.math.apply(layer, depth, x, t, [(j, key) for j, key in keys.items() if self.sees(t, j)])
            for t, x in states.items()
        }

    def sees(self, t: int, j: int) -> bool:
        return j <= t and self.documents[t] == self.documents[j]

    def logits(self, states: Mapping[int, Tensor]) -> Tensor:
        return torch.stack([self.math.finish(states[t]) for t in range(len(self.real))])


def rows_of(math_: LayerMath, real: Tensor, documents: Tensor | None) -> list[Row]:
    documents = torch.zeros_like(real, dtype=torch.long) if documents is None else documents
    return [Row(math_, *lists) for lists in zip(real.tolist(), documents.tolist(), strict=True)]


def looped(math_: LayerMath, tied: Tied, inputs: Inputs, real: Tensor, documents: Tensor | None = None) -> Tensor:
    """Logits [B, S, V] of the tied model with every token at full depth."""
    found = []
    for b, row in enumerate(rows_of(math_, real, documents)):
        states = dict(enumerate(math_.embed(inputs, b)))
        for depth, slot in enumerate(tied.order):
            states = row.run(tied.slots[slot], depth, states)
        found.append(row.logits(states))
    return torch.stack(found)


def unrouted(math_: LayerMath, inputs: Inputs, real: Tensor, documents: Tensor | None = None) -> Tensor:
    """Logits of the model as it is."""
    layers = list(math_.layers)
    return looped(math_, Tied(layers, list(range(len(layers)))), inputs, real, documents)


# routing: recipes.md, section 4


@dataclass(frozen=True)
class Settings:
    """The options of `mor`, expert-choice. `causal`: tokens pass a threshold instead of being ranked."""

    loops: int = 3
    sharing: str = "middle_cycle"
    init: str = "stepwise"
    capacities: tuple[float, ...] = ()  # empty: (N - r) / N
    alpha: float = 0.1
    gate: str = "sigmoid"  # tanh, none
    combine: str = "weighted"  # additive, delta, off
    kv: str = "recursion"  # share_first
    router: str = "linear"  # mlp
    aux_weight: float = 0.001
    causal: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        default = tuple((self.loops - r) / self.loops for r in range(self.loops))
        object.__setattr__(self, "capacities", self.capacities or default)
        falling = all(a >= b for a, b in zip(self.capacities, self.capacities[1:], strict=False))
        if len(self.capacities) != self.loops or not falling or not all(0 < c <= 1 for c in self.capacities):
            raise ValueError(f"capacities {self.capacities} for {self.loops} loops")
        if self.kv == "share_first" and self.capacities[0] != 1:
            raise ValueError("share_first needs every token in recursion 0")
        if self.sharing not in ("cycle", "middle_cycle") or self.kv not in ("recursion", "share_first"):
            raise ValueError(f"routing over {self.sharing} with keys of {self.kv}")


@dataclass(frozen=True)
class Result:
    """`selected` and `router_logits` have a [B, S] for each recursion; a logit is NaN where there was no candidate.

    Logits of padded tokens are finite and mean nothing.
    """

    logits: Tensor
    selected: list[Tensor]
    router_logits: list[Tensor]
    aux_loss: Tensor


def make_routers(settings: Settings, width: int = WIDTH, seed: int = 0, scale: float = 0.3) -> list[dict[str, Tensor]]:
    shapes = {"linear": {"weight": (1, width)}, "mlp": {"up": (2 * width, width), "down": (1, 2 * width)}}
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()

    return [{name: draw(s) for name, s in shapes[settings.router].items()} for _ in range(settings.loops)]


def router_logit(router: Mapping[str, Tensor], x: Tensor, settings: Settings) -> Tensor:
    x = x / settings.temperature
    if settings.router == "linear":
        return (router["weight"] @ x)[0]
    return (router["down"] @ F.gelu(router["up"] @ x))[0]


def choose(settings: Settings, r: int, logits: Mapping[int, Tensor], tokens: int) -> list[int]:
    """The active tokens among the candidates, in order of position; `tokens` counts the real ones of the row."""
    if any(logit.isnan() for logit in logits.values()):
        raise ValueError(f"a router logit of recursion {r} is not a number")
    capacity = settings.capacities[r]
    if settings.causal:
        return [t for t, logit in logits.items() if capacity == 1 or logit > 0]
    count = min(max(1, int(capacity * tokens)), len(logits)) if tokens else 0
    ranked = sorted(logits, key=lambda t: (-logits[t].item(), t))
    return sorted(ranked[:count])


def combine(settings: Settings, x: Tensor, block: Tensor, logit: Tensor) -> Tensor:
    """The new state of an active token; `block` is the output of the tied layers, which contains x."""
    alpha = settings.alpha
    s = {"sigmoid": alpha * torch.sigmoid(logit), "tanh": alpha * torch.tanh(logit), "none": logit}[settings.gate]
    new = {"weighted": x + s * block, "additive": x + block, "delta": x + s * (block - x), "off": block}
    return new[settings.combine]


@dataclass(frozen=True)
class Routed:
    """What a row leaves: its last states, and for each recursion the candidates' logits and the active tokens."""

    states: dict[int, Tensor]
    logits: list[dict[int, Tensor]]
    active: list[list[int]]


def route_row(row: Row, tied: Tied, settings: Settings, routers: Sequence, states: dict[int, Tensor]) -> Routed:
    unique = unique_layers(settings.sharing, len(tied.order), settings.loops)
    ends = int(settings.sharing == "middle_cycle")
    if ends:
        states = row.run(tied.slots[0], 0, states)
    logits, active = [], [[t for t in states if row.real[t]]]
    first: dict[int, dict[int, Key]] = {}  # the keys and values of recursion 0, by slot
    for r in range(settings.loops):
        logits.append({t: router_logit(routers[r], states[t], settings) for t in active[-1]})
        active.append(choose(settings, r, logits[r], sum(row.real)))
        block = {t: states[t] for t in active[-1]}
        for depth in range(ends + r * unique, ends + (r + 1) * unique):
            slot, keys = tied.order[depth], None
            if settings.kv == "share_first":
                keys = first[slot] if r else first.setdefault(slot, row.keys(tied.slots[slot], block))
            block = row.run(tied.slots[slot], depth, block, keys)
        states = states | {t: combine(settings, states[t], block[t], logits[r][t]) for t in block}
    if ends:
        states = row.run(tied.slots[-1], len(tied.order) - 1, states)
    return Routed(states, logits, active[1:])


def route(
    math_: LayerMath,
    settings: Settings,
    routers: Sequence[Mapping[str, Tensor]],
    inputs: Inputs,
    real: Tensor,
    documents: Tensor | None = None,
    tied: Tied | None = None,
) -> Result:
    """The routed model, one row after another; `tied`, where given, has the slots instead of the model's layers."""
    tied = tied or tie(math_, settings.sharing, settings.loops, settings.init)
    rows = rows_of(math_, real, documents)
    done = [
        route_row(row, tied, settings, routers, dict(enumerate(math_.embed(inputs, b)))) for b, row in enumerate(rows)
    ]
    selected = [torch.zeros_like(real) for _ in routers]
    router_logits = [torch.full(real.shape, torch.nan, dtype=torch.float64) for _ in routers]
    aux = torch.zeros((), dtype=torch.float64)
    for r in range(settings.loops):
        losses = []
        for b, routed in enumerate(done):
            selected[r][b, routed.active[r]] = True
            for t, logit in routed.logits[r].items():
                router_logits[r][b, t] = logit
                losses.append(-F.logsigmoid(logit if t in routed.active[r] else -logit))
        if losses:
            aux = aux + settings.aux_weight * sum(losses) / len(losses)
    logits = torch.stack([row.logits(routed.states) for row, routed in zip(rows, done, strict=True)])
    return Result(logits, selected, router_logits, aux)


# models


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first features of each head, as many as the table has."""
    turned, kept = x[:, : cos.shape[-1]], x[:, cos.shape[-1] :]
    left, right = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-right, left], -1) * sin, kept], -1)


def scores_of(q: Tensor, visible: Visible, scale: float) -> Tensor:
    """[heads, visible]; a key's head may serve several query heads."""
    keys = torch.stack([k for _, (k, _) in visible], 1)
    return (q[:, None] * keys.repeat_interleave(len(q) // len(keys), 0)).sum(-1) * scale


def mix(weights: Tensor, visible: Visible) -> Tensor:
    """The weighted sum of the values, heads side by side."""
    values = torch.stack([v for _, (_, v) in visible], 1)
    return (weights[..., None] * values.repeat_interleave(len(weights) // len(values), 0)).sum(1).flatten()


def attend(q: Tensor, visible: Visible, scale: float, bias: Callable[[int], Tensor] | None = None) -> Tensor:
    """Attention of one token; `bias` gives what a position adds to the scores, [heads]. Zero where nothing is seen."""
    if not visible:
        return torch.zeros_like(q).flatten()
    scores = scores_of(q, visible, scale)
    if bias is not None:
        scores = scores + torch.stack([bias(j) for j, _ in visible], -1)
    return mix(scores.softmax(-1), visible)


class Llama:
    """Pre-norm, rotary, grouped keys, gated MLP."""

    def __init__(self, model: Any) -> None:
        self.model, self.base, self.layers = model, model.model, model.model.layers

    def embed(self, inputs: Inputs, row: int) -> list[Tensor]:
        ids = inputs["input_ids"][row]
        positions = inputs["position_ids"][row] if "position_ids" in inputs else torch.arange(len(ids))
        states = self.model.get_input_embeddings()(ids)
        cos, sin = self.base.rotary_emb(states, positions[None])
        self.rotary = list(zip(cos[0], sin[0], strict=True))
        return list(states)

    def key(self, layer: Any, x: Tensor, t: int) -> Key:
        attention, x = layer.self_attn, layer.input_layernorm(x)
        k, v = (linear(x).view(-1, attention.head_dim) for linear in (attention.k_proj, attention.v_proj))
        return rotate(k, *self.rotary[t]), v

    def query(self, layer: Any, x: Tensor, t: int) -> Tensor:
        attention = layer.self_attn
        return rotate(attention.q_proj(layer.input_layernorm(x)).view(-1, attention.head_dim), *self.rotary[t])

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        mixed = attend(self.query(layer, x, t), visible, layer.self_attn.scaling)
        x = x + layer.self_attn.o_proj(mixed)
        return x + self.feed(layer.mlp, layer.post_attention_layernorm(x))

    def feed(self, mlp: Any, x: Tensor) -> Tensor:
        return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))

    def finish(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.base.norm(x))


class Mixtral(Llama):
    """The two best of four experts; the gate's softmax is fp32."""

    def feed(self, mlp: Any, x: Tensor) -> Tensor:
        shares = F.linear(x, mlp.gate.weight).float().softmax(-1)
        best = shares.topk(2).indices.tolist()
        parts = [self.expert(mlp.experts, e, x) * (shares[e] / shares[best].sum()) for e in best]
        return parts[0] + parts[1]

    def expert(self, experts: Any, e: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, experts.gate_up_proj[e]).chunk(2)
        return F.linear(F.silu(gate) * up, experts.down_proj[e])


class Gemma2(Llama):
    """Norms on both sides, capped scores, a window in every second layer; the softmax is fp32, over a whole row."""

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        config = self.base.config
        if config.layer_types[depth] == "sliding_attention":
            visible = [(j, key) for j, key in visible if t - j < config.sliding_window]
        mixed = self.capped(self.query(layer, x, t), visible, layer.self_attn.scaling)
        x = x + layer.post_attention_layernorm(layer.self_attn.o_proj(mixed))
        return x + layer.post_feedforward_layernorm(self.feed(layer.mlp, layer.pre_feedforward_layernorm(x)))

    def capped(self, q: Tensor, visible: Visible, scale: float) -> Tensor:
        if not visible:
            return torch.zeros_like(q).flatten()
        cap, at = self.base.config.attn_logit_softcapping, [j for j, _ in visible]
        scores = torch.full((len(q), len(self.rotary)), -torch.inf, dtype=q.dtype)
        scores[:, at] = torch.tanh(scores_of(q, visible, scale) / cap) * cap
        return mix(scores.softmax(-1, dtype=torch.float32).to(q.dtype)[:, at], visible)

    def feed(self, mlp: Any, x: Tensor) -> Tensor:
        return mlp.down_proj(F.gelu(mlp.gate_proj(x), approximate="tanh") * mlp.up_proj(x))

    def finish(self, x: Tensor) -> Tensor:
        cap = self.base.config.final_logit_softcapping
        return torch.tanh(super().finish(x) / cap) * cap


class NeoX(Llama):
    """Attention and MLP side by side, each with its norm; q, k, v interleaved by head; half of a head is rotary."""

    def __init__(self, model: Any) -> None:
        self.model, self.base, self.layers = model, model.gpt_neox, model.gpt_neox.layers

    def fused(self, layer: Any, x: Tensor) -> tuple[Tensor, ...]:
        attention = layer.attention
        return attention.query_key_value(layer.input_layernorm(x)).view(-1, 3 * attention.head_size).chunk(3, -1)

    def key(self, layer: Any, x: Tensor, t: int) -> Key:
        _, k, v = self.fused(layer, x)
        return rotate(k, *self.rotary[t]), v

    def query(self, layer: Any, x: Tensor, t: int) -> Tensor:
        return rotate(self.fused(layer, x)[0], *self.rotary[t])

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        mixed = attend(self.query(layer, x, t), visible, layer.attention.scaling)
        return x + layer.attention.dense(mixed) + self.feed(layer.mlp, layer.post_attention_layernorm(x))

    def feed(self, mlp: Any, x: Tensor) -> Tensor:
        return mlp.dense_4h_to_h(F.gelu(mlp.dense_h_to_4h(x)))

    def finish(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.base.final_layer_norm(x))


class T5:
    """The decoder of an encoder-decoder. The bias table of all its layers is in the first; scores are not scaled."""

    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, model.decoder.block
        self.table = self.layers[0].layer[0].SelfAttention.relative_attention_bias

    def embed(self, inputs: Inputs, row: int) -> list[Tensor]:
        ids, mask = inputs["input_ids"][row], inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask[row]
        encoded = self.model.encoder(ids[None], mask[None]).last_hidden_state[0]
        self.encoded = encoded[mask.bool()]
        return list(self.model.decoder.embed_tokens(inputs["decoder_input_ids"][row]))

    def key(self, layer: Any, x: Tensor, t: int) -> Key:
        return self.pair(layer.layer[0].SelfAttention, layer.layer[0].layer_norm(x))

    def pair(self, attention: Any, x: Tensor) -> Key:
        k, v = (linear(x).unflatten(-1, (attention.n_heads, -1)) for linear in (attention.k, attention.v))
        return k, v

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        own, cross, feed = layer.layer
        attention = own.SelfAttention
        q = attention.q(own.layer_norm(x)).view(attention.n_heads, -1)
        x = x + attention.o(attend(q, visible, 1.0, lambda j: self.table.weight[self.bucket(t - j)]))
        attention = cross.EncDecAttention
        q = attention.q(cross.layer_norm(x)).view(attention.n_heads, -1)
        x = x + attention.o(attend(q, list(enumerate(zip(*self.pair(attention, self.encoded), strict=True))), 1.0))
        return x + feed.DenseReluDense.wo(F.relu(feed.DenseReluDense.wi(feed.layer_norm(x))))

    def bucket(self, distance: int) -> int:
        """Exact for near positions, then logarithmic."""
        count, most = self.table.num_embeddings, self.model.config.relative_attention_max_distance
        exact = count // 2
        if distance < exact:
            return distance
        far = torch.log(torch.tensor(distance).float() / exact) / math.log(most / exact)
        return min(exact + int(far * (count - exact)), count - 1)

    def finish(self, x: Tensor) -> Tensor:
        scale = self.model.config.d_model**-0.5 if self.model.config.scale_decoder_outputs else 1.0
        return self.model.lm_head(self.model.decoder.final_layer_norm(x) * scale)


class PostNormLayer(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask)
        x = self.first(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.second(x + self.down(F.gelu(self.up(x))))


class PostNormModel(nn.Module):
    """Causal, learned positions. The mask is of keys, [B, S], or of pairs, [B, S, S]."""

    def __init__(self, layers: int, positions: int = 64) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(positions, WIDTH)
        self.layers = nn.ModuleList(PostNormLayer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)
        mask = (at[:, None] >= at)[None, None]
        if attention_mask is not None:
            allowed = attention_mask.bool()
            mask = mask & (allowed[:, None, None] if allowed.dim() == 2 else allowed[:, None])
        x = self.embed(ids) + self.positions(at)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


class PostNorm:
    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, model.layers

    def embed(self, inputs: Inputs, row: int) -> list[Tensor]:
        ids = inputs["ids"][row]
        return [self.model.embed.weight[i] + self.model.positions.weight[t] for t, i in enumerate(ids.tolist())]

    def key(self, layer: Any, x: Tensor, t: int) -> Key:
        return layer.k(x).view(layer.heads, -1), layer.v(x).view(layer.heads, -1)

    def apply(self, layer: Any, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        q = layer.q(x).view(layer.heads, -1)
        x = layer.first(x + layer.out(attend(q, visible, q.shape[-1] ** -0.5)))
        return layer.second(x + layer.down(F.gelu(layer.up(x))))

    def finish(self, x: Tensor) -> Tensor:
        return self.model.head(x)


SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "use_cache": False,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "attn_implementation": "eager"}
GEMMA |= {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}
T5_SIZES = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_heads": 2, "use_cache": False}
T5_SIZES |= {"num_layers": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
FAMILIES: dict[str, tuple[type, str, dict[str, Any]]] = {
    "llama": (Llama, "Llama", SHARED),
    "parallel": (NeoX, "GPTNeoX", SHARED | {"rotary_pct": 0.5}),
    "encoder_decoder": (T5, "T5", T5_SIZES),
    "moe": (Mixtral, "Mixtral", SHARED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "hybrid": (Gemma2, "Gemma2", SHARED | GEMMA),
}


def build(kind: str, layers: int = 8, seed: int = 0, noise: float = 0.2) -> nn.Module:
    """A tiny model in fp64, in eval mode, with no two parameters equal; caches off."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "post_norm":
            model: nn.Module = PostNormModel(layers)
        else:
            _, family, options = FAMILIES[kind]
            options = options | {"num_decoder_layers" if kind == "encoder_decoder" else "num_hidden_layers": layers}
            head = "ForConditionalGeneration" if kind == "encoder_decoder" else "ForCausalLM"
            model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**options))
        model = model.double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * noise)
    return model


def math_of(kind: str, model: nn.Module) -> LayerMath:
    return PostNorm(model) if kind == "post_norm" else FAMILIES[kind][0](model)


def token_input(kind: str) -> str:
    """The argument with the tokens that are routed; a mask of theirs is named alike."""
    return {"post_norm": "ids", "encoder_decoder": "decoder_input_ids"}.get(kind, "input_ids")


def inputs_of(kind: str, real: Tensor, seed: int = 0, documents: Tensor | None = None) -> dict[str, Tensor]:
    """Keyword arguments of a model for tokens of which `real` [B, S] are no padding; packed rows have no padding."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(1, VOCAB, shape, generator=generator)

    name = token_input(kind)
    mask = "decoder_attention_mask" if kind == "encoder_decoder" else "attention_mask"
    inputs = {name: ids(*real.shape)} | ({} if real.all() else {mask: real.long()})
    if documents is not None:
        inputs |= packed(mask if name != "input_ids" else "position_ids", documents)
    if kind == "encoder_decoder":
        encoder = torch.ones(len(real), 5, dtype=torch.long)
        encoder[-1, -2:] = 0
        inputs |= {"input_ids": ids(*encoder.shape), "attention_mask": encoder}
    return inputs


def packed(name: str, documents: Tensor) -> dict[str, Tensor]:
    """Positions that restart (Hugging Face decoders read the documents from them), or a mask of pairs."""
    same = documents[:, :, None] == documents[:, None]
    if name == "position_ids":
        return {name: same.tril().sum(-1) - 1}
    return {name: same if name == "attention_mask" else same.tril()[:, None]}
