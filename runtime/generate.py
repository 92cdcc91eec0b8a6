"""Generation: a program continues sequences, token by token, with the caches that its attention ports keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthc.codegen.module import DepthModule
from depthc.ir.errors import IncrementalError, InputError
from depthc.ir.masks.padding import padding_of
from depthc.ir.memo import once_a_program
from depthc.ir.plans import plan_of
from depthc.ir.program import Program, calls
from depthc.ir.recurrent import Recurrent
from depthc.ir.restrict import restricted


@torch.no_grad()
def generate(
    model: DepthModule | Program,
    prompt: Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: int | None = None,
    argument: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    recurrent: bool = False,
) -> Tensor:
    """Continue prompts: greedily, or by draws.

    Selections of tokens are those of inference: causal, with a cache for every recursion.

    Args:
        model: a compiled module or a program. Labels that it was captured with are not needed.
        prompt: int[batch, tokens]; shorter ones padded on the left, with a mask among `arguments`.
        new_tokens: how many tokens to add.
        temperature: 0 takes the most likely token; above, draws from softmax(logits / temperature).
        top_k: draw among the k most likely tokens only.
        seed: of the draws.
        stop: a token after which a row only repeats it.
        argument: the name of the argument that takes the tokens, where more than one could.
        arguments: the model's other arguments for the prompt: masks, an encoder's tokens. Masks over the tokens are
            continued with tokens that count.
        recurrent: of staggered stacks that share their layers, run the last one alone behind the prompt: an
            approximation (`depthc.ir.recurrent`).

    Returns:
        int[batch, tokens + new_tokens]: the prompts and what follows.

    Raises:
        IncrementalError: the program has no incremental form; says why.
        InputError: it cannot be told which argument takes the tokens, or how another one continues.

    Example:
        >>> generate(compiled, ids, 20, temperature=0.8)  # doctest: +SKIP
    """
    program = scoring(model.program if isinstance(model, DepthModule) else model)
    others = dict(arguments or {})
    slots = slots_of(program, argument, others)
    draws = torch.Generator(prompt.device).manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        return choose_token(logits[:, -1], temperature, top_k, draws).to(prompt.dtype)

    decoding = Recurrent(program) if recurrent else program
    return continue_prompts(decoding, slots, prompt, new_tokens, others, choose, stop)


def continue_prompts(
    program: Any,
    slots: Slots,
    prompt: Tensor,
    new_tokens: int,
    others: Mapping[str, Any],
    choose: Callable[[Any], Tensor],
    stop: int | None,
) -> Tensor:
    """Prompts and what follows; of a program, or what has its `start` and `step`."""
    outputs, past = program.start(**{slots.tokens: prompt}, **others)
    tokens, ended = [prompt], torch.zeros(len(prompt), 1, dtype=torch.bool, device=prompt.device)
    for number in range(new_tokens):
        token = choose(outputs)
        if stop is not None:
            token = token.masked_fill(ended, stop)
            ended = ended | (token == stop)
        tokens.append(token)
        if number + 1 < new_tokens:
            outputs, past = program.step(past, **{slots.tokens: token}, **slots.continued(token))
    return torch.cat(tokens, 1)


def choose_token(logits: Tensor, temperature: float, top_k: int | None, draws: torch.Generator) -> Tensor:
    """One token a row: [batch, 1]."""
    if not temperature:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=draws)


def scoring(program: Program) -> Program:
    """The program of the first output that is computed token by token: the logits, not a loss."""
    return once_a_program(program, "_scoring", lambda: _find_scoring(program))


def _find_scoring(program: Program) -> Program:
    refused: IncrementalError | None = None
    for output in program.signature.outputs:
        if isinstance(output, str):
            found = restricted(program, output)
            try:
                plan_of(found)
            except IncrementalError as error:
                refused = refused or error
            else:
                return found
    raise refused or IncrementalError("the program has no output", remedy="capture a model that returns logits")


@dataclass(frozen=True)
class Slots:
    """The argument of the tokens, and masks with what continues them."""

    tokens: str
    masks: Mapping[str, tuple[torch.dtype, int]]

    def continued(self, token: Tensor) -> dict[str, Tensor]:
        """The part of every mask that belongs to new tokens."""
        return {n: torch.full_like(token, on, dtype=dtype) for n, (dtype, on) in self.masks.items()}


def slots_of(program: Program, argument: str | None, others: Mapping[str, Any]) -> Slots:
    growing = list(plan_of(program).growing)
    leaves = {leaf.name: leaf.type for leaf in program.signature.inputs if leaf.type is not None}
    applied = [call for call, _ in calls(program.stacks[-1].ops)]
    masks = {p.argument: (p.type.dtype, int(p.on)) for p in padding_of(program, applied)}
    free = [n for n in growing if n not in masks and n in leaves and not leaves[n].dtype.is_floating_point]
    tokens = argument or (free[0] if len(free) == 1 else None)
    strange = [n for n in growing if n != tokens and n not in masks]
    if tokens is None or strange:
        raise InputError(
            "it cannot be told how the arguments continue",
            expected="one argument with the tokens, and masks over them",
            found=", ".join(growing),
            remedy="name the argument of the tokens (argument=...), or use program.start and program.step",
        )
    return Slots(tokens, {n: m for n, m in masks.items() if n in growing})
