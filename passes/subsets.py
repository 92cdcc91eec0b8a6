"""Single layers on some of their tokens: what the passes share that choose tokens anew for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from depthc.ir.axes.analysis import analyse
from depthc.ir.body import Body
from depthc.ir.errors import RecipeError, SubsetError
from depthc.ir.masks.documents import Documents, documents_of
from depthc.ir.masks.padding import padding_of
from depthc.ir.names import Names
from depthc.ir.program import Block, Call, Merge, On, Op, Program, Segment, Select
from depthc.ir.types import Type
from depthc.passes.base import Pass
from depthc.passes.glue import Glue, aten
from depthc.passes.layers import names_in
from depthc.passes.routing_glue import document_ids


def is_share(value: Any) -> bool:
    """Whether a value is a share of the tokens: a number in (0, 1].

    Example:
        >>> is_share(0.125), is_share(0), is_share(True)
        (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def require_subset(one: Pass, program: Program, call: Call, chosen: str = "", remedy: str = "") -> None:
    """Refuse a layer that cannot run on a subset of its tokens; `chosen` says by what words it was meant."""
    error = _refusal(program.blocks[call.block], call)
    if error is not None:
        raise one.refuse(
            f"{chosen}{error.what}",
            where=", ".join(filter(None, (call.layer or call.block, error.where))),
            expected=error.expected,
            found=error.found,
            remedy=error.remedy or remedy or "tie without route, or route layers that mix tokens by attention alone",
        )


def require_subsets(one: Pass, program: Program, layers: Sequence[Call], numbers: Sequence[int]) -> None:
    """Refuse a layer of these numbers that cannot run on a subset of its tokens; names those that can."""
    legal = legal_layers(program, layers)
    remedy = f"choose among layers {', '.join(map(str, legal))}" if legal else "leave this stack as it is"
    for number in numbers:
        require_subset(one, program, layers[number], f"layer {number} cannot be chosen: ", remedy)


def numbers_of(one: Pass, count: int, given: Any, expected: str, found: str) -> list[int]:
    """The numbers of layers that an option names, in order.

    Raises:
        RecipeError: they are none of `count` layers; says what was expected and found.
    """
    known = range(count)
    if not isinstance(given, range | tuple) or not given or not all(type(n) is int and n in known for n in given):
        raise one.refuse(
            f"the stack of {count} layers has no such layers",
            expected=expected,
            found=found,
            remedy=f"give for example layers=({count - 1},)",
        )
    return sorted(set(given))


def legal_layers(program: Program, layers: Sequence[Call]) -> list[int]:
    """The layers that can run on a subset of their tokens, by number."""
    return [n for n, layer in enumerate(layers) if _refusal(program.blocks[layer.block], layer) is None]


def _refusal(block: Block, call: Call) -> SubsetError | RecipeError | None:
    """Why a layer cannot run on a subset of its tokens; None if it can."""
    if call.kv or len(call.writes) != 1:
        found = "a key/value plan" if call.kv else f"results {', '.join(call.writes)}"
        return RecipeError("it does more than pass one stream on", expected="a layer with one result", found=found)
    axes = analyse(block)
    try:
        axes.require_legal()
    except SubsetError as error:
        found = "; ".join(dict.fromkeys(f"{r.op}: {r.reason}" for r in axes.refusals))
        return SubsetError(error.what, where=error.where, expected=error.expected, found=found)
    node = block.body.placeholders_of("value")[0]
    type = node.meta["input"].type
    if axes.labels[node][:2] != ((axes.batch,), (axes.token,)) or len(type.shape) != 3:
        what, remedy = "its hidden states have another layout", ""
        if type.shape[:1] == (1,):  # of one sequence, a batch is a number and no size
            remedy = "capture the model with an example of two sequences"
        return RecipeError(what, expected="[batch, tokens, features]", found=str(type), remedy=remedy)
    return None


def stream_of(program: Program, call: Call) -> Type:
    """The type of a layer's hidden states: [batch, tokens, features]."""
    return program.blocks[call.block].body.inputs_of("value")[0].type  # type: ignore[return-value]


def group_of(program: Program, wish: str) -> str:
    """A name for what a pass adds, which no parameter, tap or loop has."""
    dotted = [name for name in (*program.params, *names_in(program)) if "." in name]
    return Names(part for name in dotted for part in name.split(".")).new(wish)


@dataclass(frozen=True)
class Candidates:
    """The tokens that layers choose among.

    Attributes:
        ops: the ops that find them.
        real: the set of tokens that are no padding.
        document: the ids within which tokens are compared; None: within rows.
    """

    ops: list[Op]
    real: str
    document: str | None


def candidates_of(one: Pass, program: Program, calls: Sequence[Call], names: Names, per: str) -> Candidates:
    """What these calls of the program choose among, per "row" or "document"."""
    real, ops = names.new("real"), list[Op]()
    for number, found in enumerate(padding_of(program, calls)):
        score = found.argument
        if not found.on:
            score, g = names.new("is_token"), Glue()
            body = g.body(g.op(aten.eq.Scalar, g.value("mask", found.type), 0))
            ops.append(Segment("is_token", body, (found.argument,), (score,)))
        ops.append(Select(real, "threshold(0)", score, real if number else None))
    ops = ops or [Select(real, "all", calls[0].reads[0])]
    if per == "row":
        return Candidates(ops, real, None)
    documents, ids = _documents(one, program, calls), names.new("document")
    body = document_ids(documents.type, documents.counting)
    return Candidates([*ops, Segment("documents", body, (documents.argument,), (ids,))], real, ids)


def _documents(one: Pass, program: Program, calls: Sequence[Call]) -> Documents:
    """What divides rows into documents."""
    found = documents_of(program, calls)
    if len(found) != 1:
        raise one.refuse(
            'per="document" needs a model whose masks keep documents apart',
            where=calls[0].layer,
            expected="one argument with an entry a token: the ids of documents, or positions that begin anew",
            found=", ".join(d.argument for d in found) or "no such argument",
            remedy='capture the model with packed rows and that argument, or use per="row"',
        )
    return found[0]


def on_chosen(
    call: Call, stream: Type, chosen: str, y: str, names: Names, body: Body | None = None, extra: tuple[str, ...] = ()
) -> list[Op]:
    """A layer on the rows of a token set, under the name `y`, and the rows merged into the stream."""
    merge = Merge(call.writes[0], call.reads[0], y, chosen, body, extra)
    return [*region_of(call, stream, chosen, y, names), merge]


def region_of(call: Call, stream: Type, chosen: str, y: str, names: Names) -> list[Op]:
    """A layer on the rows of a token set, under the name `y`."""
    (h, *sides), ops = call.reads, list[Op]()
    if h in sides:  # a region reads a name as rows or at full length, not both
        g, rows = Glue(), names.new("stream")
        ops.append(Segment("stream", g.body(g.value("x", stream)), (h,), (rows,)))
        h = rows
    inner = Call(call.block, (h, *sides), (y,), call.params, call.consts, grad=call.grad, layer=call.layer)
    reads = tuple(dict.fromkeys(inner.reads))
    return [*ops, On(chosen, reads, (y,), (inner,))]
