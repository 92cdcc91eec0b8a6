"""Which kernel runs each step of a routed region, and why another one does not."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from depthc.codegen.kernels.combine.match import options_of
from depthc.codegen.kernels.common import FLOATS, runs_on
from depthc.ir.axes.ops import argument
from depthc.ir.axes.ports import ports_of
from depthc.ir.masks.masks import Mask, masks_of
from depthc.ir.program import Call, Kv, Merge, On, Program, Select
from depthc.ir.selection import parse_rule
from depthc.ir.text.functions import walk
from depthc.ir.types import Type

Step = Literal["select", "rows", "attention", "combine"]


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
    wrong = {str(d).removeprefix("torch.") for d in _dtypes(program) if d not in FLOATS}
    missing = runs_on(torch.empty(1, device=device)) or (f"the model is {', '.join(sorted(wrong))}" if wrong else None)
    found: list[Choice] = []
    for choice in _all(program):
        if not choice.kernel.startswith(("torch", "scaled", "varlen")):
            if choice.step not in kernels:
                choice = Choice(choice.site, choice.step, "torch", "turned off")
            elif missing:
                choice = Choice(choice.site, choice.step, "torch", missing)
        found.append(choice)
    return Choices(found)


def _dtypes(program: Program) -> Iterator[torch.dtype]:
    """Of what blocks carry."""
    for block in program.blocks.values():
        type = block.body.inputs_of("value")[0].type
        if isinstance(type, Type):
            yield type.dtype


def _all(program: Program) -> Iterator[Choice]:
    for stack in program.stacks:
        for op, _ in walk(stack.ops):
            match op:
                case Select():
                    yield from _select(f"{stack.name}: {op.write}", op)
                case On():
                    yield Choice(
                        f"{stack.name}: {op.tokens}",
                        "rows",
                        "take_rows",
                        "rows of one number a batch row; packed ones, of any number, by torch",
                    )
                    yield from (c for inner in op.body if isinstance(inner, Call) for c in _attention(program, inner))
                case Merge():
                    yield _merge(f"{stack.name}: {op.write}", op)


def _select(site: str, op: Select) -> Iterator[Choice]:
    for rule in (op.rule, op.inference):
        name = parse_rule(rule)[0] if rule else "all"
        if name == "topk" and op.within:
            yield Choice(site, "select", "torch", f"{rule} within documents: one row chooses several times")
        elif name == "topk":
            yield Choice(site, "select", "select_topk", str(rule))
        elif name not in ("all", "stride"):
            yield Choice(site, "select", "torch", f"{rule}: only the data say how many rows there are")


def _merge(site: str, op: Merge) -> Choice:
    options = options_of(op)
    if options is None:
        return Choice(site, "combine", "torch", "the body of the merge is none of weighted, additive, delta, off")
    return Choice(site, "combine", "combine", f"{options}; packed rows by torch")


def _attention(program: Program, op: Call) -> Iterator[Choice]:
    block = program.blocks[op.block]
    plans = op.kv or (Kv(),) * len(ports_of(block))
    for port, mask, plan in zip(ports_of(block), masks_of(program)[op], plans, strict=True):
        if port.kind == "fused" and not port.cross:
            site = f"{op.layer or op.block}: {plan.mode} {plan.slot}".rstrip()
            yield Choice(site, "attention", *_kernel(port.entries[0], mask, plan))


def _kernel(node: fx.Node, mask: Mask, plan: Kv) -> tuple[str, str]:
    flag = bool(argument(node, 5, "is_causal", False))
    if plan.mode in ("read", "share", "update", "overlay"):
        if argument(node, 4, "dropout_p", 0.0) != 0.0:
            return "scaled_dot_product_attention", "it drops weights, and the kernel does not"
        if not flag:
            return "scaled_dot_product_attention", f"the mask is {mask}, and the kernel knows causality alone"
        return "shared_attention", "causal by position, keys of all tokens"
    if flag:
        return "scaled_dot_product_attention", "causal in the order of the rows; varlen_attn where they are ragged"
    return "scaled_dot_product_attention", f"the mask is {mask}"
