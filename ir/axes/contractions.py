"""Rules of products that sum over a dimension, and of attention.

A product whose free dimensions hold tokens on both sides makes scores: the tokens of one operand are read as keys.
A product that sums over keys ends an attention. Every other sum over tokens or the batch is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from depthc.ir.axes.labels import Dim, Label, kinds_in, size_of
from depthc.ir.axes.ops import Slot, argument, op_name
from depthc.ir.axes.rules import BATCH, STATIC, Refuse, flip_or_refuse, fresh_label, keep_out, rule

if TYPE_CHECKING:
    from depthc.ir.axes.inference import Inference

MIXED = "sums over the token axis"


@dataclass
class Factor:
    """One operand of a product: the letter of each dimension, as in einsum."""

    slot: Slot | None  # None: a product of earlier operands
    node: fx.Node
    letters: str
    dims: dict[str, Dim]
    grows: bool = True  # whether a batch dimension may be put in front of it

    def has(self, kind: str) -> list[str]:
        """Letters of the dimensions that hold an axis of this kind."""
        return [letter for letter, dim in self.dims.items() if any(a.kind == kind for a in dim)]


def factor(flow: Inference, node: fx.Node, index: int, letters: str, *, item: int = -1, grows: bool = True) -> Factor:
    """The operand in an argument of `node`, its dimensions lettered from the right."""
    source: Any = node.args[index]
    if item >= 0:
        source = source[item]
    label = flow.label(source)
    letters = letters[len(letters) - len(label) :]
    return Factor((index, item), source, letters, dict(zip(letters, label, strict=True)), grows)


def product(flow: Inference, node: fx.Node, left: Factor, right: Factor, out: str) -> Label:
    """The axes of `left,right->out`; decides which operand holds keys, and refuses sums over tokens."""
    _choose_keys(flow, node, left, right)
    sizes: dict[str, Dim] = dict(left.dims)
    for letter, dim in right.dims.items():
        sizes[letter] = flow.unify(sizes.get(letter, ()), dim)
    free = [k for k in out if (k in left.dims) != (k in right.dims)]
    for operand in (left, right):
        for letter in operand.dims:
            operand.dims[letter] = sizes[letter] if size_of(operand.dims[letter]) > 1 else ()
    batches = [f for f in (left, right) if any("batch" in kinds_in([f.dims[k]]) for k in free if k in f.dims)]
    if len(batches) == 2:
        raise Refuse("batch", "multiplies rows of the batch with each other", BATCH)
    for operand, other in ((left, right), (right, left)):
        summed = [k for k in operand.dims if k not in out]
        _check_sum(flow, node, operand, other, [sizes[k] for k in summed])
        space = [sizes.get(k, ()) for k in _spread(out, operand, other)]
        if operand.slot is not None:
            flow.record(node, operand.slot, tuple(operand.dims[k] for k in operand.letters), tuple(space))
    label = tuple(sizes.get(k, ()) for k in out)
    if "key" in kinds_in(label) and "token" not in kinds_in(label) and node in flow.moving:
        keyed = left if left.has("key") else right
        if keyed.node in flow.moving and flow.entries_behind(keyed.node):
            flip_or_refuse(flow, node, keyed.node, "the result has a row a key, not a row a query")
    return label


def _spread(out: str, operand: Factor, other: Factor) -> str:
    """The dimensions that an operand may be broadcast to: those of the batch, then its own."""
    shared = [k for k in out if k not in operand.dims and k.isupper()]
    return "".join(shared) + operand.letters if operand.grows else operand.letters


def _choose_keys(flow: Inference, node: fx.Node, left: Factor, right: Factor) -> None:
    """Read the tokens of one operand as keys where tokens meet tokens, or keys."""
    for one, other in ((left, right), (right, left)):
        for letter in one.has("key"):
            if letter in other.has("token") and not other.has("key"):
                _as_keys(flow, node, other)
        if one.node not in flow.moving and not other.has("key"):
            _turn(flow, one, [k for k in one.has("key") if k in other.has("token")], "token")
    mine, theirs = left.has("token"), right.has("token")
    if not mine or not theirs or set(mine) == set(theirs):
        return
    if left.has("key") or right.has("key"):
        keyed = left if left.has("key") else right
        if set(mine) & set(theirs):
            flip_or_refuse(flow, node, keyed.node, MIXED)
        raise Refuse("token", "scores meet tokens again")
    if set(mine) & set(theirs):
        raise Refuse("token", MIXED)
    _as_keys(flow, node, left if node in flow.flips else right)


def _as_keys(flow: Inference, node: fx.Node, operand: Factor) -> None:
    _turn(flow, operand, list(operand.dims), "key")
    if node in flow.moving:
        flow.entries.add(node)


def _turn(flow: Inference, operand: Factor, letters: Sequence[str], kind: str) -> None:
    for letter in letters:
        operand.dims[letter] = flow.in_role(operand.dims[letter], kind)


def _check_sum(flow: Inference, node: fx.Node, operand: Factor, other: Factor, summed: list[Dim]) -> None:
    kinds = kinds_in(summed)
    if "token" in kinds and operand.has("key"):
        flip_or_refuse(flow, node, operand.node, MIXED)
    if "token" in kinds or "batch" in kinds or "sorted" in kinds:
        keep_out(summed, f"{op_name(node)} sums over")
    if "key" in kinds:
        if any("key" in kinds_in([dim]) and len(dim) > 1 for dim in summed):
            raise Refuse("key", f"{op_name(node)} sums over keys and features at once")
        if node in flow.moving and operand.node in flow.moving and other.node not in flow.valued:
            raise Refuse("key", "weights that belong to key positions are parameters")
        flow.exits.add(node)


_BATCH = "ABCDEFGH"


def _matmul_letters(left: int, right: int) -> tuple[str, str, str]:
    """Letters for a matrix product of operands of these ranks, and of its result."""
    shared = _BATCH[: max(left, right, 2) - 2] if left > 1 or right > 1 else ""
    a = shared + "mk" if left > 1 else "k"
    b = shared + "kn" if right > 1 else "k"
    return a, b, shared + ("m" if left > 1 else "") + ("n" if right > 1 else "")


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
def _matmul(flow: Inference, node: fx.Node) -> Label:
    a, b, out = _matmul_letters(*(len(flow.operand(node, i)) for i in (0, 1)))
    return product(flow, node, factor(flow, node, 0, a), factor(flow, node, 1, b), out)


@rule("linear")
def _linear(flow: Inference, node: fx.Node) -> Label:
    rank = len(flow.operand(node, 0))
    rows = _BATCH[: rank - 1]
    weight = factor(flow, node, 1, "nk", grows=False)
    columns = "n" if len(weight.dims) == 2 else ""
    label = product(flow, node, factor(flow, node, 0, rows + "k"), weight, rows + columns)
    if len(node.args) > 2 and node.args[2] is not None:
        label = _add(flow, node, 2, label)
    return label


@rule("addmm", "baddbmm", "addmv", "addbmm")
def _addmm(flow: Inference, node: fx.Node) -> Label:
    a, b, out = _matmul_letters(*(len(flow.operand(node, i)) for i in (1, 2)))
    label = product(flow, node, factor(flow, node, 1, a), factor(flow, node, 2, b), out)
    if op_name(node) == "addbmm":
        keep_out(label[:1], "addbmm sums over")
        label = label[1:]
    return _add(flow, node, 0, label)


def _add(flow: Inference, node: fx.Node, index: int, label: Label) -> Label:
    """An operand that is added to a product: a bias, or a mask in the scores."""
    source: Any = node.args[index]
    dims = list(flow.label(source))
    space = label[len(label) - len(dims) :]
    for d, dim in enumerate(dims):
        kind = next((k for k in ("key", "token") if k in kinds_in([space[d]])), "")
        dims[d] = flow.in_role(dim, kind)
        if source in flow.moving and dims[d] != dim:
            flow.entries.add(node)
    unified = tuple(flow.unify(a, b) for a, b in zip(space, dims, strict=True))
    flow.record(node, (index, -1), tuple(dims), label)
    return label[: len(label) - len(dims)] + unified


@rule("einsum")
def _einsum(flow: Inference, node: fx.Node) -> Label:
    """Operands are multiplied one after the other, each letter kept while it is needed."""
    equation: Any = node.args[0]
    sources: Any = node.args[1]
    inputs, out = _spelled(equation, [len(flow.label(n)) for n in sources])
    factors = [factor(flow, node, 1, letters, item=i, grows=False) for i, letters in enumerate(inputs)]
    left = factors[0]
    for number, right in enumerate(factors[1:], 2):
        needed = set(out).union(*inputs[number:])
        kept = out if number == len(factors) else "".join(sorted({*left.letters, *right.letters} & needed))
        label = product(flow, node, left, right, kept)
        left = Factor(None, left.node, kept, dict(zip(kept, label, strict=True)), grows=False)
    if len(factors) == 1:
        keep_out([dim for letter, dim in left.dims.items() if letter not in out], "einsum sums over")
    return tuple(left.dims[letter] for letter in out)


def _spelled(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The letters of every operand and of the result, with ellipses written out in capitals."""
    terms, _, out = equation.replace(" ", "").partition("->")
    inputs = terms.split(",")
    extra = [rank - len(letters) + 3 for letters, rank in zip(inputs, ranks, strict=True) if "..." in letters]
    dots = "ZYXWVUTS"[: max(extra, default=0)]
    spelled = [
        letters.replace("...", dots[len(dots) - (rank - len(letters) + 3) :])
        for letters, rank in zip(inputs, ranks, strict=True)
    ]
    if any(len(set(letters)) < len(letters) for letters in spelled) or "->" not in equation:
        raise Refuse("token", "einsum of a diagonal, or without a result", STATIC)
    return spelled, out.replace("...", dots)


@rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(flow: Inference, node: fx.Node) -> Label:
    label = flow.operand(node, 0)
    weight: Any = node.args[1]
    shape, kernel = flow.probe.shape(node), flow.probe.shape(weight)[2:]
    if len(label) != 2 + len(kernel):
        keep_out(label, "convolution without a batch dimension along")
        return fresh_label(flow, node)
    keep_out(label[1:2], "convolution has parameters along")
    keep_out([dim for i in (1, 2) for dim in flow.optional(node, i) or ()], "convolution with a weight made of")
    dims = [label[0], flow.fresh(node, 1, shape[1])]
    for d, width in enumerate(kernel, 2):
        pointwise = width == 1 and shape[d] == size_of(label[d])
        if not pointwise:
            keep_out([label[d]], "convolution along")
        dims.append(label[d] if pointwise else flow.fresh(node, d, shape[d]))
    return tuple(dims)


@rule("scaled_dot_product_attention")
def _attention(flow: Inference, node: fx.Node) -> Label:
    q, k, v = (list(flow.operand(node, i)) for i in range(3))
    queries = "token" in kinds_in([q[-2]])
    for other in (k, v):
        if "token" in kinds_in([other[-2]]) and not queries:
            raise Refuse("token", "queries that are not tokens attend to tokens")
        if queries:
            other[:] = [flow.in_role(dim, "key") if "token" in kinds_in([other[-2]]) else dim for dim in other]
    keep_out([q[-1], k[-1], v[-1]], "scaled_dot_product_attention sums over")
    keep_out([dim for dim in (q[-2], k[-2]) if len(dim) > 1], "attention merges others with")
    keep_out([q[-2]] if "batch" in kinds_in([q[-2]]) else [], "attention along")
    keep_out([k[-2]] if "batch" in kinds_in([k[-2]]) else [], "attention along")
    shared = argument(node, 7, "enable_gqa", False)
    keys = flow.unify(k[-2], v[-2])
    q[-1] = flow.unify(q[-1], k[-1])
    rows = [*_shared_batch(flow, q, k, v, gqa=bool(shared))]
    for index, dims in enumerate((q, k, v)):
        if index:
            dims[-2] = keys
        space = (*(() for _ in range(len(rows) + 2 - len(dims))), *dims)
        flow.record(node, (index, -1), tuple(dims), (*_outer(rows, dims), *space[-2:]))
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node):
        _mask(flow, node, mask, (*rows, q[-2], keys))
    if queries and node in flow.moving:
        flow.fused.add(node)
        if argument(node, 5, "is_causal", False) and any(a.extended for dim in (keys, q[-2]) for a in dim):
            raise Refuse("key", "is_causal with queries or keys that are not tokens", "pass a mask")
    return (*rows, q[-2], v[-1])


def _outer(rows: list[Dim], dims: list[Dim]) -> list[Dim]:
    """The batch dimensions of an operand: its own heads where heads are shared, else those of the result."""
    own = [()] * (len(rows) + 2 - len(dims)) + dims[:-2]
    return [b if size_of(b) > 1 else a for a, b in zip(rows, own, strict=True)]


def _shared_batch(flow: Inference, q: list[Dim], k: list[Dim], v: list[Dim], gqa: bool) -> list[Dim]:
    rank = max(len(q), len(k), len(v))
    rows: list[Dim] = []
    for d in range(-rank, -2):
        dims = [x[d] for x in (q, k, v) if len(x) >= -d]
        if gqa and d == -3:
            flow.unify(k[d], v[d])
            rows.append(q[d])
            continue
        row: Dim = ()
        for dim in dims:
            row = flow.unify(row, dim)
        rows.append(row)
    return rows


def _mask(flow: Inference, node: fx.Node, mask: fx.Node, space: Label) -> None:
    """A mask or a bias on the scores; tokens on its last dimension are keys."""
    dims = list(flow.label(mask))
    wanted = space[len(space) - len(dims) :]
    for d, dim in enumerate(dims):
        kind = next((k for k in ("key", "token") if k in kinds_in([wanted[d]])), "")
        dims[d] = flow.in_role(dim, kind)
        flow.unify(dims[d], wanted[d])
    slot: Slot = (3, -1) if len(node.args) > 3 else ("attn_mask", -1)
    flow.record(node, slot, tuple(dims), space)
