"""Causal masks as flags: the same function, without the mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ZOO
from architectures.base import perturb
from compare import without_cache
from torch import Tensor, nn
from torch.nn import functional as F

import depthc
from depthc.codegen.causal import flagged
from depthc.ir.masks.causality import Causality
from depthc.ir.program import Program
from depthc.ir.verify import verify

MORE = pytest.mark.thorough
CAUSAL = ("llama", "gpt_neox", *(pytest.param(name, marks=MORE) for name in ("gpt2", "olmo2", "mixtral", "opt")))
OTHER = ("mistral", "bert", *(pytest.param(name, marks=MORE) for name in ("bloom", "gemma2")))  # windows, a bias, all


def captured(name: str, dtype: torch.dtype = torch.float32, **more: Tensor) -> tuple[Any, Program, dict[str, Any]]:
    entry = ZOO[name]
    model = perturb(entry.build()).to(dtype).eval()
    args, kwargs = entry.example()
    assert not args
    kwargs = without_cache(model, kwargs) | more
    return model, depthc.capture(model, kwargs=kwargs), kwargs


def logits(out: Any) -> Tensor:
    return next(t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_the_same_without_a_mask(name: str) -> None:
    model, program, kwargs = captured(name)
    made = flagged(program)
    verify(made)
    text = str(made)
    assert "mask" not in text.partition("def ")[2].replace("attention_mask", "").replace("token_type", "")
    for length in (2, 9, 17):
        own = {key: value[:, :length] if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        torch.testing.assert_close(logits(made.run(**own)), logits(model(**own)), rtol=0, atol=2e-6)


class Masked(nn.Module):
    """A layer whose mask `make` makes of the layer, the batch and the tokens; `extra` keys stand before the tokens'."""

    def __init__(self, make: Callable[[Any, int, int], Tensor], extra: int) -> None:
        super().__init__()
        self.make, self.extra, self.qkv = make, extra, nn.Linear(8, 24)
        self.memory = nn.Parameter(torch.randn(1, 2, extra, 4))
        self.register_buffer("bias", torch.zeros(300, 300))
        self.register_buffer("window", torch.tensor(100))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.extra:
            k, v = (torch.cat([self.memory.expand(b, -1, -1, -1), part], 2) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, self.make(self, b, t))
        return x + out.transpose(1, 2).flatten(2)


def behind(t: int) -> Tensor:
    """How far every key is behind every query."""
    place = torch.arange(t)
    return place[:, None] - place[None, :]


def added(t: int) -> Tensor:
    return torch.zeros(t, t).masked_fill(behind(t) < 0, -torch.inf)


NOT_QUITE: dict[str, Callable[[Any, int, int], Tensor]] = {
    "a window in a buffer": lambda layer, b, t: (behind(t) >= 0) & (behind(t) < layer.window),
    "a window in a tensor": lambda layer, b, t: (behind(t) >= 0) & (behind(t) < torch.full((), 100)),
    "a bias far away": lambda layer, b, t: added(t) - 0.5 * (behind(t) - 50).clamp(min=0),
    "a small bias": lambda layer, b, t: added(t) - 2e-5 * behind(t),
    "at random": lambda layer, b, t: (
        (behind(t) == 0) | (behind(t) >= 0) & (F.dropout(torch.ones(t, t), 0.3, layer.training) > 0)
    ),
    "at random, but seldom": lambda layer, b, t: (behind(t) >= 0) & (torch.rand(t, t) > 1e-7),
    "a buffer that may be loaded": lambda layer, b, t: added(t) + layer.bias[:t, :t],
    "another in other batch rows": lambda layer, b, t: (
        (behind(t) >= 0) & ((torch.arange(b) == 0)[:, None, None, None] | (behind(t) < 3))
    ),
    "longer than is looked at": lambda layer, b, t: (behind(t) >= 0) & (behind(t) < 4096),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_QUITE)
def test_masks_that_say_more_stay(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Masked(NOT_QUITE[name], 0) for _ in range(3)])
    program = depthc.capture(model, (torch.randn(2, 9, 8),))
    assert flagged(program) is program


def test_keys_before_the_tokens_own_keep_the_mask() -> None:
    """The flag counts from the first key."""
    torch.manual_seed(0)
    masks = (lambda layer, b, t: F.pad(behind(t) >= 0, (2, 0), value=True), lambda layer, b, t: behind(t) >= 0)
    memory, plain = (nn.Sequential(*[Masked(m, n) for _ in range(3)]) for m, n in zip(masks, (2, 0), strict=True))
    program = depthc.capture(memory, (torch.randn(2, 9, 8),))
    assert flagged(program) is program
    program = depthc.capture(plain, (torch.randn(2, 9, 8),))
    assert flagged(program) is not program  # the same without them


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER)
def test_other_masks_stay(name: str) -> None:
    _, program, _ = captured(name)
    assert flagged(program) is program


@pytest.mark.slow
def test_padding_stays() -> None:
    mask = torch.ones(3, 17, dtype=torch.int64)
    _, program, _ = captured("llama", attention_mask=mask)
    assert flagged(program) is program


@pytest.mark.thorough
def test_key_heads_are_shared_in_half_precision() -> None:
    """In single precision repeating them is what fast kernels need."""
    model, program, kwargs = captured("llama", torch.bfloat16)
    text = str(flagged(program))
    assert "enable_gqa=True" in text
    assert "expand(" not in text
    gap = (logits(flagged(program).run(**kwargs)) - logits(model(**kwargs))).abs().max()
    assert gap <= 2**-6 * logits(model(**kwargs)).abs().max()
    assert "enable_gqa" not in str(flagged(captured("llama")[1]))


@pytest.mark.slow
def test_gradients_are_those_of_the_model() -> None:
    model, program, kwargs = captured("llama", torch.float64)
    names = [name for name, _ in model.named_parameters()]
    total = logits(model(**kwargs)).square().sum()
    wanted = torch.autograd.grad(total, list(model.parameters()))
    weights = {name: tensor.detach().requires_grad_() for name, tensor in program.weights.items() if name in names}
    total = logits(flagged(program).with_weights({**program.weights, **weights}).run(**kwargs)).square().sum()
    found = torch.autograd.grad(total, [weights[name] for name in names])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_dynamo_reads_what_is_known_of_a_block() -> None:
    """Not the graphs that it was found in: those are none of its business, and torch 2.11 says so."""
    program = captured("llama")[1]
    (block,) = program.blocks.values()
    known = Causality.of(program).of_ports(block)
    assert known == (True,)

    def read(x: Tensor) -> Tensor:
        return x + sum(Causality.of(program).of_ports(block))

    assert torch.compile(read, backend="eager", fullgraph=True)(torch.zeros(())) == 1


@pytest.mark.slow
def test_step_by_step() -> None:
    """Of new tokens behind a cache the flag is a mask again."""
    _, program, kwargs = captured("llama")
    made, ids = flagged(program), kwargs["input_ids"]
    out, past = made.start(input_ids=ids[:, :9])
    rows = [logits(out)]
    for cut in ((9, 10), (10, 14), (14, 17)):
        out, past = made.step(past, input_ids=ids[:, slice(*cut)])
        rows.append(logits(out))
    torch.testing.assert_close(torch.cat(rows, 1), logits(program.run(**kwargs)), rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_modules_are_told_unless_nothing_was_rewritten() -> None:
    model, _, kwargs = captured("llama")
    assert "True, scale" in str(depthc.compile(model, "tie", kwargs=kwargs, loops=2).program)
    same = depthc.compile(model, kwargs=kwargs)
    assert "causal_mask" in str(same.program)
    assert torch.equal(logits(same(**kwargs)), logits(model(**kwargs)))
