"""What an entry of the zoo is, and the few helpers that every family shares.

The zoo is test data: the compiler never reads it. An entry says how to build a tiny random model, which inputs it
takes, and what a correct capture of it must find.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

VOCAB = 97
WIDTH = 64
SPECIAL_TOKENS = 3  # the lowest ids are padding, start and end in most configurations

NOT_CAUSAL = ("incremental",)  # reasons for which a check may refuse, as `refuses` of an entry
STATEFUL = ("subset", "incremental")
RECURSIONS = ("mor", "mor_token")
HYBRID = (*STATEFUL, *RECURSIONS)  # layers that scan, convolve or rearrange the tokens cannot run on some of them
SCANNED = (*HYBRID, "mod")  # and there are no others

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Options = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Architecture:
    """One row of the zoo.

    `inputs` takes `length` and `batch`; `other` is a second pair of them. `dynamic` is what a capture is expected to
    keep symbolic: "seq" (length and batch), "length", "batch", or "static".

    `stream` says which inputs carry new tokens when a model runs incrementally, one letter a dimension: `t` is cut to
    the new tokens, `k` to all tokens so far, any other letter is left whole. Inputs that it does not name (images, an
    encoder's tokens) belong to the prompt; an empty stream cannot be stepped.

    `refuses` names the checks of bench/zoo.py that may answer with a typed error, because the architecture is not
    causal, say; an error anywhere else is a failure. `tolerance` is above zero where eager runs other kernels than the
    model's own code says, so that nothing captured from that code can be bitwise equal to it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[..., Inputs]
    depths: tuple[int, ...]
    kind: str = "plain"
    dynamic: str = "seq"
    stream: Mapping[str | int, str] = field(default_factory=dict)
    length: int = 17
    batch: int = 3
    other: tuple[int, int] | None = (23, 2)
    refuses: tuple[str, ...] = ()
    tolerance: float = 0.0
    held_out: bool = False
    ci: bool = False
    notes: str = ""

    def example(self) -> Inputs:
        """The inputs that the model is captured with."""
        return self.inputs(length=self.length, batch=self.batch)

    def elsewhere(self) -> Inputs | None:
        """Inputs of another size, or None where every dimension is expected to be static."""
        if self.other is None:
            return None
        length, batch = self.other
        return self.inputs(length=length, batch=batch)


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make every parameter its own random value, so that a layer run with another layer's weights cannot pass.

    Fresh models have equal norms and zero biases in all layers. The noise on matrices is above the usual 0.02 so that
    attention is far from uniform and a wrong mask shows.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.08 if parameter.dim() > 1 else 0.1
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Build with fixed seeds, without touching the caller's random state, and return the model in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return perturb(make()).eval()


def hugging_face(config: str, model: str, options: Options) -> nn.Module:
    """A random model of a Hugging Face class, built offline from its configuration class."""
    import transformers

    return seeded(lambda: getattr(transformers, model)(getattr(transformers, config)(**options)))


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random features, the same for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(batch: int, length: int, seed: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SPECIAL_TOKENS, vocab, (batch, length), generator=generator)


def token_inputs(length: int = 17, batch: int = 3) -> Inputs:
    return (), {"input_ids": ids(batch, length)}


def pixel_inputs(length: int = 0, batch: int = 3, size: int = 32) -> Inputs:
    """Images have one size: `length` is accepted and ignored, so that all entries are called alike."""
    return (), {"pixel_values": draw(batch, 3, size, size)}


def small(**options: Any) -> dict[str, Any]:
    """The options that most configurations share, at toy sizes, with `options` on top.

    A configuration keeps an option that it does not know as a mere attribute, so one set serves all.
    """
    shared = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    return shared | options


def causal(name: str, family: str, depths: tuple[int, ...], options: Options, **entry: Any) -> Architecture:
    """An entry for a causal language model whose classes are named after `family` in the usual way."""
    model = entry.pop("model", f"{family}ForCausalLM")
    build = partial(hugging_face, entry.pop("config", f"{family}Config"), model, options)
    return Architecture(name, build, token_inputs, depths, stream={"input_ids": "bt"}, **entry)


def encoder(name: str, family: str, depths: tuple[int, ...], options: Options, **entry: Any) -> Architecture:
    """An entry for a bidirectional text encoder with its masked language model head."""
    settings = {"model": f"{family}ForMaskedLM", "refuses": NOT_CAUSAL} | entry
    return causal(name, family, depths, options, **settings)


def vision(name: str, family: str, depths: tuple[int, ...], options: Options, **entry: Any) -> Architecture:
    """An entry for an image encoder: only the batch can be dynamic."""
    build = partial(hugging_face, entry.pop("config", f"{family}Config"), entry.pop("model", f"{family}Model"), options)
    settings: dict[str, Any] = {"kind": "vision", "dynamic": "batch", "inputs": pixel_inputs, "other": (17, 5)}
    settings |= {"refuses": NOT_CAUSAL} | entry
    return Architecture(name=name, build=build, depths=depths, **settings)
