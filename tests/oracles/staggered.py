"""StagFormer: recipes.md, section 5.

Parameters: `combine` [p], and for stack q >= 1 and its layer l, counted within the stack, `cross.{q}.{l}.` before the
names of `crossing`. All else is the model's own. What recipes.md leaves open is read so:

- the weights of q, k and v start as copies of the layer's own, like its norms and biases; `o` starts at zero with its
  bias, and the bias is no part of what an empty set contributes;
- nothing is normed behind `o`: in a post-norm layer, and in one with norms on both sides, x += o(...) stands as written
  behind the layer's own attention, and a post-norm layer has no norm in front of q either;
- the window is that of `stagger`; that of the layer is for its own attention only. A relative bias is the model's;
- any lag >= 0 may be asked for; the stacks of a step are independent with `reinject` and a lag of 1 or more, only;
- recurrent decode needs that; what it combines behind the prompt is what runs: a_{p-1} out_{p-1}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .attention import Key, Visible
from .crossing import Crossing, CrossMath, copied
from .rows import Inputs, Row, rows_of

States = Mapping[int, Tensor]


@dataclass(frozen=True)
class Settings:
    """The options of `stagger`."""

    stacks: int = 2
    shared: bool = False
    lag: int = 1
    window: int | None = None
    reinject: bool = True  # otherwise a stack starts from the output of the one before, at the same position

    def __post_init__(self) -> None:
        if self.stacks < 1 or self.lag < 0 or (self.window is not None and self.window < 1):
            raise ValueError(f"{self.stacks} stacks, lag {self.lag}, window {self.window}")

    @property
    def independent(self) -> bool:
        """The stacks of one step need nothing of each other."""
        return self.reinject and self.lag >= 1

    def depths(self, layers: int) -> list[range]:
        """The layers of the model in each stack."""
        if self.shared:
            return [range(layers)] * self.stacks
        if layers % self.stacks:
            raise ValueError(f"{self.stacks} stacks do not divide {layers} layers")
        height = layers // self.stacks
        return [range(q * height, (q + 1) * height) for q in range(self.stacks)]

    def seen(self, row: Row, keys: Mapping[int, Key], t: int) -> Visible:
        """The rows of memory that token `t` sees."""
        last = t - self.lag
        first = 0 if self.window is None else last - self.window + 1
        return [(j, key) for j, key in row.visible(keys, t) if first <= j <= last]


def make_parameters(math_: CrossMath, settings: Settings, noise: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """As they start, and some noise on everything."""
    generator = torch.Generator().manual_seed(seed)
    found = {"combine": torch.eye(settings.stacks, dtype=torch.float64)[-1]}
    for q, depths in enumerate(settings.depths(len(math_.layers))):
        for at, depth in enumerate(depths if q else ()):
            found |= {f"cross.{q}.{at}.{n}": p for n, p in copied(math_, math_.layers[depth]).items()}
    return {
        name: (value + noise * torch.randn(value.shape, generator=generator, dtype=value.dtype)).requires_grad_()
        for name, value in found.items()
    }


Stacks = list[list[Crossing]]


def stacks_of(math_: CrossMath, settings: Settings, parameters: Mapping[str, Tensor]) -> Stacks:
    if not math_.causal:
        raise ValueError("an encoder has no stacks")

    def of(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}

    return [
        [Crossing(math_, math_.layers[depth], depth, of(f"cross.{q}.{at}.")) for at, depth in enumerate(depths)]
        for q, depths in enumerate(settings.depths(len(math_.layers)))
    ]


def combined(weights: Tensor, outs: Mapping[int, Tensor]) -> Tensor:
    """The sum of what stacks made of one token, by the number of the stack."""
    return torch.stack([weights[q] * out for q, out in outs.items()]).sum(0)


# all positions at once


def run_stack(row: Row, settings: Settings, stack: Sequence[Crossing], states: States, memory: States) -> States:
    """All tokens through a stack, layer by layer."""
    for layer in stack:
        rows = {j: layer.memory_key(m, j) for j, m in memory.items() if row.real[j]}
        seen = {t: settings.seen(row, rows, t) for t in states}
        states = {t: layer.enter(x, t, seen[t]) for t, x in states.items()}
        keys = row.keys(layer.layer, states)
        states = {t: layer.apply(x, t, row.visible(keys, t), seen[t]) for t, x in states.items()}
    return states


def stagger(
    math_: CrossMath,
    settings: Settings,
    parameters: Mapping[str, Tensor],
    inputs: Inputs,
    real: Tensor,
    documents: Tensor | None = None,
) -> Tensor:
    """Logits [B, S, V], one stack after the other."""
    stacks, found = stacks_of(math_, settings, parameters), []
    for b, row in enumerate(rows_of(math_, real, documents)):
        embedded: States = dict(enumerate(math_.embed(inputs, b)))
        outs: list[States] = []
        for stack in stacks:
            memory = outs[-1] if outs else {}
            outs.append(run_stack(row, settings, stack, memory if outs and not settings.reinject else embedded, memory))
        found.append(
            row.logits({t: combined(parameters["combine"], {q: o[t] for q, o in enumerate(outs)}) for t in embedded})
        )
    return torch.stack(found)


# position by position


@dataclass
class Past:
    """What is kept of a row: the keys of every layer, and what every stack made, by position."""

    row: Row
    settings: Settings
    stacks: Stacks
    keys: dict[tuple[int, int], dict[int, Key]] = field(default_factory=dict)
    outs: dict[int, dict[int, Tensor]] = field(default_factory=dict)

    def step(self, q: int, t: int, embedded: Tensor, memory: States) -> None:
        """One token through one stack."""
        x = embedded if self.settings.reinject or not q else self.outs[q - 1][t]
        for at, layer in enumerate(self.stacks[q]):
            rows = {j: layer.memory_key(m, j) for j, m in memory.items() if self.row.real[j]}
            seen = self.settings.seen(self.row, rows, t)
            x = layer.enter(x, t, seen)
            keys = self.keys.setdefault((q, at), {})
            if self.row.real[t]:
                keys[t] = self.math.key(layer.layer, x, t)
            x = layer.apply(x, t, self.row.visible(keys, t), seen)
        self.outs.setdefault(q, {})[t] = x

    def steps(self, t: int, embedded: Tensor, order: Sequence[int]) -> None:
        """One token through all stacks."""
        for q in order:
            self.step(q, t, embedded, self.outs.get(q - 1, {}))

    @property
    def math(self) -> CrossMath:
        return self.stacks[0][0].math


def decode(
    math_: CrossMath,
    settings: Settings,
    parameters: Mapping[str, Tensor],
    inputs: Inputs,
    real: Tensor,
    documents: Tensor | None = None,
    order: Sequence[int] | None = None,
) -> Tensor:
    """Logits [B, S, V] of one step after the other; in a step, the stacks run in the order given."""
    order = range(settings.stacks) if order is None else order
    if sorted(order) != list(range(settings.stacks)) or not (settings.independent or list(order) == sorted(order)):
        raise ValueError(f"stacks in the order {list(order)}")
    return walk(math_, settings, parameters, inputs, real, documents, order, real.shape[1], 0)


def recurrent(
    math_: CrossMath,
    settings: Settings,
    parameters: Mapping[str, Tensor],
    inputs: Inputs,
    real: Tensor,
    documents: Tensor | None = None,
    *,
    prompt: int,
    memory: int = 0,
) -> Tensor:
    """Logits [B, S, V]; behind the first `prompt` positions of each row, the last stack alone.

    What it sees there is its own output, and of the prompt that of stack `memory`.
    """
    if not settings.shared or not settings.independent or settings.stacks < 2:
        raise ValueError(f"recurrent decode of {settings}")
    order = range(settings.stacks)
    return walk(math_, settings, parameters, inputs, real, documents, order, prompt, memory)


def walk(
    math_: CrossMath,
    settings: Settings,
    parameters: Mapping[str, Tensor],
    inputs: Inputs,
    real: Tensor,
    documents: Tensor | None,
    order: Sequence[int],
    prompt: int,
    memory: int,
) -> Tensor:
    """Token by token: all stacks, and from position `prompt` on the last one."""
    stacks, last, found = stacks_of(math_, settings, parameters), settings.stacks - 1, []
    for b, row in enumerate(rows_of(math_, real, documents)):
        past, states = Past(row, settings, stacks), {}
        for t, x in enumerate(math_.embed(inputs, b)):
            if t < prompt:
                past.steps(t, x, order)
            else:
                own = {j: out for j, out in past.outs.get(last, {}).items() if j >= prompt}
                past.step(last, t, x, {j: past.outs[memory][j] for j in range(prompt)} | own)
            made = {q: outs[t] for q, outs in past.outs.items() if t in outs}
            states[t] = combined(parameters["combine"], made)
        found.append(row.logits(states))
    return torch.stack(found)
