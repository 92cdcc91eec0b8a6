"""Causal masks as flags: the same function, without the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ZOO
from architectures.base import perturb
from compare import without_cache
from torch import Tensor

import depthc
from depthc.codegen.causal import flagged
from depthc.ir.program import Program
from depthc.ir.verify import verify

CAUSAL = ("llama", "gpt2", "olmo2", "gpt_neox", "mixtral", "opt")  # a post-norm, a parallel and an MoE model among them
OTHER = ("mistral", "bert", "bloom", "gemma2")  # windows, no causality, a bias; windows in every other layer


def captured(name: str, dtype: torch.dtype = torch.float32, **more: Tensor) -> tuple[Any, Program, dict[str, Any]]:
    entry = ZOO[name]
    model = perturb(entry.build()).to(dtype).eval()
    args, kwargs = entry.example()
    assert not args
    kwargs = without_cache(model, kwargs) | more
    return model, depthc.capture(model, kwargs=kwargs), kwargs


def logits(out: Any) -> Tensor:
    return next(t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))


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


@pytest.mark.parametrize("name", OTHER)
def test_other_masks_stay(name: str) -> None:
    _, program, _ = captured(name)
    assert flagged(program) is program


def test_padding_stays() -> None:
    mask = torch.ones(3, 17, dtype=torch.int64)
    _, program, _ = captured("llama", attention_mask=mask)
    assert flagged(program) is program


def test_key_heads_are_shared_in_half_precision() -> None:
    """In single precision repeating them is what fast kernels need."""
    model, program, kwargs = captured("llama", torch.bfloat16)
    text = str(flagged(program))
    assert "enable_gqa=True" in text
    assert "expand(" not in text
    gap = (logits(flagged(program).run(**kwargs)) - logits(model(**kwargs))).abs().max()
    assert gap <= 2**-6 * logits(model(**kwargs)).abs().max()
    assert "enable_gqa" not in str(flagged(captured("llama")[1]))


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


def test_modules_are_told_unless_nothing_was_rewritten() -> None:
    model, _, kwargs = captured("llama")
    assert "True, scale" in str(depthc.compile(model, "tie", kwargs=kwargs, loops=2).program)
    same = depthc.compile(model, kwargs=kwargs)
    assert "causal_mask" in str(same.program)
    assert torch.equal(logits(same(**kwargs)), logits(model(**kwargs)))
