"""Distributed: the parts of a split program on the ranks of a process group, each with its own weights and caches.

In a step all ranks run at once. Then a rank sends what its section ends with to the ranks that read it: its row of
memory to the next one, and what is combined to the last one, which returns the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from depthc.codegen.module import DepthModule
from depthc.ir.errors import InputError
from depthc.ir.incremental import Past, advanced, continued
from depthc.ir.params import Ref
from depthc.ir.program import Call, Program
from depthc.ir.side_by_side import Alone
from depthc.ir.signature import bind
from depthc.runtime.generate import choose_token, continue_prompts, scoring, slots_of
from depthc.runtime.split import split


class Stage:
    """The part of a program that this rank runs, of as many ranks as parts.

    Every rank calls the same methods with the same arguments: the model's own, of which it makes embeddings and masks.

    Args:
        program: with the weights of this rank's part at least.
        group: the ranks; all of them by default.

    Attributes:
        part: what it runs.
        program: the structure of the whole program, with the weights of the part alone.

    Raises:
        IncrementalError: the program cannot be split; see `depthc.runtime.split.split`.
        InputError: there are not as many ranks as parts.
        StateDictError: a weight of the part is missing.

    Example:
        >>> stage = Stage(program)  # doctest: +SKIP
        >>> logits, past = stage.start(input_ids=prompt)  # doctest: +SKIP
        >>> logits, past = stage.step(past, input_ids=token)  # None but on the last rank  # doctest: +SKIP
    """

    def __init__(self, program: Program, group: distributed.ProcessGroup | None = None) -> None:
        parts, ranks = split(program).parts, distributed.get_world_size(group)
        if ranks != len(parts):
            raise InputError(
                f"{len(parts)} parts do not fit {ranks} ranks",
                expected="a rank a part",
                found=str(ranks),
                remedy=f"start {len(parts)} processes, or compile with stacks={ranks}",
            )
        self.group, self.part = group, parts[distributed.get_rank(group)]
        self.ranks = [distributed.get_global_rank(group, n) if group else n for n in range(ranks)]
        self.program = program.with_weights({n: Ref(n).evaluate(program.weights) for n in self.part.weights})

    @property
    def last(self) -> bool:
        """Whether this rank returns the outputs."""
        return self.part.number == len(self.ranks) - 1

    def start(self, *args: Any, **kwargs: Any) -> tuple[Any, Past]:
        """Evaluate a prompt, rank after rank: the outputs, None but on the last rank, and the past of this part."""
        return self._advance(Past(0, bind(self.program.signature.parameters, args, kwargs), {}, {}))

    def step(self, past: Past, *args: Any, **kwargs: Any) -> tuple[Any, Past]:
        """Evaluate further tokens, all ranks at once: the outputs, None but on the last rank, and the new past.

        Raises:
            IncrementalError: there are more new tokens than the lag; see also `Program.step`.
        """
        return self._advance(continued(self.program, past, args, kwargs))

    def _advance(self, past: Past) -> tuple[Any, Past]:
        values, after = advanced(self.program, past, self.part.body, lambda *given: _Steps(self, *given))
        return self.program.signature.unflatten(values) if self.last else None, after

    def shared(self, tensor: Tensor) -> Tensor:
        """What the last rank has, on every rank; of others the shape and dtype count."""
        distributed.broadcast(tensor, self.ranks[-1], self.group)
        return tensor


class _Steps(Alone):
    """Evaluates new tokens through one part, with messages around its layers."""

    def __init__(self, stage: Stage, *given: Any) -> None:
        super().__init__(stage.part.stack, *given)
        self.stage, self.part = stage, stage.part
        self.sending: list[tuple[Any, Tensor]] = []  # a tensor lives until it is sent

    def layers(self, calls: Mapping[str, Call], indices: Mapping[str, int]) -> None:
        """The layers of the part, between its messages."""
        (self._step if self.past.length else self._prompt)(calls, indices)
        for work, _ in self.sending:
            work.wait()

    def _prompt(self, layers: Mapping[str, Call], indices: Mapping[str, int]) -> None:
        """Tokens of a prompt see memory of others of them: rank after rank."""
        self._receive()
        for site, call in layers.items():
            self.op(call, site, indices)
        self._send()

    def _step(self, layers: Mapping[str, Call], indices: Mapping[str, int]) -> None:
        """All ranks at once: of what comes in, layers see nothing before the next step."""
        for site, call in layers.items():
            self.run_alone(call, site, indices)
        self._send()
        self._receive()
        for site, call in layers.items():
            self.show(call, site, indices)

    def _send(self) -> None:
        """Without waiting for who reads it: in a step that rank may still run its own layers."""
        for message in self.part.sends:
            rows = self.values[message.name].contiguous()
            work = distributed.isend(rows, self.stage.ranks[message.target], self.stage.group)
            self.sending.append((work, rows))

    def _receive(self) -> None:
        sizes = self.program.signature.size_values(self.values)
        for message in self.part.receives:
            type = message.rows(self.fresh)
            rows = torch.empty(type.sizes(sizes), dtype=type.dtype, device=self.device)
            distributed.recv(rows, self.stage.ranks[message.source], self.stage.group)
            self.values[message.name], self.kinds[message.name] = rows, "rows"


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
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """Continue prompts as `depthc.generate` does, with a part of the program on every rank.

    The last rank chooses the tokens, and all ranks learn of them.

    Args:
        group: the ranks; all of them by default. For the other arguments see `depthc.runtime.generate.generate`.

    Returns:
        int[batch, tokens + new_tokens]: the prompts and what follows, on every rank.

    Raises:
        IncrementalError, InputError, StateDictError: as `Stage` and `depthc.generate`.

    Example:
        >>> generate(program, ids, 20)  # on every rank  # doctest: +SKIP
    """
    program, others = scoring(model.program if isinstance(model, DepthModule) else model), dict(arguments or {})
    stage, slots = Stage(program, group), slots_of(program, argument, others)
    draws = torch.Generator(prompt.device).manual_seed(seed)

    def choose(logits: Tensor | None) -> Tensor:
        own = prompt[:, -1:].clone() if logits is None else choose_token(logits[:, -1], temperature, top_k, draws)
        return stage.shared(own.to(prompt.dtype).contiguous())

    return continue_prompts(stage, slots, prompt, new_tokens, others, choose, stop)
