"""The depth dialect: the ops of a program, one to one, with the rules that a module must keep.

It is defined in Python on torch-mlir. The fields of an op are required. What it may have beside them stands in its
attributes and is checked by the same rules: "consts", "kv", "grad" and "layer" of a call, "precise" of a segment,
"until" of a loop, "inference" of a select, "combine" and "params" of a merge, "expr" of a parameter.

A list of values of an op made in Python must be of one type (IRDL verifies a list by one constraint). So several
values travel as one tuple of the torch dialect, one value as itself, and none as nothing. A token set is its mask.
"""

# mypy: disable-error-code="call-arg,name-defined"
# The fields are read at run time: annotations must not be postponed here.
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import ext

from depthc.ir.mlir import rules


class Depth(ext.Dialect, name="depth"):
    """The dialect."""


class ParamOp(Depth.Operation, name="param"):
    """A parameter or buffer by its name in the state dict: a type, a kind, perhaps an expression; never data."""

    sym_name: ir.StringAttr
    type: ir.TypeAttr
    kind: ir.StringAttr
    verify_invariants = rules.verified(rules.param)


class StackOp(Depth.Operation, name="stack"):
    """The depth ops of one tower."""

    label: ir.StringAttr
    out: ext.Result[Any] | None
    body: ext.Region
    verify_invariants = rules.verified(rules.stack)


class SegmentOp(Depth.Operation, name="segment"):
    """A straight-line graph: `callee` applied to values and parameters."""

    callee: ir.FlatSymbolRefAttr
    params: ir.ArrayAttr
    reads: ext.Operand[Any] | None
    out: ext.Result[Any] | None
    verify_invariants = rules.verified(rules.application)


class CallOp(Depth.Operation, name="call"):
    """One application of a block; a parameter's name may hold expressions over the indices of the loops around."""

    callee: ir.FlatSymbolRefAttr
    params: ir.ArrayAttr
    reads: ext.Operand[Any] | None
    out: ext.Result[Any] | None
    verify_invariants = rules.verified(rules.application)


class LoopOp(Depth.Operation, name="loop"):
    """Repeat the region for `index` = 0 .. count - 1, carrying as many values as it has operands.

    Further results are what the last iteration yields beside them. With "until", one more value is yielded: when all
    of it is true, the loop ends.
    """

    index: ir.StringAttr
    count: ir.StringAttr
    carried: ext.Operand[Any] | None
    out: ext.Result[Any] | None
    body: ext.Region
    verify_invariants = rules.verified(rules.loop)


class SelectOp(Depth.Operation, name="select"):
    """A token set by a rule over scores [batch, tokens, ...]."""

    rule: ir.StringAttr
    score: ext.Operand[Any] | None
    judge: ext.Operand[Any] | None
    among: ext.Operand[Any] | None
    of: ext.Operand[Any] | None
    within: ext.Operand[Any] | None
    out: ext.Result[Any]
    verify_invariants = rules.verified(rules.select)


class OnOp(Depth.Operation, name="on"):
    """Run the region on the tokens of a set; its results have one row a token of the set."""

    tokens: ext.Operand[Any]
    gathered: ir.ArrayAttr
    reads: ext.Operand[Any] | None
    out: ext.Result[Any] | None
    body: ext.Region
    verify_invariants = rules.verified(rules.on)


class MergeOp(Depth.Operation, name="merge"):
    """The stream with the rows of the set replaced, by new ones or by what "combine" makes of old and new ones."""

    stream: ext.Operand[Any]
    rows: ext.Operand[Any]
    tokens: ext.Operand[Any]
    extra: ext.Operand[Any] | None
    out: ext.Result[Any]
    verify_invariants = rules.verified(rules.merge)


class TapOp(Depth.Operation, name="tap"):
    """Expose a value under a name."""

    label: ir.StringAttr
    value: ext.Operand[Any]
    verify_invariants = rules.verified(rules.tap)


class YieldOp(Depth.Operation, name="yield", traits=[ir.IsTerminatorTrait]):
    """The end of a region, with what leaves it."""

    values: ext.Operand[Any] | None
    verify_invariants = rules.verified(rules.yields)
