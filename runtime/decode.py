"""Decoding with memory of a fixed size: every step runs the same ops on the same tensors, so a CUDA graph can hold it.

`generate` and `program.step` grow their caches, and their shapes with them. Here caches, masks and rotary tables have
the length of the whole sequence from the beginning, the place of the token at hand is a tensor, and keys behind it do
not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from depthc.codegen import few_rows
from depthc.codegen.causal import flagged
from depthc.codegen.grouped import grouped
from depthc.codegen.kernels.decode_attention import attend
from depthc.codegen.kernels.few_rows import FEW
from depthc.codegen.module import DepthModule
from depthc.codegen.rows import RowsLowering
from depthc.ir.errors import IncrementalError, InputError
from depthc.ir.evaluate import WeightParams
from depthc.ir.incremental import Past
from depthc.ir.plans import plan_of
from depthc.ir.program import Call, Merge, On, Program, Select, Stack
from depthc.ir.recurrent import last_stack
from depthc.ir.rows.rings import Rings, write_rows
from depthc.ir.sections import Section
from depthc.ir.side_by_side import independent
from depthc.ir.signature import bind, unbind
from depthc.ir.text.functions import walk
from depthc.runtime.fixed import Fixed, FixedLastStack, FixedSections, Memory
from depthc.runtime.generate import Slots, scoring, slots_of
from depthc.runtime.hoist import Hoisted
from depthc.runtime.together import FixedTogether, crossings_at_once, runs_together

_FAR = 0.05  # relative errors of bf16 are far below


class Decoder:
    """Continues sequences, a token a step.

    Args:
        model: a compiled module or a program, without routing: how many tokens come to a layer is in the shapes.
        prompt: int[batch, tokens]; shorter ones padded on the left, with a mask among `arguments`.
        length: of the whole, the prompt included; no step goes beyond it.
        argument, arguments: see `generate`.
        compile: compile the blocks with torch.compile, each once.
        graph: hold a step in a CUDA graph; on CUDA by default.
        together: run stacks as one batch where that is possible, or as branches of the graph. By default one batch if
            they share their layers, and on a GPU if linear maps run by the kernel for a few rows: of up to four
            sequences, without autocast, with `kernels` (docs/stagger.md). Of layers that are only alike, one batch is
            possible with that kernel alone.
        recurrent: see `generate`.
        kernels: attention to caches, and linear maps of few rows in what is compiled, by kernels of this package where
            they apply.

    Attributes:
        logits: [batch, vocabulary], those behind the last token so far. A step writes over them where a graph is held.
        place: how many tokens there are so far.
        sections: how many layers each part of a step has that runs beside others (`depthc.ir.sections`); none, where
            layers run one after another.
        together: whether these parts are one batch.

    Raises:
        IncrementalError: the program has no incremental form, or none of fixed shapes; says why.
        InputError: the prompt is longer than `length`, or it cannot be told which argument takes the tokens.

    Example:
        >>> decoder = Decoder(compiled, prompt, 128)  # doctest: +SKIP
        >>> decoder.step(decoder.logits.argmax(-1, keepdim=True))  # doctest: +SKIP
    """

    @torch.no_grad()
    def __init__(
        self,
        model: DepthModule | Program,
        prompt: Tensor,
        length: int,
        *,
        argument: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        compile: bool = False,
        graph: bool | None = None,
        together: bool | None = None,
        recurrent: bool = False,
        kernels: bool = True,
    ) -> None:
        self.program = grouped(flagged(scoring(model.program if isinstance(model, DepthModule) else model)))
        self.plan, self.length, self.place = plan_of(self.program), length, prompt.shape[1]
        _require_fixed_shapes(self.program)
        if not 0 < self.place <= length:
            raise InputError(
                f"a prompt of {self.place} tokens does not fit into {length}",
                expected=f"1 to {length} tokens",
                found=str(self.place),
                remedy="give a greater length",
            )
        others = dict(arguments or {})
        slots, graph = slots_of(self.program, argument, others), prompt.is_cuda if graph is None else graph
        if graph and not prompt.is_cuda:
            raise InputError(
                "a CUDA graph needs CUDA",
                expected="a prompt on a GPU",
                found=f"one on {prompt.device.type}",
                remedy="move model and prompt, or leave graph out",
            )
        self.logits, self._past = self._read(prompt, slots, others)
        masks = {name: _lengthened(others[name], length, on) for name, (_, on) in slots.masks.items() if name in others}
        self._tokens = _lengthened(prompt, length, 0)
        arguments = bind(self.program.signature.parameters, (), {**others, **masks, slots.tokens: self._tokens})
        self._tensors = self.program.signature.flatten(*unbind(self.program.signature.parameters, arguments))
        last = last_stack(self.program) if recurrent else None
        few = kernels and len(prompt) <= FEW and not torch.is_autocast_enabled(prompt.device.type)
        self._new_steps = self._steps_of_sections(False if recurrent else together, few)
        compiler = (few_rows.compiled if few else torch.compile) if compile else lambda function: function
        self._memory = Memory(
            torch.full((1, 1), self.place - 1, device=prompt.device),
            RowsLowering(compiler),
            WeightParams(self.program),
            compiler(write_rows),
            Rings(attend if kernels else None),
            Hoisted(slots.tokens),
            [torch.cuda.Stream() for _ in self.sections] if prompt.is_cuda else (),
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        if self._past.length < self.place:
            self._require_agreement()
        if last is not None:
            self._leave_out(*last)
        if graph and self.place < length:
            self._hold()

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """The logits [batch, vocabulary] behind one more token [batch, 1].

        Raises:
            InputError: the sequence is full, or there is not one token a row.
        """
        if token.shape != (len(self._tokens), 1):
            raise InputError(
                "a step takes one token a row",
                expected=f"[{len(self._tokens)}, 1]",
                found=str(list(token.shape)),
                remedy="give the tokens one by one",
            )
        if self.place == self.length:
            raise InputError(
                f"the sequence has {self.length} tokens already",
                expected=f"at most {self.length}",
                found=str(self.length + 1),
                remedy="make a decoder of a greater length",
            )
        self._memory.place.fill_(self.place)
        self._tokens[:, self.place : self.place + 1] = token
        if self._graph is None:
            self.logits = self._advance()
        else:
            self._graph.replay()
        self.place += 1
        return self.logits

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches."""
        held = [t for caches in self._memory.static.values() for cache in caches for t in cache or ()]
        return sum(t.numel() * t.element_size() for t in held)

    def _steps_of_sections(self, together: bool | None, few: bool) -> Callable[..., Fixed]:
        """What evaluates a step: section by section, where there are some."""
        found = _side_by_side(self.program)
        if found is None:
            self.sections, self.together = tuple[int, ...](), False
            return Fixed
        self.sections = tuple(section.depth for section in found[1])
        wanted = together if together is not None else few or not self._tokens.is_cuda
        self.together = wanted and runs_together(self.program, found[1], apart=few and together is True)
        if not self.together:
            return partial(FixedSections, *found)
        return partial(FixedTogether, crossings_at_once(self.program, found[1]) if few else 1, *found)

    def _read(self, prompt: Tensor, slots: Slots, others: Mapping[str, Any]) -> tuple[Tensor, Past]:
        """The logits behind a prompt, and the past of all its tokens but the last, which a step is tried with.

        A prompt of two tokens is taken whole.
        """
        first = self.place - 1 if self.place > 2 else self.place  # one token alone may not be what was captured
        masks = {name: others[name] for name in slots.masks if name in others}

        def part(start: int, end: int) -> dict[str, Any]:
            return {name: x[:, start:end] for name, x in {**masks, slots.tokens: prompt}.items()}

        logits, past = self.program.start(**{**others, **part(0, first)})
        if self.place > first:
            logits, _ = self.program.step(past, **part(first, self.place))
        return logits[:, -1], past

    def _advance(self) -> Tensor:
        """The step at the memory's place; caches are written over."""
        steps = self._new_steps(self._memory, self.program, self.plan, self._past, self._tensors, self.length)
        for item in self.plan.body:
            steps.ops(item.ops if isinstance(item, Stack) else (item,), item.name, {})
        self._past = replace(self._past, caches={}, stream=None)  # they have been taken over
        return self.program.signature.unflatten(steps.values)[:, -1]  # type: ignore[no-any-return]

    def _require_agreement(self) -> None:
        """What a step makes of the prompt's last token is what the prompt did.

        Tables of the whole length may not be those of the prompt's, where a model makes them of the length.
        """
        found = self._advance()
        apart = (found - self.logits).norm() / self.logits.norm()
        if not apart <= _FAR:
            raise IncrementalError(
                "values before the layers depend on the length of the sequence",
                expected="the logits of the prompt",
                found=f"others, {apart:.2g} off, at a length of {self.length}",
                remedy="use generate, or program.step",
            )

    def _leave_out(self, stack: Stack, section: Section) -> None:
        """From now on, run one section alone; what others keep is not needed."""
        self._new_steps, self.sections = partial(FixedLastStack, stack, section), (section.depth,)
        places = [n for n, op in enumerate(stack.ops) if isinstance(op, Call)]
        for number, at in enumerate(places):
            if number not in section.numbers:
                self._memory.static.pop(f"{stack.name}.{at}", None)

    def _hold(self) -> None:
        """Capture a step; those that warm up write a row that the first step writes again."""
        self._memory.place.fill_(self.place)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._advance()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=side):
            found = self._advance()
        found.copy_(self.logits)
        self.logits = found


def _side_by_side(program: Program) -> tuple[Stack, tuple[Section, ...], range] | None:
    """The last stack, its sections and their order; None where its layers need each other in a step."""
    try:
        stack, sections = independent(program)
    except IncrementalError:
        return None
    return stack, sections, range(len(sections))


def _lengthened(x: Tensor, length: int, value: int, dim: int = 1) -> Tensor:
    """A tensor with `value` behind its end, up to a length."""
    shape = [*x.shape[:dim], length - x.shape[dim], *x.shape[dim + 1 :]]
    return torch.cat([x, x.new_full(shape, value)], dim)


def _require_fixed_shapes(program: Program) -> None:
    """Refuse layers that some tokens pass by, and layers that share keys.

    Raises:
        IncrementalError: says which.
    """
    for op, _ in walk(program.stacks):
        if isinstance(op, Select | On | Merge):
            raise IncrementalError(
                "the data decide how many tokens come to a layer",
                where=op.tokens if isinstance(op, On) else op.write,
                expected="layers on all tokens",
                found=f"a {type(op).__name__.lower()}",
                remedy="use generate, or program.step",
            )
        shared = [plan for plan in op.kv if plan.mode != "fresh"] if isinstance(op, Call) else []
        if isinstance(op, Call) and shared:
            raise IncrementalError(
                "layers share their keys",
                where=op.layer or op.block,
                expected="keys of every layer's own",
                found=f"{shared[0].mode} {shared[0].slot}",
                remedy="use generate, or program.step",
            )
