"""Rules of ops that reduce or normalise dimensions, or work along them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from depthc.ir.axes.facts import Count
from depthc.ir.axes.labels import Dim, Label, kinds_in, size_of
from depthc.ir.axes.ops import argument, dim_argument, dims_of, op_name
from depthc.ir.axes.rules import Refuse, flip_or_refuse, fresh_label, keep_out, pointwise, rule

if TYPE_CHECKING:
    from depthc.ir.axes.inference import Inference

_OVER_KEYS = {"sum", "amax", "max", "logsumexp"}  # a key without weight, or at -inf, changes nothing in them
_ALONG_FIRST = {"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "renorm"}  # these have no default dimension


@rule(
    *("sum", "mean", "var", "std", "var_mean", "std_mean", "prod", "any", "all"),
    *(
        "amax",
        "amin",
        "max",
        "min",
        "logsumexp",
        "linalg_vector_norm",
        "norm",
        "argmax",
        "argmin",
        "median",
        "count_nonzero",
    ),
)
def _reduce(flow: Inference, node: fx.Node) -> Any:
    name = op_name(node)
    where = 2 if name in ("linalg_vector_norm", "norm") else 1
    given = argument(node, where, "dim")
    if isinstance(given, fx.Node):  # max(a, b)
        return pointwise(flow, node)
    label = flow.operand(node, 0)
    dims = dims_of(None if isinstance(given, bool) else given, len(label))
    _check_reduced(flow, node, [label[d] for d in dims if label])
    value = flow.probe.values[node]
    parts = [value] if isinstance(value, Tensor) else list(value)
    keeps = parts[0].dim() == len(label)
    reduced = tuple(() if d in dims else dim for d, dim in enumerate(label) if keeps or d not in dims)
    return reduced if isinstance(value, Tensor) else [reduced] * len(parts)


def _check_reduced(flow: Inference, node: fx.Node, dims: list[Dim]) -> None:
    """Whether a reduction over these dimensions treats tokens alike."""
    source: Any = node.args[0]
    name, kinds = op_name(node), kinds_in(dims)
    if "token" in kinds and "key" in kinds_in(flow.label(source)):
        flip_or_refuse(flow, node, source, f"{name} over the query axis of scores")
    if kinds & {"token", "sorted"} and "key" not in kinds and name == "sum" and _counts(flow, node):
        return
    alone = "batch" not in kinds and all(len(dim) == 1 for dim in dims if "key" in kinds_in([dim]))
    if not ("key" in kinds and alone and name in _OVER_KEYS):
        keep_out(dims, f"{name} over")
    if "key" in kinds and any(user.args[1] == 1 for user in node.users if op_name(user) == "python::getitem"):
        raise Refuse("key", f"{name} tells which key has the largest score")


def _counts(flow: Inference, node: fx.Node) -> bool:
    """Whether a sum over tokens counts them; the choices that it counts are known if they are written one-hot."""
    source: Any = node.args[0]
    if flow.probe.values[source].dtype.is_floating_point:
        return False
    chosen = flow.facts.multiset(source)
    if chosen.op == "call_function" and op_name(chosen) == "one_hot":
        chosen = flow.facts.multiset(chosen.args[0])  # type: ignore[arg-type]
    flow.facts.counts[node] = Count(chosen)
    return True


@rule("softmax", "log_softmax")
def _softmax(flow: Inference, node: fx.Node) -> Label:
    source: Any = node.args[0]
    label = flow.label(source)
    dim = label[dim_argument(node, 1, len(label), -1)]
    if "token" in kinds_in([dim]) and "key" in kinds_in(label):
        flip_or_refuse(flow, node, source, "softmax over the query axis of scores")
    if not (len(dim) == 1 and dim[0].kind == "key"):
        keep_out([dim], "softmax over")
    return label


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "topk", "kthvalue", "sort", "argsort")
def along(flow: Inference, node: fx.Node) -> Any:
    """Ops in which the order along one dimension matters."""
    label = flow.operand(node, 0)
    name = op_name(node)
    given = argument(node, 2 if name in ("topk", "kthvalue") else 1, "dim", 0 if name in _ALONG_FIRST else -1)
    d = (-1 if isinstance(given, bool) else given) % max(len(label), 1)
    keep_out(label[d : d + 1], f"{name} along")
    value = flow.probe.values[node]
    parts = [value] if isinstance(value, Tensor) else list(value)
    labels = [tuple(_resized(flow, node, dim, i, part) for i, dim in enumerate(label)) for part in parts]
    return labels[0] if isinstance(value, Tensor) else labels


def _resized(flow: Inference, node: fx.Node, dim: Dim, d: int, value: Tensor) -> Dim:
    return dim if size_of(dim) == value.shape[d] else flow.fresh(node, d, value.shape[d])


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _normalise(flow: Inference, node: fx.Node) -> Any:
    label = flow.operand(node, 0)
    shape: Any = node.args[1]
    outer = len(label) - len(shape)
    keep_out(label[outer:], f"{op_name(node)} over")
    value = flow.probe.values[node]
    if isinstance(value, Tensor):
        return label
    reduced = (*label[:outer], *[()] * len(shape))
    return [label if part.shape == value[0].shape else reduced for part in value]


@rule("group_norm", "native_group_norm", "instance_norm")
def _group_norm(flow: Inference, node: fx.Node) -> Any:
    label = flow.operand(node, 0)
    keep_out(label[1:], f"{op_name(node)} over")
    return label if isinstance(flow.probe.values[node], Tensor) else [label, *fresh_label(flow, node)[1:]]


@rule("_native_batch_norm_legit_no_training", "_batch_norm_no_update")
def _fixed_batch_norm(flow: Inference, node: fx.Node) -> Any:
    """With running statistics it is a scale and a shift of every channel."""
    label = flow.operand(node, 0)
    keep_out(label[1:2], f"{op_name(node)} has parameters along")
    return [label, *fresh_label(flow, node)[1:]]
