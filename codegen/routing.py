"""Routing by kernels: the steps around a routed region, run by the ops of `depthc.codegen.kernels`.

Where an op does not apply (`depthc.codegen.choices` says why), the step runs as the program means it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from depthc.codegen.kernels import combine as combining
from depthc.codegen.kernels import score
from depthc.codegen.kernels import select as selecting
from depthc.codegen.kernels.combine.fused import combine_fused
from depthc.codegen.kernels.combine.match import OFF, Options, options_of
from depthc.codegen.kernels.common import FLOATS
from depthc.codegen.kernels.score import match as scoring
from depthc.codegen.sets import Ahead, Bounded, Tokens
from depthc.codegen.tables import computed_once
from depthc.ir.evaluate import Evaluator, indexed
from depthc.ir.program import Call, Loop, Merge, Program, Segment, Select
from depthc.ir.selection import all_tokens, read_rule, refuse_nan, share_of
from depthc.ir.text.functions import walk
from depthc.ir.tokens import TokenSet

KERNELS = ("score", "select", "rows", "combine", "attention")
"""What can be turned off: the logits of linear routers, the choice of the best tokens, their rows out of the stream,
their rows back into it, and attention to the keys of all tokens."""


class KernelEvaluator(Evaluator):
    """Evaluates with the kernels that are on and apply.

    Attributes:
        kernels: those that are on, of `KERNELS`.
        scores: how linear routers read their stream, by the certificate of their body.
        combines: what merges compute, as options of the op, by the certificate of their body.
        tables: the names of values that a compiler is to compute once.
        bounded: whether sets whose size the data decide are packed at the size of all tokens.
        made: what blocks and merges made, by name: memory that was not there before.
    """

    kernels: Collection[str] = ()
    bounded: bool = False
    scores: Mapping[str, scoring.Options] = {}
    combines: Mapping[str, Options] = {}
    tables: Collection[str] = ()

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.made: dict[str, Tensor] = {}
        self._given: list[Any] = []  # the arguments
        self._ahead = Ahead()

    def loop(self, op: Loop, values: dict[str, Any], indices: Mapping[str, int]) -> None:
        """Run a loop; sets that none of its layers changes are chosen in front of it."""
        if not torch.compiler.is_compiling():
            self._ahead.choose(self, op, values, indices)
        super().loop(op, values, indices)

    def select(self, op: Select, values: Mapping[str, Any], indices: Mapping[str, int]) -> TokenSet:
        """A token set; one of the best tokens by the kernel."""
        if (ahead := self._ahead.take(op, indices)) is not None:
            return ahead
        rule, judged = self.rule(op)
        name, capacity = read_rule(rule, indices, self.step)
        if name == "topk" and judged and not op.within and "select" in self.kernels:
            among: TokenSet = values[op.among] if op.among else all_tokens(values[judged])
            if not selecting.applies(values[judged], among.mask):
                return self._best(values[judged], among, values[op.of] if op.of else among, capacity)
        found = super().select(op, values, indices)
        if found.everyone or isinstance(found, Tokens):
            return found
        if self.bounded and found.count is None and found.most is None:
            return Bounded(found.mask, by_rows="rows" in self.kernels)
        return Tokens(found.mask, found.count, found.most, by_rows="rows" in self.kernels)

    def _best(self, score: Tensor, among: TokenSet, of: TokenSet, capacity: float) -> TokenSet:
        """The best candidates of every row by the kernel."""
        count, most, wanted = share_of(among, of, capacity)
        if count is not None and count == among.count:
            refuse_nan(score, among.mask)
            return among
        chosen = selecting.select_topk(score, most, None if among.everyone else among.mask, wanted)
        tokens = Tokens(chosen.mask, count, None if count is not None else most, by_rows="rows" in self.kernels)
        tokens.found.update(positions=chosen.positions, inverse=chosen.inverse)
        tokens.found["valid"] = chosen.valid if count is None else None
        return tokens

    def merge(self, op: Merge, values: dict[str, Any], indices: Mapping[str, int]) -> None:
        """Write rows back into a stream, in place where nobody else can see it and no gradient is wanted."""
        given, options = self._combined_of(op, values), self._options(op)
        if given is None or options is None:
            super().merge(op, values, indices)
        else:
            found = self._combine(op, values)(*given, **options._asdict())
            values[op.write] = found.view(values[op.read].shape)  # packed rows are one batch row
        self.made[op.write] = values[op.write]

    def _combine(self, op: Merge, values: Mapping[str, Any]) -> Callable[..., Tensor]:
        """The form of combine: one that a compiler fuses, one that writes in place, or one that makes a new stream."""
        if torch.compiler.is_compiling():
            return combine_fused
        return combining.combine_ if self._is_alone(op, values) else combining.combine

    def _combined_of(self, op: Merge, values: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """The tensors that combine takes; None where it does not apply."""
        tokens, rows, stream = values[op.tokens], values[op.value], values[op.read]
        apart = op.over is not None or stream.dim() != 3
        if "combine" not in self.kernels or not isinstance(tokens, Tokens) or apart:
            return None
        if tokens.ragged and rows.shape[0] == 1:
            stream, take = stream.flatten(0, 1)[None], tokens.pack
            positions, inverse = tokens.places[None], tokens.packed_inverse
        else:
            take, positions, inverse = tokens.take, tokens.positions, tokens.inverse
        given = stream, rows, take(values[op.extra[0]]) if op.extra else None, positions, inverse
        return None if combining.applies(*given) else given

    def _options(self, op: Merge) -> Options | None:
        return OFF if op.combine is None else self.combines.get(op.combine.certificate)

    def apply(self, op: Segment | Call, values: dict[str, Any], indices: Mapping[str, int]) -> None:
        """Run a segment or one application of a block."""
        if not (isinstance(op, Segment) and self._score(op, values, indices)):
            super().apply(op, values, indices)
        if isinstance(op, Call):
            self.made.update({name: values[name] for name in op.writes})
        elif torch.compiler.is_dynamo_compiling():  # torch.export takes what is written
            tables = [name for name in op.writes if name in self.tables and values[name].is_floating_point()]
            values.update({name: computed_once(values[name]) for name in tables})

    def _score(self, op: Segment, values: dict[str, Any], indices: Mapping[str, int]) -> bool:
        """Run a linear router by the kernel, where it applies; whether it did."""
        options = self.scores.get(op.body.certificate) if "score" in self.kernels else None
        if options is None:
            return False
        stream, weight = values[op.reads[0]], self.param(indexed(op.params[0], indices))
        weight = weight.float() if weight.dtype in FLOATS else weight  # of a module in half precision
        if score.applies(stream, weight):
            return False
        values[op.writes[0]] = score.score_rows(stream.detach() if options.apart else stream, weight)
        return True

    def run(self, body: Any, values: dict[str, Any], sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Run a program's body; see `Evaluator.run`."""
        self._given = list(values.values())
        return super().run(body, values, sizes)

    def _is_alone(self, op: Merge, values: Mapping[str, Any]) -> bool:
        """Whether a merge may write into its stream: no gradient is wanted, and nothing else is in its memory."""
        stream = values[op.read]
        if torch.is_grad_enabled() or op.read != op.write or self.made.get(op.read) is not stream:
            return False
        kept = [tensor for slot in self.slots.values() for tensor in slot.cache or ()]
        others = (*(v for name, v in values.items() if name != op.read), *self.taps.values(), *self._given, *kept)
        memory = stream.untyped_storage().data_ptr()
        return all(v.untyped_storage().data_ptr() != memory for v in others if isinstance(v, Tensor))


def combines_of(program: Program) -> dict[str, Options]:
    """What the merges of a program compute, by the certificate of their body, where the op has options for it."""
    merges = [op for op, _ in walk(program.stacks) if isinstance(op, Merge) and op.combine is not None]
    found = {op.combine.certificate: options_of(op) for op in merges if op.combine is not None}
    return {key: options for key, options in found.items() if options is not None}


def scores_of(program: Program) -> dict[str, scoring.Options]:
    """How the linear routers of a program read their stream, by the certificate of their body."""
    segments = [op for op, _ in walk(program.stacks) if isinstance(op, Segment)]
    found = {op.body.certificate: scoring.options_of(op) for op in segments}
    return {key: options for key, options in found.items() if options is not None}
