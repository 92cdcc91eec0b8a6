"""The checks of a zoo row that look inside a program: one layer at a time.

Each takes the captured program, the model, and the example inputs, and returns a number (a largest error) or a text
(what was found). A typed refusal may be raised: the row records it with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compare import without_cache
from precision import widen_inputs, widen_program
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.cuts import LegalSpan, legal_spans
from depthc.ir.axes.ports import ports_of
from depthc.ir.body import Body
from depthc.ir.errors import SubsetError
from depthc.ir.evaluate import Evaluator, WeightParams
from depthc.ir.masks.masks import masks_of
from depthc.ir.program import Block, Call, Program
from depthc.ir.rows.packing import packable
from depthc.ir.rows.run import run_rows
from depthc.ir.tokens import TokenSet

aten = torch.ops.aten
SELECTED = 7
SUBSET = 1e-10  # of the largest difference, in fp64


class Unmet(Exception):
    """A check ran and its result is not what it must be."""


@dataclass
class Application:
    """One call of a block, with what it read and wrote."""

    call: Call
    block: Block
    reads: list[Any]
    params: list[Tensor]
    writes: tuple[Any, ...]


class Recorder(Evaluator):
    """An evaluator that keeps every application of a block."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, WeightParams(program), torch.device("cpu"))
        self.applications: list[Application] = []

    def apply(self, op: Any, values: dict[str, Any], indices: Any) -> None:
        reads = [values[name] for name in op.reads]
        super().apply(op, values, indices)
        if isinstance(op, Call):
            writes = tuple(values[name] for name in op.writes)
            params = [self.param(name) for name in op.params]
            self.applications.append(Application(op, self.program.blocks[op.block], reads, params, writes))


@torch.no_grad()
def applications(program: Program, args: tuple, kwargs: dict) -> list[Application]:
    recorder = Recorder(program)
    recorder.run(program.body, dict(program.signature.flatten(args, kwargs)))
    return recorder.applications


@torch.no_grad()
def replay(program: Program, model: nn.Module, args: tuple, kwargs: dict) -> str | float:
    """Every layer's new carry must be, bit for bit, what some module of the model returned.

    The shared block, run with a layer's own binding, is compared with the model's own layers without saying which
    module a layer is.
    """
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(
            lambda _m, _a, out: seen.extend(t for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
        )
        for module in model.modules()
    ]
    try:
        model(*args, **without_cache(model, kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    layers = applications(program, args, kwargs)
    missing = [i for i, layer in enumerate(layers) if not any(_equal(layer.writes[0], t) for t in seen)]
    if missing:
        return f"{len(layers) - len(missing)} of {len(layers)} are a module's output"
    return 0.0


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def ports(program: Program, model: nn.Module, args: tuple, kwargs: dict) -> str | float:
    """The attention ports and mask factors of each block, such as `fused causal & window(8)`."""
    found: dict[str, None] = {}
    for call, masks in masks_of(program).items():
        for port, mask in zip(ports_of(program.blocks[call.block]), masks, strict=True):
            found[f"{port.kind}{' cross' if port.cross else ''} {mask}"] = None
    return "; ".join(found) or "none"


@torch.no_grad()
def subset(program: Program, model: nn.Module, args: tuple, kwargs: dict) -> str | float:
    """Run each layer on a random subset of tokens, another one in each batch row, in fp64.

    Return the largest difference to the full layer with the unselected keys masked, and of packed rows to padded ones,
    over all layers. Where a layer cannot run on a subset, say which of its spans can, or raise its reason.
    """
    worst, whole, refusal = 0.0, True, None
    for layer in applications(widen_program(program), *widen_inputs(args, kwargs)):
        spans = legal_spans(layer.block)
        try:
            analyse(layer.block).require_legal()
        except SubsetError as error:
            refusal, whole = error, False
        worst = max([worst, *(_span_error(layer, span) for span in spans)])
        if not whole and not spans and refusal:
            raise refusal
    return worst if whole or worst > SUBSET else f"spans, {worst:.0e}"


def _span_error(layer: Application, span: LegalSpan) -> float:
    """A span on a subset of tokens against the whole layer, run at full length with the other tokens masked."""
    axes = analyse(span.block)
    label = axes.labels[span.block.body.placeholders_of("value")[0]]
    batch, token = (next(d for d, dim in enumerate(label) if dim == (atom,)) for atom in (axes.batch, axes.token))
    body = layer.block.body
    values = _interpret(body, body.arrange(layer.reads, layer.params, layer.call.consts))
    carry = values[span.start]
    positions, selected = _random_tokens(carry.shape[batch], carry.shape[token])
    sides = [layer.reads[i] for i in span.values]
    params = [layer.params[i] for i in span.params]
    consts = [layer.call.consts[i] for i in span.consts]
    inputs = span.block.body.arrange([carry, *sides], params, consts)
    masked = _interpret(span.block.body, inputs, selected)[span.block.body.results[0]]
    rows = _take(carry, batch, token, positions)
    found, _ = run_rows(span.block, [rows], sides, params, consts, positions=positions)
    gap = float((found[0] - _take(masked, batch, token, positions)).abs().max())
    if not packable(span.block) or (batch, token) != (0, 1):
        return gap
    return max(gap, _packed_error(span.block, carry, sides, params, consts, TokenSet(selected)))


def _packed_error(
    block: Block, carry: Tensor, sides: list[Any], params: list[Tensor], consts: list[float], tokens: TokenSet
) -> float:
    """A set of which one batch row has lost its last token: on packed rows against padded ones."""
    tokens.mask[0, tokens.positions[0, -1]] = False
    tokens = TokenSet(tokens.mask)
    at = {"positions": tokens.positions, "valid": tokens.valid}
    padded, _ = run_rows(block, [tokens.take(carry)], sides, params, consts, **at)
    packed, _ = run_rows(block, [tokens.pack(carry)], sides, params, consts, slots=tokens.slots, **at)
    return float((packed[0][0] - padded[0][tokens.valid]).abs().max())


def _random_tokens(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Positions [batch, rows] and the mask [batch, tokens] of them; another set in each batch row."""
    generator = torch.Generator().manual_seed(3)
    picks = [torch.randperm(length, generator=generator)[: min(SELECTED, length)] for _ in range(batch)]
    positions = torch.stack([p.sort().values for p in picks])
    return positions, torch.zeros(batch, length, dtype=torch.bool).scatter(1, positions, True)


def _take(x: Tensor, batch: int, token: int, positions: Tensor) -> Tensor:
    moved = x.movedim((batch, token), (0, 1))
    return moved[torch.arange(len(moved))[:, None], positions].movedim((0, 1), (batch, token))


def _interpret(body: Body, inputs: Sequence[Any], selected: Tensor | None = None) -> dict[fx.Node, Any]:
    """All values of a body at full length.

    With `selected`, other tokens are masked as keys (a token always sees itself); attention is recognised by its size
    alone, independently of the compiler's own analysis.
    """
    env: dict[fx.Node, Any] = dict(zip(body.placeholders, inputs, strict=True))
    length = 0 if selected is None else selected.shape[1]
    keep = None if selected is None else selected[:, None, None, :] | torch.eye(length, dtype=torch.bool)
    for node in body.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        if keep is not None and node.target is aten.scaled_dot_product_attention.default:
            if args[0].shape[-2] == args[1].shape[-2] == length:
                args, kwargs = _masked_attention(args, dict(kwargs), keep)
        elif keep is not None and node.target is aten.softmax.int and _is_scores(args[0], length):
            args = (_masked_scores(args[0], keep), *args[1:])
        env[node] = node.target(*args, **kwargs)
    return env


def _masked_attention(args: tuple, kwargs: dict, keep: Tensor) -> tuple[tuple, dict]:
    query, key, value, mask, dropout, causal = (*args, *(None, 0.0, False)[len(args) - 3 :])
    mask = kwargs.pop("attn_mask", mask)
    keep = keep if query.dim() == 4 else keep[:, 0]
    if causal:
        keep = keep & torch.ones(keep.shape[-2:], dtype=torch.bool).tril()
    if mask is None:
        mask = keep
    elif mask.dtype == torch.bool:
        mask = mask & keep
    else:
        mask = mask + torch.zeros_like(keep, dtype=mask.dtype).masked_fill(~keep, float("-inf"))
    return (query, key, value, mask, dropout, False), kwargs


def _is_scores(x: Tensor, length: int) -> bool:
    """Queries by keys; learned sinks or memories may stand behind the keys."""
    return x.dim() >= 3 and x.shape[-2] == length and length <= x.shape[-1] <= length + 2


def _masked_scores(x: Tensor, keep: Tensor) -> Tensor:
    extra = x.shape[-1] - keep.shape[-1]
    if extra:
        keep = torch.cat([keep, torch.ones(*keep.shape[:-1], extra, dtype=torch.bool)], -1)
    if x.dim() == 3:
        keep = keep.expand(-1, x.shape[0] // keep.shape[0], -1, -1).reshape(x.shape)
    return x.masked_fill(~keep, torch.finfo(x.dtype).min)
