"""Trace: a model as one canonical FX graph, its signature and its parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from depthc.ir import certificate
from depthc.ir.errors import CaptureError, InputError
from depthc.ir.graph.canonical import canonicalize
from depthc.ir.graph.export import WHOLE, export, forward_line, functional, mutates
from depthc.ir.graph.guards import size_guards
from depthc.ir.graph.ones import takes_ones
from depthc.ir.graph.size_nodes import SizeNames, source_of
from depthc.ir.names import Names
from depthc.ir.params import Param, ParamKind, Ref
from depthc.ir.signature import Leaf, Signature, bind, parameter_names
from depthc.ir.sizes import Size
from depthc.ir.types import Type

aten = torch.ops.aten


@dataclass(frozen=True)
class Trace:
    """A captured model before its layers are found.

    Placeholders of `graph` have `meta["value"]` (the name of an argument leaf), `meta["param"]` (a name in `params`)
    or are the environment. `types` gives the type of any node with a tensor value. `where` is the line of the model's
    forward, for messages.
    """

    name: str
    graph: fx.Graph
    signature: Signature
    params: Mapping[str, Param]
    weights: Mapping[str, Tensor]
    modes: tuple[bool, ...]
    sizes: SizeNames
    where: str = ""

    def type_of(self, node: fx.Node) -> Type | None:
        """The type of a node's value; None if it is not a tensor."""
        value = node.meta.get("val")
        return tensor_type(value, self.sizes) if isinstance(value, Tensor) else None


def tensor_type(value: Tensor, names: SizeNames) -> Type:
    """The type of a fake tensor."""
    return Type(value.dtype, tuple(names.of(d) for d in value.shape))


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    """Export `model` in train and eval mode and bring the graph into canonical form.

    The two modes must agree up to dropout, which is on in training and off in evaluation; otherwise, and where modules
    are in different modes, the trace holds the model as it is.

    Raises:
        CaptureError: the model cannot be exported, or the arguments hold something that is not data.
    """
    parameters = parameter_names(inspect.signature(model.forward))
    bound = _bound(model, parameters, args, kwargs)
    given = _defaults(model) | ({"use_cache": False} if "use_cache" in parameters else {}) | bound
    bound = {p: given[p] for p in _plain(parameters) if p in given}
    _check_leaves(bound, forward_line(model))
    bound = _apart(bound, model)
    current = _exported(model, parameters, bound, model.training)
    if isinstance(current, CaptureError):
        raise current
    other = _exported(model, parameters, bound, not model.training) if _is_uniform(model) else None
    modes: tuple[bool, ...] = (model.training,)
    chosen = current
    if isinstance(other, ExportedProgram) and _without_dropout(current) == _without_dropout(other):
        training, evaluation = (current, other) if model.training else (other, current)
        if all(_drop_rates(training)) and not any(_drop_rates(evaluation)):
            chosen, modes = training, (False, True)
    chosen = functional(chosen)
    if mutated := _mutated(chosen):
        raise _side_effect(*mutated, model.training)
    return _from_exported(model, parameters, bound, chosen, modes)


def _bound(
    model: nn.Module, parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The example arguments by parameter name."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the example arguments do not fit the model's forward: {error}",
            where=forward_line(model),
            expected=f"({', '.join(parameters)})",
            remedy="pass args and kwargs as the model is called",
        ) from None
    return bind(parameters, args, kwargs)


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Arguments that are numbers or strings unless they are given: they are part of what is captured."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if type(p.default) in (bool, int, float, str)}


def _plain(parameters: tuple[str, ...]) -> list[str]:
    return [p.strip("*=") for p in parameters]


def _exported(
    model: nn.Module, parameters: tuple[str, ...], bound: Mapping[str, Any], training: bool
) -> ExportedProgram | CaptureError:
    try:
        exported = export(model, parameters, bound, training=training)
    except CaptureError as error:
        return error
    mutated = _mutated(exported)
    return _side_effect(*mutated, training) if mutated else exported


def _mutated(exported: ExportedProgram) -> tuple[str, str] | None:
    """The first parameter, buffer or argument that the graph writes to, and the line that does."""
    nodes = {n.name: n for n in exported.graph.nodes}
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            node = nodes.get(getattr(spec.arg, "name", ""))
            return str(spec.target), source_of(node) if node else ""
    return None


def _side_effect(name: str, where: str, training: bool) -> CaptureError:
    return CaptureError(
        f"the model changes {name!r} when it runs ({'train' if training else 'eval'} mode)",
        where=where,
        expected="a forward without side effects",
        remedy="run the model once first if it prepares its weights, capture in eval mode, or return the new state",
    )


def _apart(bound: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The arguments with every tensor a different one, for torch.export takes equal ones for one input.

    Those for a model on the meta device go there too: only their shapes and dtypes matter.
    """
    meta = any(p.is_meta for p in model.parameters())
    seen: set[int] = set()

    def apart(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and (id(leaf) in seen or (meta and not leaf.is_meta)):
            leaf = leaf.clone().to("meta" if meta else leaf.device)
        seen.add(id(leaf))
        return leaf

    return {name: pytree.tree_map(apart, value) for name, value in bound.items()}


def _check_leaves(bound: Mapping[str, Any], where: str) -> None:
    for path, leaf in pytree.tree_leaves_with_path(dict(bound)):
        if not isinstance(leaf, Tensor | bool | int | float | str | type(None) | torch.dtype):
            raise CaptureError(
                f"argument {leaf_name(path)!r} is a {type(leaf).__name__}, which is not data",
                where=where,
                expected="tensors, numbers, strings and None in tuples, lists, dicts or registered classes",
                found=type(leaf).__qualname__,
                remedy="pass its tensors, or register the class with torch.utils._pytree.register_pytree_node",
            )


def leaf_name(path: tuple[Any, ...]) -> str:
    """A pytree path as a name: ("past", 0, "k") is "past_0_k"."""
    return "_".join(re.sub(r"\W+", "", pytree.keystr((key,))) or "_" for key in path)


def _from_exported(
    model: nn.Module,
    parameters: tuple[str, ...],
    bound: Mapping[str, Any],
    exported: ExportedProgram,
    modes: tuple[bool, ...],
) -> Trace:
    graph, names = _copied(exported.graph), SizeNames()
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    specs = exported.graph_signature.input_specs
    params, weights = _parameters(model)
    users: list[tuple[fx.Node, Any]] = []
    for node, spec in zip(placeholders, specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            users.append((node, spec.arg))
        else:
            name = str(spec.target)
            if spec.kind is InputKind.CONSTANT_TENSOR:
                name, value = f"depth.constants.{spec.target}", exported.constants[str(spec.target)]
                params[name], weights[name] = Param(tensor_type(value, names), "constant"), value
            node.meta["param"] = name
    in_spec = pytree.tree_structure(dict(bound))
    inputs = _inputs(bound, users, names)
    known: dict[str, tuple[fx.Node, int]] = {}
    for (node, _), leaf in zip(users, inputs, strict=True):
        if leaf.type is None:
            graph.erase_node(node)
            continue
        node.meta["value"] = leaf.name
        for dim, size in enumerate(leaf.type.shape):
            if isinstance(size, str) and size.isidentifier():
                known.setdefault(size, (node, dim))
    outputs = _outputs(exported, graph)
    canonicalize(graph, names, known, both_modes=len(modes) == 2)
    for node in graph.nodes:
        node.meta["source"] = source_of(node)
    signature = Signature(
        parameters,
        inputs,
        in_spec,
        outputs,
        exported.call_spec.out_spec,
        *_conditions(model, parameters, bound, exported, names, inputs),
    )
    return Trace(type(model).__name__, graph, signature, params, weights, modes, names, forward_line(model))


def _copied(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, which knows the names of its nodes: torch.export renames some behind its back."""
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    return made


def _parameters(model: nn.Module) -> tuple[dict[str, Param], dict[str, Tensor]]:
    """Every parameter and buffer by name; a tensor that has several names is a reference under the later ones."""
    names = SizeNames()
    params: dict[str, Param] = {}
    weights: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    unsaved = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        kind: ParamKind = "parameter" if tensor.requires_grad else "frozen"
        if not isinstance(tensor, nn.Parameter):
            kind = "constant" if name in unsaved else "buffer"
        owner = first.setdefault(id(tensor), name)
        params[name] = Param(tensor_type(tensor, names), kind, None if owner == name else Ref(owner))
        weights[name] = tensor
    return params, weights


def _inputs(bound: Mapping[str, Any], users: list[tuple[fx.Node, Any]], names: SizeNames) -> tuple[Leaf, ...]:
    """The argument leaves; sizes get their names in this order, so that the first batch dimension is "b"."""
    paths = pytree.tree_leaves_with_path(dict(bound))
    for (path, _), (node, _) in zip(paths, users, strict=True):
        value = node.meta.get("val")
        shape: tuple[Any, ...] = tuple(value.shape) if isinstance(value, Tensor) else ()
        for dim, size in enumerate(shape):
            for symbol in sorted(size.node.expr.free_symbols, key=str) if isinstance(size, torch.SymInt) else ():
                argument = path[0] if dim else None
                names.declare(symbol, (argument, dim, size.node.hint), batch=dim == 0)
    leaves, unique = [], Names()
    for (path, leaf), (node, _) in zip(paths, users, strict=True):
        name = unique.new(leaf_name(path))
        typed = isinstance(leaf, Tensor)
        leaves.append(Leaf(name, tensor_type(node.meta["val"], names)) if typed else Leaf(name, None, leaf))
    return tuple(leaves)


def _outputs(exported: ExportedProgram, graph: fx.Graph) -> tuple[str | Leaf, ...]:
    """Outputs by node name; the graph's output keeps only the tensors."""
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    outputs: list[str | Leaf] = []
    kept = []
    for spec, value in zip(exported.graph_signature.output_specs, output.args[0], strict=True):  # type: ignore[arg-type]
        if isinstance(spec.arg, ConstantArgument):
            outputs.append(Leaf("", None, spec.arg.value))
        else:
            outputs.append("")
            kept.append(computed(graph, output, value))
    output.args = (tuple(kept),)
    return tuple(outputs)


def computed(graph: fx.Graph, output: fx.Node, value: fx.Node) -> fx.Node:
    """An output as the result of an op: a parameter that is returned as it is becomes an alias of itself."""
    if "param" not in value.meta:
        return value
    with graph.inserting_before(output):
        made = graph.call_function(aten.alias.default, (value,))
    made.meta["val"] = value.meta["val"]
    return made


def _conditions(
    model: nn.Module,
    parameters: tuple[str, ...],
    bound: Mapping[str, Any],
    exported: ExportedProgram,
    names: SizeNames,
    inputs: tuple[Leaf, ...],
) -> tuple[dict[str, tuple[int, int | None]], tuple[str, ...]]:
    """Ranges of the size names and further guards, as the exporter found them."""
    ranges: dict[str, tuple[int, int | None]] = {}
    for symbol, bounds in exported.range_constraints.items():
        if symbol in names:
            high = bounds.upper
            ranges[str(names.of_expr(symbol))] = (int(bounds.lower), int(high) if high.is_Integer else None)
    paths = pytree.tree_leaves_with_path(dict(bound))
    leaves = {pytree.keystr(path): (leaf, value) for (path, value), leaf in zip(paths, inputs, strict=True)}

    def size_of(path: str, dim: int) -> tuple[Size, int] | None:
        leaf, value = leaves.get(path.removeprefix(f"['{WHOLE}']"), (None, None))
        return (leaf.type.shape[dim], value.shape[dim]) if leaf and leaf.type else None

    for name, (low, high) in ranges.items():
        if low == 2 and takes_ones(model, parameters, bound, inputs, name):
            ranges[name] = (1, high)
    lowest = {name: low for name, (low, _) in ranges.items()}
    return ranges, size_guards(getattr(exported, "_guards_code", ()), size_of, lowest)


def _without_dropout(exported: ExportedProgram) -> str:
    """What the graph computes, as text, with every dropout, every idle cast and every copy for a layout taken out."""
    output = next(n for n in reversed(exported.graph.nodes) if n.op == "output")
    effects = [n for n in exported.graph.nodes if mutates(n.target)]
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    for node in certificate.linearize([*effects, output], lambda n: n.op == "placeholder"):
        if node.op == "placeholder":
            names[node] = node.name
        elif _is_idle(node):
            names[node] = names[node.args[0]]  # type: ignore[index]
        else:
            names[node] = f"%{len(lines)}"
            args = list(node.args)
            if node.target is aten.scaled_dot_product_attention.default:
                args += [None, 0.0, False][len(args) - 3 :]  # the mask, the dropout's rate, whether it is causal
                del args[4]
            arguments = certificate.argument_text([*args, *sorted(node.kwargs.items())], names.__getitem__)
            lines.append(f"{node.target}{arguments}")
    return "\n".join(lines)


def _is_uniform(model: nn.Module) -> bool:
    """Whether all modules are in one mode: not so where a part is frozen."""
    return len({module.training for module in model.modules()}) == 1


def _drop_rates(exported: ExportedProgram) -> list[float]:
    """The rate of every dropout that has one; 0 for those that are off. Attentions without dropout are left out."""
    rates = []
    for node in exported.graph.nodes:
        if node.target in (aten.dropout.default, aten.native_dropout.default) and node.args[1]:
            rates.append(float(node.args[1]) if node.args[2] else 0.0)  # type: ignore[arg-type]
        if node.target is aten.scaled_dot_product_attention.default and len(node.args) > 4 and node.args[4]:
            rates.append(float(node.args[4]))  # type: ignore[arg-type]
    return rates


def _is_idle(node: fx.Node) -> bool:
    if node.target in (aten.to.dtype, aten.to.device, aten.to.dtype_layout):
        return node.args[0].meta["val"].dtype == node.meta["val"].dtype
    return node.target in (aten.dropout.default, aten.contiguous.default, aten.clone.default)
