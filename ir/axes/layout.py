"""Rules of ops that move dimensions, and of those that make values out of nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from depthc.ir.axes.labels import Dim, Label, kinds_in, size_of
from depthc.ir.axes.ops import Slot, argument, dim_argument, dims_of, op_name
from depthc.ir.axes.rules import align, fresh_label, keep_out, rule

if TYPE_CHECKING:
    from depthc.ir.axes.inference import Inference


@rule("view", "flatten", "unflatten")
def _view(flow: Inference, node: fx.Node) -> Label:
    if isinstance(argument(node, 1, "dtype"), torch.dtype):
        keep_out(flow.operand(node, 0), "reads other numbers in the bits along")
        return fresh_label(flow, node)
    dims = flow.unifier.redistribute(flow.operand(node, 0), flow.probe.shape(node))
    return tuple(flow.fresh(node, d, dim) if isinstance(dim, int) else dim for d, dim in enumerate(dims))


@rule("expand_as")
def _expand_as(flow: Inference, node: fx.Node) -> Label:
    operands: list[tuple[Slot, fx.Node]] = [((i, -1), n) for i, n in enumerate(node.all_input_nodes)]
    return align(flow, node, operands)


@rule("expand")
def _expand(flow: Inference, node: fx.Node) -> Label:
    label, shape = flow.operand(node, 0), flow.probe.shape(node)
    padded = ((),) * (len(shape) - len(label)) + label
    return tuple(dim or flow.fresh(node, d, size) for d, (dim, size) in enumerate(zip(padded, shape, strict=True)))


@rule("repeat", "tile")
def _repeat(flow: Inference, node: fx.Node) -> Label:
    label, shape = flow.operand(node, 0), flow.probe.shape(node)
    padded = ((),) * (len(shape) - len(label)) + label
    dims = []
    for d, (dim, size) in enumerate(zip(padded, shape, strict=True)):
        dims.append(flow.fresh(node, d, size // size_of(dim)) + dim)
    return tuple(dims)


@rule("transpose", "t", "permute", "mT", "movedim", "moveaxis", "numpy_T")
def _permute(flow: Inference, node: fx.Node) -> Label:
    label = flow.operand(node, 0)
    return tuple(label[d] for d in order_of(node, len(label)))


def order_of(node: fx.Node, rank: int) -> list[int]:
    """The dimensions of the operand in the order of the result: seen on a tensor whose sizes are all different."""
    moved = node.target(torch.empty(tuple(range(rank)), device="meta"), *node.args[1:])  # type: ignore[operator]
    return list(moved.shape)


@rule("unsqueeze")
def _unsqueeze(flow: Inference, node: fx.Node) -> Label:
    label = flow.operand(node, 0)
    at = dim_argument(node, 1, len(label) + 1)
    return (*label[:at], (), *label[at:])


@rule("squeeze")
def _squeeze(flow: Inference, node: fx.Node) -> Label:
    label = flow.operand(node, 0)
    dims = dims_of(argument(node, 1, "dim"), len(label))
    return tuple(dim for d, dim in enumerate(label) if d not in dims or dim)


@rule("narrow")
def _narrow(flow: Inference, node: fx.Node) -> Label:
    label = flow.operand(node, 0)
    d = dim_argument(node, 1, len(label))
    keep_out([label[d]], "takes a part of")
    return (*label[:d], flow.fresh(node, d, flow.probe.shape(node)[d]), *label[d + 1 :])


@rule("slice")
def _slice(flow: Inference, node: fx.Node) -> Label:
    label = list(flow.operand(node, 0))
    d = dim_argument(node, 1, len(label), 0)
    size = flow.probe.shape(node)[d]
    if size != size_of(label[d]):
        part = _part(flow, node, label[d], d, size)
        if part is None:
            keep_out([label[d]], "slices")
            part = flow.fresh(node, d, size)
        label[d] = part
    return tuple(label)


def _part(flow: Inference, node: fx.Node, dim: Dim, d: int, size: int) -> Dim | None:
    """The slice of an extended axis (sinks, memory keys) that is again the plain axis, or one end of it."""
    if len(dim) != 1 or not dim[0].extended or argument(node, 4, "step", 1) != 1:
        return None
    atom = dim[0]
    start = flow.probe.number(argument(node, 2, "start", 0)) or 0
    before = sum(map(size_of, atom.before))
    start += size_of(dim) if start < 0 else 0
    plain = flow.key if atom.kind == "key" else flow.token
    if start == before and size == plain.size:
        return (plain,)
    if start + size <= before or start >= before + plain.size:
        return flow.fresh(node, d, size)
    return None


@rule("select")
def _select(flow: Inference, node: fx.Node) -> Label:
    label = flow.operand(node, 0)
    d = dim_argument(node, 1, len(label), 0)
    keep_out([label[d]], "selects one entry of")
    return label[:d] + label[d + 1 :]


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unbind")
def _split(flow: Inference, node: fx.Node) -> list[Label]:
    label = flow.operand(node, 0)
    unbind = op_name(node) == "unbind"
    d = dim_argument(node, 1 if unbind else 2, len(label), 0)
    keep_out([label[d]], "splits")
    parts = flow.probe.values[node]
    if unbind:
        return [label[:d] + label[d + 1 :] for _ in parts]
    return [(*label[:d], flow.fresh(node, i, part.shape[d]), *label[d + 1 :]) for i, part in enumerate(parts)]


@rule("python::getitem")
def _getitem(flow: Inference, node: fx.Node) -> Label:
    source, index = node.args
    return flow.labels[source][index]  # type: ignore[index]


@rule("cat")
def _cat(flow: Inference, node: fx.Node) -> Label:
    given: Any = node.args[0]
    sources = [n for n in given if flow.probe.shape(n) != (0,)]  # an old way to start a list
    labels = [flow.label(n) for n in sources]
    d = dim_argument(node, 1, len(labels[0]), 0)
    parts = [label[d] for label in labels]
    space = list(labels[0])
    for label in labels[1:]:
        space = [a if i == d else flow.unify(a, b) for i, (a, b) in enumerate(zip(space, label, strict=True))]
    special = [i for i, part in enumerate(parts) if kinds_in([part]) - {"free"}]
    if not special:
        space[d] = flow.fresh(node, d, sum(map(size_of, parts)))
    elif len(special) == 1 and len(parts[special[0]]) == 1 and parts[special[0]][0].kind in ("token", "key"):
        at = special[0]
        space[d] = (flow.extended(parts[at][0], tuple(parts[:at]), tuple(parts[at + 1 :])),)
    else:
        keep_out(parts, "concatenates along")
    return tuple(space)


@rule("stack")
def _stack(flow: Inference, node: fx.Node) -> Label:
    sources: Any = node.args[0]
    space = list(align(flow, node, [((0, i), n) for i, n in enumerate(sources)]))
    at = dim_argument(node, 1, len(space) + 1, 0)
    return (*space[:at], flow.fresh(node, at, len(sources)), *space[at:])


@rule("flip", "roll")
def _reorder(flow: Inference, node: fx.Node) -> Label:
    label = flow.operand(node, 0)
    dims = argument(node, 2, "dims", []) if op_name(node) == "roll" else node.args[1]
    keep_out([label[d] for d in dims_of(dims, len(label))], "reorders")
    return label


@rule("constant_pad_nd", "pad", "glu", "repeat_interleave", "unfold", "slice_scatter", "select_scatter")
def _resize(flow: Inference, node: fx.Node) -> Label:
    """Ops that change some dimensions: those must be free; found by the size, or named by the op."""
    label, shape = flow.operand(node, 0), flow.probe.shape(node)
    touched = {d for d, dim in enumerate(label) if size_of(dim) != shape[d]}
    if op_name(node) in ("slice_scatter", "select_scatter"):
        touched.add(dim_argument(node, 2, len(label), 0))
        written = flow.optional(node, 1)
        rest = [dim for d, dim in enumerate(label) if d not in touched or op_name(node) == "slice_scatter"]
        pairs = zip(rest, written or (), strict=True)
        kept = [a if size_of(a) != size_of(b) else flow.unify(a, b) for a, b in pairs]
        if op_name(node) == "slice_scatter":
            label = tuple(kept)
        else:
            at = next(iter(touched))
            label = (*kept[:at], label[at], *kept[at:])
    elif op_name(node) in ("constant_pad_nd", "pad"):  # one entry in and another out is a shift of the same size
        widths: Any = node.args[1]
        touched |= {len(label) - 1 - i // 2 for i, w in enumerate(widths) if w != 0}
    elif op_name(node) == "repeat_interleave" and argument(node, 1, "repeats") != 1:
        touched |= set(dims_of(argument(node, 2, "dim"), len(label)))
    elif op_name(node) in ("unfold", "glu"):
        touched.add(dim_argument(node, 1, len(label), -1))
    keep_out([label[d] for d in touched], f"{op_name(node)} changes")
    return tuple(
        flow.fresh(node, d, shape[d]) if size_of(dim) != shape[d] else dim for d, dim in enumerate(label)
    ) + tuple(flow.fresh(node, d, shape[d]) for d in range(len(label), len(shape)))


@rule("view_as_complex")
def _as_complex(flow: Inference, node: fx.Node) -> Label:
    return flow.operand(node, 0)[:-1]


@rule("view_as_real")
def _as_real(flow: Inference, node: fx.Node) -> Label:
    return (*flow.operand(node, 0), flow.fresh(node, -1, 2))


@rule("tril", "triu")
def _triangle(flow: Inference, node: fx.Node) -> Label:
    label = flow.operand(node, 0)
    if node in flow.moving:
        keep_out(label[-2:], "masks by index along")
    return label


# Creation. Which tokens a fill belongs to is found out where it is used.


@rule("full", "zeros", "ones", "empty", "arange", "scalar_tensor", "eye", "linspace", "rand", "randn")
def _creation(flow: Inference, node: fx.Node) -> Label:
    return fresh_label(flow, node)


@rule("prelu")
def _prelu(flow: Inference, node: fx.Node) -> Label:
    label, weight = flow.operand(node, 0), flow.operand(node, 1)
    if any(weight):
        keep_out(label[1:2], "prelu has parameters along")
    return label
