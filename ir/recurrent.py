"""Recurrent decoding: of stacks that share their layers, the last one alone runs behind the prompt.

Its memory of the prompt is what the stack before made; of later tokens it is what the last stack makes itself
(StagFormer, arXiv 2501.15665). So a step costs one stack. It is an approximation of `depthc.ir.side_by_side.step`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from depthc.ir.errors import IncrementalError
from depthc.ir.incremental import Past, advance, continued, start
from depthc.ir.program import Call, Program, Stack
from depthc.ir.sections import Section
from depthc.ir.side_by_side import Alone, independent, made_by


@dataclass(frozen=True)
class Recurrent:
    """A program that is decoded by its last stack; `start` and `step` are as those of the program.

    Raises:
        IncrementalError: the layers are no stacks that run side by side, or have weights of their own.

    Example:
        >>> decoding = Recurrent(program)  # doctest: +SKIP
        >>> out, past = decoding.start(input_ids=prompt)  # doctest: +SKIP
        >>> out, past = decoding.step(past, input_ids=token)  # doctest: +SKIP
    """

    program: Program

    def __post_init__(self) -> None:
        last_stack(self.program)

    def start(self, *args: Any, **kwargs: Any) -> tuple[Any, Past]:
        """Evaluate a prompt with all stacks: see `Program.start`."""
        return start(self.program, args, kwargs)

    def step(self, past: Past, *args: Any, **kwargs: Any) -> tuple[Any, Past]:
        """Evaluate further tokens with the last stack alone, no more of them than the lag: see `Program.step`.

        The past that is returned lacks what other stacks made: further steps are recurrent ones too.
        """
        stack, section = last_stack(self.program)
        out, after = advance(
            self.program,
            continued(self.program, past, args, kwargs, recurrent=True),
            lambda *given: LastStack(stack, section, *given),
        )
        return out, replace(after, recurrent=True)


def last_stack(program: Program) -> tuple[Stack, Section]:
    """The stack of layers, and the section of it that decodes recurrently.

    Raises:
        IncrementalError: see `Recurrent`.
    """
    stack, sections = independent(program)
    first, last = sections[0], sections[-1]
    own = [
        call for other, call in zip(first.calls, last.calls, strict=False) if not set(other.params) <= set(call.params)
    ]
    if first.depth != last.depth or own or len(made_by(program, last.calls[-1])) != 1:
        raise IncrementalError(
            f"the stacks of {stack.name!r} do not share their layers",
            where=own[0].layer if own else "",
            expected="a last stack with the weights of the first one",
            found="weights of its own" if own else f"{first.depth} and {last.depth} layers",
            remedy="decode with all stacks, or stagger with shared=True",
        )
    return stack, last


class LastStack(Alone):
    """Evaluates new tokens by one section; it takes the place of what others would show to it."""

    def __init__(self, stack: Stack, section: Section, *given: Any) -> None:
        super().__init__(stack, *given)
        self.section = section

    def layers(self, calls: Mapping[str, Call], indices: Mapping[str, int]) -> None:
        """Run the layers of the section, then add what it made to its own memory; other stacks add nothing."""
        sites = list(calls)
        running = {sites[at]: calls[sites[at]] for at in self.section.numbers}
        for site, call in running.items():
            self.run_alone(call, site, indices)
        end = self.values[self._end(list(running.values()))]
        idle = {name for site, call in calls.items() if site not in running for name in made_by(self.program, call)}
        self._put_rows(idle, end)
        for site, call in running.items():
            self.show(call, site, indices)
        self._put_rows(idle, torch.zeros_like(end))

    def _put_rows(self, names: Collection[str], rows: Tensor) -> None:
        self.values.update(dict.fromkeys(names, rows))
        self.kinds.update(dict.fromkeys(names, "rows"))

    def _end(self, calls: Sequence[Call]) -> str:
        """The name of what the section ends with."""
        (name,) = made_by(self.program, calls[-1])
        return name
