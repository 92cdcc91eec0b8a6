"""Routing by kernels: the steps around a routed region, run by the ops of `depthc.codegen.kernels`.

Where an op does not apply (`depthc.codegen.choices` says why), the step runs as the program means it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from depthc.codegen.kernels import combine as combining
from depthc.codegen.kernels import select as selecting
from depthc.codegen.kernels.combine.fused import combine_fused
from depthc.codegen.kernels.combine.match import OFF, Options, options_of
from depthc.codegen.kernels.combine.reference import inverse_of
from depthc.codegen.kernels.common import runs_on
from depthc.codegen.kernels.rows import take_rows
from depthc.ir.evaluate import Evaluator
from depthc.ir.program import Call, Merge, Program, Segment, Select
from depthc.ir.selection import all_tokens, read_rule, share_of
from depthc.ir.text.functions import walk
from depthc.ir.tokens import TokenSet

KERNELS = ("select", "rows", "combine", "attention")
"""What can be turned off: the choice of the best tokens, their rows out of the stream, their rows back into it, and
attention to the keys of all tokens."""


class Tokens(TokenSet):
    """A token set whose rows move by positions and their inverse."""

    @property
    def inverse(self) -> Tensor:
        """int32 [batch, tokens]: where each token stands among the rows, -1 if it does not."""
        if "inverse" not in self.found:
            self.found["inverse"] = inverse_of(self.positions, self.mask.shape[1], self.valid)
        return self.found["inverse"]  # type: ignore[no-any-return]

    def take(self, stream: Tensor, batch: int = 0, token: int = 1) -> Tensor:
        """See `TokenSet.take`; the gradient is no sum."""
        fits = (batch, token) == (0, 1) and stream.shape[:2] == self.mask.shape
        if self.everyone or not fits or runs_on(stream):
            return super().take(stream, batch, token)
        return take_rows(stream, self.positions, self.inverse)


class KernelEvaluator(Evaluator):
    """Evaluates with the kernels that are on and apply.

    Attributes:
        kernels: those that are on, of `KERNELS`.
        combines: what merges compute, as options of the op, by the certificate of their body.
    """

    kernels: Collection[str] = KERNELS
    combines: Mapping[str, Options] = {}

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._own: dict[str, Tensor] = {}  # streams in memory of their own: results of blocks and merges

    def select(self, op: Select, values: Mapping[str, Any], indices: Mapping[str, int]) -> TokenSet:
        """A token set; one of the best tokens by the kernel."""
        rule, judged = self.rule(op)
        name, capacity = read_rule(rule, indices, self.step)
        if name == "topk" and judged and not op.within and "select" in self.kernels:
            among: TokenSet = values[op.among] if op.among else all_tokens(values[judged])
            if not selecting.applies(values[judged], among.mask):
                return _best(values[judged], among, values[op.of] if op.of else among, capacity)
        found = super().select(op, values, indices)
        if "rows" not in self.kernels or isinstance(found, Tokens) or found.everyone:
            return found
        return Tokens(found.mask, found.count, found.most)

    def merge(self, op: Merge, values: dict[str, Any], indices: Mapping[str, int]) -> None:
        """Write rows back into a stream, in place where nobody else can see it and no gradient is wanted."""
        tokens, rows, options = values[op.tokens], values[op.value], self._options(op)
        packed = tokens.ragged and rows.shape[0] == 1
        if options is None or "combine" not in self.kernels or not isinstance(tokens, Tokens) or packed:
            read = values[op.read], rows
            super().merge(op, values, indices)
            self._keep(op.write, values[op.write], read)
            return
        stream = values[op.read]
        logits = tokens.take(values[op.extra[0]]) if op.extra else None
        given = stream, rows.to(stream.dtype), logits, tokens.positions, tokens.inverse
        if stream.dim() != 3 or combining.applies(*given):
            super().merge(op, values, indices)
            return
        if torch.compiler.is_compiling():
            made = combine_fused(*given, *options)
        else:
            alone = op.read == op.write and self._own.get(op.read) is stream and not torch.is_grad_enabled()
            alone = alone and sum(value is stream for value in values.values()) == 1
            made = (combining.combine_ if alone else combining.combine)(*given, **options._asdict())
        values[op.write] = made
        self._keep(op.write, made, ())

    def _options(self, op: Merge) -> Options | None:
        return OFF if op.combine is None else self.combines.get(op.combine.certificate)

    def apply(self, op: Segment | Call, values: dict[str, Any], indices: Mapping[str, int]) -> None:
        """Run a segment or one application of a block."""
        before = [values[name] for name in op.reads if isinstance(values[name], Tensor)]
        super().apply(op, values, indices)
        for name in op.writes if isinstance(op, Call) else ():
            self._keep(name, values[name], before)

    def _keep(self, name: str, made: Tensor, read: Sequence[Tensor]) -> None:
        """Note that a value lies in memory of its own, if it does: nobody holds what it was made of."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        memory = {t.untyped_storage().data_ptr() for t in read}
        if made.untyped_storage().data_ptr() not in memory:
            self._own[name] = made


def combines_of(program: Program) -> dict[str, Options]:
    """What the merges of a program compute, by the certificate of their body, where the op has options for it."""
    merges = [op for op, _ in walk(program.stacks) if isinstance(op, Merge) and op.combine is not None]
    found = {op.combine.certificate: options_of(op) for op in merges if op.combine is not None}
    return {key: options for key, options in found.items() if options is not None}


def _best(score: Tensor, among: TokenSet, of: TokenSet, capacity: float) -> TokenSet:
    """The best candidates of every row by the kernel."""
    count, most, wanted = share_of(among, of, capacity)
    if count is not None and count == among.count:
        return among
    chosen = selecting.select_topk(score, most, None if among.everyone else among.mask, wanted)
    tokens = Tokens(chosen.mask, count, None if count is not None else most)
    tokens.found.update(positions=chosen.positions, inverse=chosen.inverse)
    tokens.found["valid"] = chosen.valid if count is None else None
    return tokens
