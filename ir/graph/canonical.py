"""Canonical form of an exported graph: one way to write each thing, so that equal layers look equal.

Arguments equal to the schema's defaults are dropped, sizes are computed from the inputs alone, devices are relative,
dropout reads `training`, no-ops and assertions are gone, and equal pure expressions are one node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import SymInt, fx

from depthc.ir.body import Input
from depthc.ir.certificate import node_text
from depthc.ir.graph.size_nodes import SizeEmitter, SizeNames

aten = torch.ops.aten
_END = 2**63 - 1

# Shape-only creation: the operand gives nothing but its shape, dtype and device.
_LIKE: dict[Any, Callable[..., Any]] = {
    aten.zeros_like.default: aten.zeros.default,
    aten.ones_like.default: aten.ones.default,
    aten.empty_like.default: aten.empty.memory_format,
    aten.full_like.default: aten.full.default,
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_full.default: aten.full.default,
}
_RANDOM = {aten.dropout.default, aten.scaled_dot_product_attention.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default, aten.contiguous.default}
IGNORED = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_async.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}


def canonicalize(
    graph: fx.Graph, names: SizeNames, known: Mapping[str, tuple[fx.Node, int]], *, both_modes: bool = True
) -> None:
    """Rewrite a functional graph from torch.export in place. Placeholders are kept; `meta["val"]` stays right.

    Args:
        names: size names of the graph's symbols.
        known: for every size name, the input and dimension that have that size.
        both_modes: whether dropout is on when training and only then; else it stays as captured.
    """
    env = _environment(graph)
    _sizes_from_inputs(graph, names, known)
    for node in list(graph.nodes):
        if node.op == "call_function":
            _rewrite(node, env, names, known)
    if both_modes:
        _dropout_when_training(graph, env["training"])
    _drop_no_ops(graph)
    _merge_reshapes(graph)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    _merge_equal(graph)
    for node in env.values():
        if not node.users:
            graph.erase_node(node)


def is_random(node: fx.Node) -> bool:
    """Whether two executions of a node may differ."""
    tags = getattr(node.target, "tags", ())
    return node.target in _RANDOM or torch.Tag.nondeterministic_seeded in tags


def _environment(graph: fx.Graph) -> dict[str, fx.Node]:
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    env = {}
    for name in ("device", "training"):
        with graph.inserting_after(last):
            last = env[name] = graph.placeholder(name)
        last.meta["input"] = Input(name, "env")
    return env


def _sizes_from_inputs(graph: fx.Graph, names: SizeNames, known: Mapping[str, tuple[fx.Node, int]]) -> None:
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        emitter = SizeEmitter(graph, known)
        for node in list(graph.nodes):
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, SymInt):
                size = names.of(value)
                if emitter.can(size):
                    made = emitter.emit(size)
                    if isinstance(made, fx.Node):
                        made.meta.setdefault("val", value)
                    node.replace_all_uses_with(made) if isinstance(made, fx.Node) else inline(node, made)
    _fill_size_values(graph)


def _fill_size_values(graph: fx.Graph) -> None:
    """Values of the size nodes that the emitter made on the way to larger expressions."""
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            args = fx.map_arg(node.args, lambda n: n.meta["val"])
            node.meta["val"] = args[0].shape[args[1]] if node.target is aten.sym_size.int else node.target(*args)


def inline(node: fx.Node, value: int) -> None:
    """Give the users of a node a number instead."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)


def _rewrite(
    node: fx.Node, env: Mapping[str, fx.Node], names: SizeNames, known: Mapping[str, tuple[fx.Node, int]]
) -> None:
    """One node into canonical form: dropout and *_like forms first, then arguments."""
    graph = node.graph
    if node.target in IGNORED:
        graph.erase_node(node)
        return
    if node.target is aten.native_dropout.default:
        _dropout(node)
        return
    if node.target in _CASTS:
        _cast(node, env["device"])
    if node.target is aten.copy.default:
        _copy(node, names, known)
    if node.target in _LIKE:
        _like(node, env["device"], names, known)
    if hasattr(node.target, "_schema"):
        node.args, node.kwargs = _minimal_arguments(node, env["device"])
    if node.target is aten.slice.Tensor:
        _slice(node)


def _dropout(node: fx.Node) -> None:
    """`native_dropout(x, p, True)[0]`, as training capture writes it, is `dropout(x, p, True)`."""
    graph = node.graph
    with graph.inserting_before(node):
        made = graph.call_function(aten.dropout.default, node.args)
    made.meta.update(node.meta, val=node.meta["val"][0])
    for user in list(node.users):
        user.replace_all_uses_with(made)
        graph.erase_node(user)
    graph.erase_node(node)


def _dropout_when_training(graph: fx.Graph, training: fx.Node) -> None:
    """Every dropout reads `training`.

    If one attention drops out, all do: rates may grow with depth from 0, which is the schema's default.
    """
    for node in graph.nodes:
        if node.target is aten.dropout.default:
            node.args = (node.args[0], node.args[1], training)
    attentions = [n for n in graph.nodes if n.target is aten.scaled_dot_product_attention.default]
    if all(len(n.args) <= 4 or n.args[4] == 0 for n in attentions):
        return
    for node in attentions:
        args = (*node.args, *(None, 0.0)[len(node.args) - 3 :]) if len(node.args) < 5 else node.args
        with graph.inserting_before(node):
            rate = graph.call_function(operator.mul, (training, args[4]))
        rate.meta["val"] = args[4]
        node.args = (*args[:4], rate, *args[5:])


def _cast(node: fx.Node, device: fx.Node) -> None:
    """All the ways to convert a tensor are `_to_copy` or `clone`."""
    source, result = node.args[0].meta["val"], node.meta["val"]
    if source.dtype != result.dtype:
        node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": result.dtype}
    elif node.target is aten.contiguous.default:
        node.target, node.args = aten.clone.default, node.args[:1]
        node.kwargs = {"memory_format": torch.contiguous_format}
    else:
        node.target, node.args, node.kwargs = aten.clone.default, node.args[:1], {}


def _copy(node: fx.Node, names: SizeNames, known: Mapping[str, tuple[fx.Node, int]]) -> None:
    """`copy(old, new)` is the new value in the shape and dtype of the old one; written so, it has a derivative."""
    graph, value, new = node.graph, node.meta["val"], node.args[1]
    with graph.inserting_before(node):
        if new.meta["val"].dtype != value.dtype:
            cast = graph.call_function(aten._to_copy.default, (new,), {"dtype": value.dtype})
            cast.meta.update(node.meta, val=new.meta["val"].to(value.dtype))
            new = cast
        emitter = SizeEmitter(graph, known)
        shape = [emitter.emit(names.of(d)) for d in value.shape]
    _fill_size_values(graph)
    node.target, node.args, node.kwargs = aten.expand.default, (new, shape), {}


def _like(node: fx.Node, device: fx.Node, names: SizeNames, known: Mapping[str, tuple[fx.Node, int]]) -> None:
    with node.graph.inserting_before(node):
        emitter = SizeEmitter(node.graph, known)
        dims = [names.of(d) for d in node.meta["val"].shape]
        if not all(map(emitter.can, dims)):
            return
        shape = [emitter.emit(d) for d in dims]
    _fill_size_values(node.graph)
    fill = node.args[-1:] if "full" in str(node.target) else ()
    node.target, old = _LIKE[node.target], node.kwargs
    node.args = (shape, *fill) if fill else (shape,)
    node.kwargs = {"dtype": node.meta["val"].dtype, "device": old.get("device") or device}


def _minimal_arguments(node: fx.Node, device: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments without trailing defaults, keywords without defaults, devices relative."""
    args, kwargs = list(node.args), dict(node.kwargs)
    positional, keywords = [], {}
    for index, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = parameter.default_value
        value = args[index] if index < len(args) else kwargs.get(parameter.name, default)
        if parameter.name == "device" and isinstance(value, torch.device):
            value = device
        if parameter.name in ("layout", "pin_memory", "non_blocking"):
            value = default
        if not parameter.kwarg_only:
            positional.append((value, default if parameter.has_default_value() else ...))
        elif not _same(value, default):
            keywords[parameter.name] = value
    while positional and _same(*positional[-1]):
        positional.pop()
    return tuple(value for value, _ in positional), keywords


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default


def _slice(node: fx.Node) -> None:
    x, dim, start, end, step = (*node.args, *(None,) * 5)[:5]
    dim, start, step = dim or 0, start or 0, step or 1
    size = x.meta["val"].shape[dim]
    end_value = end.meta["val"] if isinstance(end, fx.Node) else end
    if end is None or (isinstance(end_value, int) and isinstance(size, int) and end_value >= size) or end_value is size:
        end = _END
    if end == _END and isinstance(start, int) and isinstance(size, int) and start < -size:
        start = 0
    node.args = (x, dim, start, end, step) if step != 1 else (x, dim, start, end)


def _drop_no_ops(graph: fx.Graph) -> None:
    """Drop what returns its operand, whatever the layer: scales of 1.0 and one dropout of rate 0 among others stay."""
    dropouts = [n for n in graph.nodes if n.target is aten.dropout.default]
    if all(n.args[1] == 0 for n in dropouts):
        for node in dropouts:
            node.replace_all_uses_with(node.args[0])
    for node in graph.nodes:
        if node.op == "call_function" and _is_no_op(node):
            node.replace_all_uses_with(node.args[0])


def _shape(node: Any) -> list[str]:
    return [str(d) for d in node.meta["val"].shape]


def _is_no_op(node: fx.Node) -> bool:
    target, args = node.target, node.args
    if not args or not isinstance(args[0], fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    source = args[0].meta.get("val")
    if not isinstance(source, torch.Tensor) or source.dtype != node.meta["val"].dtype:
        return False
    if "param" in args[0].meta and any(user.op == "output" for user in node.users):
        return False  # an output is the result of an op
    unlaid = "memory_format" not in node.kwargs or node.kwargs["memory_format"] is torch.preserve_format
    if target in (aten._to_copy.default, aten.clone.default):
        return unlaid
    if target is aten.dropout.default:
        return args[2] is False
    if target is aten.alias.default:
        return "param" not in args[0].meta
    if target in (aten.lift_fresh_copy.default, aten.lift_fresh.default):
        return True
    if target is aten.detach.default:
        return not source.dtype.is_floating_point  # a gradient stops here
    if target in (aten.expand.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return _shape(node) == _shape(args[0])
    if target is aten.slice.Tensor:
        return bool(args[2] == 0 and args[3] == _END and len(args) == 4)
    same_shape = _shape(node) == _shape(args[0])
    if target in (aten.add.Tensor, aten.sub.Tensor) and len(args) == 2:
        return same_shape and type(args[1]) is int and args[1] == 0 and not source.dtype.is_floating_point
    return False


def _merge_reshapes(graph: fx.Graph) -> None:
    """Every view is a reshape, and a copy that is only reshaped is none.

    Whether a tensor can be viewed depends on strides, which differ between devices, kernels and modes.
    """
    views = (aten._unsafe_view.default, aten.view.default)
    for node in graph.nodes:
        if node.target in views:
            node.target = aten.reshape.default
    for node in graph.nodes:
        if node.target is aten.clone.default and all(u.target is aten.reshape.default for u in node.users):
            node.replace_all_uses_with(node.args[0])


def _merge_equal(graph: fx.Graph) -> None:
    """Common subexpressions become one node, except random ones and those that only reshape parameters."""
    from_params = {n for n in graph.nodes if n.op == "placeholder" and "param" in n.meta}
    numbers: dict[fx.Node, int] = {}
    seen: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and not is_random(node):
            if node.all_input_nodes and all(i in from_params for i in node.all_input_nodes):
                from_params.add(node)
            else:
                key = node_text(node, lambda n: f"%{numbers[n]}")
                if key in seen:
                    node.replace_all_uses_with(seen[key])
                    graph.erase_node(node)
                    continue
                seen[key] = node
        numbers[node] = len(numbers)
