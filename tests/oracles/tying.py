"""Layer sharing, section 1 of recipes.md: the layer that each depth takes, and the model with every token at all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .rows import Inputs, LayerMath, rows_of


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
