"""Recurrent decoding of staggered stacks: behind the prompt the last one alone, judged by the oracle's own loop."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from oracles import Wide, staggered
from torch import Tensor

import depthc
from depthc.codegen.module import DepthModule
from depthc.ir.errors import IncrementalError
from depthc.ir.incremental import Past
from depthc.ir.recurrent import Recurrent
from depthc.ir.side_by_side import step

from .models import Spec, Stacked, ids, seeded
from .routed import FORWARD, ROWS, captured, counted, documents_of, logits_of
from .test_stagger import SOME, compiled, for_oracle
from .test_stagger_steps import LENGTH, PROMPT, full, split

SHARED: dict[str, Any] = {"shared": True}
SETTINGS = {
    "shared": SHARED,
    "window": SHARED | {"lag": 2, "window": 2},
    "three": SHARED | {"stacks": 3, "window": 3},
}


def decoded(kind: str, module: DepthModule, rows: str, at_once: int = 1) -> tuple[Tensor, Past]:
    """Logits of a prompt, and of further tokens `at_once` a step."""
    program, (tokens, fixed) = Recurrent(module.program), split(kind, captured(kind, rows)[2])
    with Wide(), torch.no_grad():
        out, past = program.start(**fixed, **{n: v[:, :PROMPT] for n, v in tokens.items()})
        parts = [logits_of(out)]
        for t in range(PROMPT, LENGTH, at_once):
            out, past = program.step(past, **{n: v[:, t : t + at_once] for n, v in tokens.items()})
            parts.append(logits_of(out))
    return torch.cat(parts, 1), past


def assert_as_the_oracle(kind: str, rows: str, at_once: int = 1, **options: Any) -> None:
    """The prompt's memory is what the stack before the last one made."""
    module, settings = compiled(kind, rows, **options), staggered.Settings(**options)
    model, _, inputs = captured(kind, rows)
    math, real = oracles.math_of(kind, model), ROWS[rows]
    with Wide(), torch.no_grad():
        given = settings, for_oracle(math, module, settings), inputs, real, documents_of(rows)
        expected = staggered.recurrent(math, *given, prompt=PROMPT, memory=settings.stacks - 2)
    found, _ = decoded(kind, module, rows, at_once)
    assert (found - expected)[real].abs().max() < FORWARD
    assert (found - full(module, inputs))[:, PROMPT + settings.lag + 1 :].abs().max() > 1e-6  # an approximation


@pytest.mark.parametrize("name", SETTINGS)
def test_as_the_oracle(name: str) -> None:
    assert_as_the_oracle("llama", "full", **SETTINGS[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOME[1:])
def test_as_the_oracle_on_others(kind: str) -> None:
    assert_as_the_oracle(kind, "padded", **SHARED)


@pytest.mark.thorough
def test_documents() -> None:
    assert_as_the_oracle("llama", "packed", **SETTINGS["window"])


def test_as_many_tokens_at_once_as_the_lag() -> None:
    assert_as_the_oracle("llama", "full", at_once=2, **SETTINGS["window"])
    with pytest.raises(IncrementalError, match="1 new tokens at most"):
        assert_as_the_oracle("llama", "full", at_once=2, **SHARED)


def test_the_untrained_one_is_the_model() -> None:
    module, inputs = compiled("llama", "full", noise=0, **SHARED), captured("llama", "full")[2]
    found, _ = decoded("llama", module, "full")
    assert (found - full(module, inputs)).abs().max() < FORWARD


def test_one_stack_runs() -> None:
    """A step applies every layer once, and keeps nothing for the stack that does not run."""
    module, (tokens, _) = compiled("llama", **SHARED), split("llama", captured("llama", "full")[2])
    token = {n: v[:, PROMPT : PROMPT + 1] for n, v in tokens.items()}
    decoding, after = Recurrent(module.program), dict[str, Past]()
    with Wide(), torch.no_grad():
        _, past = decoding.start(**{n: v[:, :PROMPT] for n, v in tokens.items()})

        def alone() -> None:
            after["alone"] = decoding.step(past, **token)[1]

        def all_stacks() -> None:
            after["all"] = step(module.program, past, (), token)[1]

        one, two = counted(alone, module), counted(all_stacks, module)
    batch, layers = len(ROWS["full"]), 8
    assert one["down_proj"] == [batch] * layers
    assert two["down_proj"] == [batch] * layers * 2
    assert after["alone"].length == after["all"].length == PROMPT + 1
    assert after["alone"].cache_bytes < after["all"].cache_bytes


def test_generation() -> None:
    model = seeded(lambda: Stacked(Spec(depth=3)))
    module = depthc.compile(model, "stagformer_shared", args=(ids(),)).eval()
    found = depthc.generate(module, ids(), 6, recurrent=True)
    assert torch.equal(found, depthc.generate(module, ids(), 6))  # untrained
    with torch.no_grad():
        for parameter in module.new_parameters().values():
            parameter.add_(torch.randn(parameter.shape))
    decoding = Recurrent(module.program)
    expected, (out, past) = [ids()], decoding.start(ids())
    for _ in range(6):
        expected.append(out[:, -1:].argmax(-1))
        out, past = decoding.step(past, expected[-1])
    assert torch.equal(depthc.generate(module, ids(), 6, recurrent=True), torch.cat(expected, 1))


# refused


def test_stacks_with_layers_of_their_own() -> None:
    module = compiled("llama")
    with pytest.raises(IncrementalError, match="do not share their layers"):
        Recurrent(module.program)
    with pytest.raises(IncrementalError, match="cannot run side by side"):
        Recurrent(captured("llama", "full")[1])


def test_a_recurrent_past_is_no_past_of_all_stacks() -> None:
    module = compiled("llama", **SHARED)
    _, past = decoded("llama", module, "full")
    token = {"input_ids": torch.ones(len(ROWS["full"]), 1, dtype=torch.int64)}
    with pytest.raises(IncrementalError, match="the last stack alone has run"):
        module.program.step(past, **token)
    with pytest.raises(IncrementalError, match="the last stack alone has run"):
        step(module.program, past, (), token)
