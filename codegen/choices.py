"""Which kernel runs each step of a routed region, and why another one does not."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from depthc.codegen.kernels.combine.match import options_of
from depthc.codegen.kernels.common import FLOATS, runs_on
from depthc.codegen.kernels.score.match import options_of as router_of
from depthc.ir.axes.ops import argument
from depthc.ir.axes.ports import ports_of
from depthc.ir.masks.masks import Mask, masks_of
from depthc.ir.program import Call, Kv, Merge, On, Program, Segment, Select
from depthc.ir.rows.fitting import is_causal_alone
from depthc.ir.selection import parse_rule
from depthc.ir.text.functions import walk
from depthc.ir.types import Type

Step = Literal["score", "select", "rows", "attention", "combine"]


@dataclass(frozen=True)
class Choice:
    """What runs one step.

    Attributes:
        site: the stack, and the token set or the layer.
        step: which step it is.
        kernel: the op of `depthc.codegen.kernels`, or of torch, that runs it.
        why: what in the program decided so.
    """

    site: str
    step: Step
    kernel: str
    why: str


class Choices(tuple[Choice, ...]):
    """The choices of a program in its order; printed as a table.

    Example:
        >>> print(Choices([Choice("layers: chosen", "select", "select_topk", "topk(0.5)")]))
        step    site            kernel       because
        select  layers: chosen  select_topk  topk(0.5)
    """

    def __str__(self) -> str:
        lines = [("step", "site", "kernel", "because"), *((c.step, c.site, c.kernel, c.why) for c in self)]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]]) for line in lines
        )


def choices_of(program: Program, kernels: Collection[str], device: torch.device) -> Choices:
    """What runs the steps of every routed region of a program.

    Args:
        kernels: those that are on.
        device: where the program runs.
    """
    return Choices(_Chooser(program, kernels, device).all())


class _Chooser:
    def __init__(self, program: Program, kernels: Collection[str], device: torch.device) -> None:
        self.program, self.kernels = program, kernels
        wrong = sorted({str(d).removeprefix("torch.") for d in _dtypes(program) if d not in FLOATS})
        self.missing = runs_on(torch.empty(1, device=device)) or (wrong and f"the model is {', '.join(wrong)}")

    def all(self) -> Iterator[Choice]:
        """The choices of every region in order."""
        for stack in self.program.stacks:
            for op, _ in walk(stack.ops):
                match op:
                    case Segment() if router_of(op) is not None:
                        yield self._own(f"{stack.name}: {op.writes[0]}", "score", "score_rows", "a linear router")
                    case Select():
                        yield from self._select(f"{stack.name}: {op.write}", op)
                    case On():
                        why = "by positions, and back by their inverse"
                        yield self._own(f"{stack.name}: {op.tokens}", "rows", "take_rows", why)
                        for call in op.body:
                            if isinstance(call, Call):
                                yield from self._attention(call)
                    case Merge():
                        yield self._merge(f"{stack.name}: {op.write}", op)

    def _own(self, site: str, step: Step, kernel: str, why: str) -> Choice:
        """A kernel of this package, where it is on and runs."""
        if step not in self.kernels:
            return Choice(site, step, "torch", "turned off")
        return Choice(site, step, "torch", self.missing) if self.missing else Choice(site, step, kernel, why)

    def _select(self, site: str, op: Select) -> Iterator[Choice]:
        for rule in (op.rule, op.inference):
            name = parse_rule(rule)[0] if rule else "all"
            if name == "topk" and op.within:
                yield Choice(site, "select", "torch", f"{rule} within documents: one row chooses several times")
            elif name == "topk":
                yield self._own(site, "select", "select_topk", str(rule))
            elif name not in ("all", "stride"):
                yield Choice(site, "select", "torch", f"{rule}: only the data say how many rows there are")

    def _merge(self, site: str, op: Merge) -> Choice:
        options = options_of(op)
        if op.over is not None:
            return Choice(site, "combine", "torch", f"rows go to other tokens, those of {op.over}")
        if options is None:
            return Choice(site, "combine", "torch", "the body of the merge is none of weighted, additive, delta, off")
        return self._own(site, "combine", "combine", str(options))

    def _attention(self, op: Call) -> Iterator[Choice]:
        block = self.program.blocks[op.block]
        plans = op.kv or (Kv(),) * len(ports_of(block))
        for port, mask, plan in zip(ports_of(block), masks_of(self.program)[op], plans, strict=True):
            if port.kind == "fused" and not port.cross:
                site = f"{op.layer or op.block}: {plan.mode} {plan.slot}".rstrip()
                yield self._port(site, port.entries[0], mask, plan)

    def _port(self, site: str, node: fx.Node, mask: Mask, plan: Kv) -> Choice:
        shared = plan.mode in ("read", "share", "update", "overlay")
        if shared and is_causal_alone(node):
            return self._own(site, "attention", "shared_attention", "causal by position, keys of all tokens")
        if argument(node, 3, "attn_mask") is not None:
            why = f"the mask is {mask}" + ", and only causality is passed on to kernels" * shared
        elif shared:
            why = "it drops weights, or is not causal, and the kernel is neither"
        else:
            why = "in the order of the rows; varlen_attn where they are ragged"
        return Choice(site, "attention", "scaled_dot_product_attention", why)


def _dtypes(program: Program) -> Iterator[torch.dtype]:
    """Of what blocks carry."""
    for block in program.blocks.values():
        type = block.body.inputs_of("value")[0].type
        if isinstance(type, Type):
            yield type.dtype
