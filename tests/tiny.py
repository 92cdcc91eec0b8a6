"""The tiny models of the oracles, and the rows that they are tried on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import oracles
import torch
from oracles import Key, LayerMath, Visible, Wide
from torch import Tensor, nn

TOLERANCE = 1e-10
EVERY = (*oracles.KINDS, *oracles.ENCODERS)
FULL = torch.ones(2, 7, dtype=torch.bool)
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]]).bool()
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 2, 2]])


@cache
def model(kind: str) -> nn.Module:
    return oracles.build(kind)


def math_(kind: str) -> LayerMath:
    return oracles.math_of(kind, model(kind))


def logits_of(kind: str, inputs: Mapping[str, Tensor]) -> Tensor:
    out = model(kind)(**inputs)
    return out if isinstance(out, Tensor) else out["logits" if "logits" in out else "last_hidden_state"]


def gap(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


def scalar(logits: Tensor) -> Tensor:
    """A number whose gradient is different everywhere."""
    return (logits * torch.linspace(-1, 1, logits.numel()).double().view_as(logits)).sum()


def assert_same_gradients(pair: Sequence[Tensor], leaves: Mapping[str, Tensor]) -> None:
    """Of two ways to compute the same, by the same leaves."""
    given = {"retain_graph": True, "allow_unused": True}
    ours, theirs = (torch.autograd.grad(scalar(out), list(leaves.values()), **given) for out in pair)
    for name, found, expected in zip(leaves, ours, theirs, strict=True):
        assert (found is None) == (expected is None), name
        assert found is None or gap(found, expected) < 1e-8, name


def changed_last(kind: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with another last token in every row."""
    tokens = inputs[oracles.token_input(kind)].clone()
    tokens[:, -1] = tokens[:, -1] % (oracles.VOCAB - 1) + 1
    return dict(inputs) | {oracles.token_input(kind): tokens}


def alone(kind: str, inputs: Mapping[str, Tensor], b: int, real: Tensor) -> dict[str, Tensor]:
    """A row of padded inputs without its padding."""
    name, mask = oracles.token_input(kind), "decoder_attention_mask" if kind == "encoder_decoder" else "attention_mask"
    kept = {key: value[b : b + 1] for key, value in inputs.items() if key != mask}
    return kept | {name: inputs[name][b : b + 1, real[b]]}


def unpadded(kind: str) -> list[int]:
    """The rows of `PADDED` that are the same without padding: on the left only where positions are relative."""
    return [1] if kind in ("post_norm", oracles.ENCODERS[0]) else [0, 1]


def padding_gap(kind: str, run: Callable[..., Tensor]) -> float:
    """How far logits of padded rows are from those of the same rows alone; `run` takes inputs and the real tokens."""
    inputs, gaps = oracles.inputs_of(kind, PADDED), []
    with Wide():
        found = run(inputs, PADDED)
        for b in unpadded(kind):
            real = PADDED[b]
            gaps.append(gap(found[b, real], run(alone(kind, inputs, b, PADDED), real[None, real])[0]))
    return max(gaps)


def documents_gap(kind: str, run: Callable[..., Tensor]) -> float:
    """How far logits of packed documents are from those of each alone; `run` takes inputs, real tokens, documents."""
    inputs, gaps = oracles.inputs_of(kind, FULL, documents=DOCUMENTS), []
    with Wide():
        found = run(inputs, FULL, DOCUMENTS)
        for b, d in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]:
            where = DOCUMENTS[b] == d
            one = {"input_ids": inputs["input_ids"][b : b + 1, where]}
            gaps.append(gap(found[b, where], run(one, torch.ones(1, int(where.sum()), dtype=torch.bool))[0]))
    return max(gaps)


class Toy:
    """One feature. A layer adds its number to the state, and the states that it sees."""

    def __init__(self, layers: int) -> None:
        self.layers: Sequence[nn.Module] = [nn.Identity() for _ in range(layers)]
        self.causal = True
        self.keys: list[tuple[int, int]] = []  # layer, token

    def embed(self, inputs: Mapping[str, Tensor], row: int) -> list[Tensor]:
        return list(inputs["x"][row, :, None])

    def key(self, layer: nn.Module, x: Tensor, t: int) -> Key:
        self.keys.append((self.layers.index(layer), t))
        return x, x

    def apply(self, layer: nn.Module, depth: int, x: Tensor, t: int, visible: Visible) -> Tensor:
        return x + self.layers.index(layer) + sum(v for _, (_, v) in visible)

    def finish(self, x: Tensor) -> Tensor:
        return x
