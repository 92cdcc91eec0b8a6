"""Dynamo's graph before AOT autograd as a trace: what torch.compile hands a backend, in the form that export's takes.

Dynamo writes torch functions and methods, and lifts parameters to inputs. Every call becomes ATen ops here. What is
private about Dynamo's graphs is known in this file only.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from depthc.ir.graph.calls import Calls, refuse
from depthc.ir.graph.canonical import canonicalize, inline
from depthc.ir.graph.export import mutates
from depthc.ir.graph.size_nodes import SizeEmitter, SizeNames, source_of
from depthc.ir.graph.trace import Trace, computed, tensor_type
from depthc.ir.names import Names
from depthc.ir.params import Param, ParamKind
from depthc.ir.signature import Leaf, Signature

aten = torch.ops.aten

_OWNED = re.compile(r"\._(parameters|buffers)\['[^']+'\]$")
_PATH = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")
_STATE = re.compile(r"torch\._C$|torch(\._C)?\._(functorch|autograd)\b")  # such as the levels of vmap
_ENTER_AUTOCAST, _EXIT_AUTOCAST = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


@dataclass(frozen=True)
class DynamoTrace:
    """A trace, and what the inputs of Dynamo's graph are in it.

    Attributes:
        inputs: one an input: ("value", leaf), ("param", name), or ("", "") for sizes and numbers.
        fakes: the inputs without data.
        mode: that of the tensors in `fakes`.
        symbols: where the value of a size symbol stands at run time: an input, and its dimension (None: the input).
    """

    trace: Trace
    inputs: tuple[tuple[str, str], ...]
    fakes: tuple[Any, ...]
    mode: FakeTensorMode
    symbols: Mapping[Any, tuple[int, int | None]]


def trace_dynamo(module: fx.GraphModule) -> DynamoTrace:
    """The trace of a graph that Dynamo made. It is for one mode: training if gradients are on.

    Dropout is as Dynamo found it; the mode says which rule selects tokens.

    Raises:
        CaptureError: inputs changed in place, higher-order ops, vmap, changes of autocast, numbers that vary and are
            no sizes.
    """
    return _Lowering(module).traced()


class _Lowering:
    """Dynamo's nodes, one by one, as ATen nodes of a new graph."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, fx.Graph()
        self.placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.fakes = tuple(n.meta.get("example_value") for n in self.placeholders)
        tensors = [fake for fake in self.fakes if isinstance(fake, FakeTensor)]
        if not tensors or any(fake is None for fake in self.fakes):
            refuse("an input of the graph has no example", expected="a graph of tensors, as Dynamo makes it")
        self.mode = tensors[-1].fake_mode
        self.values: dict[fx.Node, Any] = {}  # what became of Dynamo's nodes: nodes of `graph`, in trees, and numbers
        self.names, self.unique = SizeNames(), Names()
        self.params: dict[str, Param] = {}
        self.weights: dict[str, Tensor] = {}
        self.leaves: list[Leaf] = []
        self.calls = Calls(self.mode)
        self.trains = self.grad = torch.is_grad_enabled()
        self.follows: set[fx.Node] = set()  # what depends on something that takes a gradient
        self.changed = False  # whether something of it was written into another tensor

    def traced(self) -> DynamoTrace:
        inputs = tuple(self._input(node, fake) for node, fake in zip(self.placeholders, self.fakes, strict=True))
        output: fx.Node | None = None
        for node in self.module.graph.nodes:
            if node.op in ("call_function", "call_method"):
                self.values[node] = self._call(node)
            elif node.op == "output":
                output = node
            elif node.op == "get_attr":
                if isinstance(getattr(self.module, str(node.target), None), Tensor):
                    self.values[node] = self._constant(self.module, node)
            elif node.op != "placeholder":
                refuse(f"the graph has a node of the kind {node.op}", node, expected="parameters as inputs, and calls")
        assert output is not None
        count = self._output(output)
        if any(mutates(n.target) for n in self.graph.nodes):
            self.graph = self._functional()
        known = self._known()
        self._read_sizes(known)
        signature = self._signature(count)
        canonicalize(self.graph, self.names, known, both_modes=False)
        for node in self.graph.nodes:
            node.meta["source"] = source_of(node)
        name, where = self._origin()
        trace = Trace(name, self.graph, signature, self.params, self.weights, (self.trains,), self.names, where)
        return DynamoTrace(trace, inputs, self.fakes, self.mode, self._symbols())

    # inputs

    def _input(self, node: fx.Node, fake: Any) -> tuple[str, str]:
        if _is_number(node):
            return "", ""  # its users make a constant of it
        made = self.values[node] = self.graph.placeholder(node.name)
        made.meta["val"] = fake
        if not isinstance(fake, Tensor):
            return "", ""
        if fake.requires_grad:
            self.follows.add(made)
        source = _source_name(node)
        owned = _OWNED.search(source)
        if owned or isinstance(fake, nn.Parameter):
            name = made.meta["param"] = self._param_name(source)
            kind: ParamKind = "parameter" if fake.requires_grad else "frozen"
            if not isinstance(fake, nn.Parameter):
                kind = "buffer"
            self.params[name] = Param(tensor_type(fake, self.names), kind)
            return "param", name
        for dim, size in enumerate(fake.shape):
            symbols: Any = size.node.expr.free_symbols if isinstance(size, SymInt) else ()
            for symbol in sorted(symbols, key=str):
                self.names.declare(symbol, (symbol,), batch=dim == 0)
        name = made.meta["value"] = self.unique.new((re.findall(r"\w+", source) or ["x"])[-1])
        self.leaves.append(Leaf(name, tensor_type(fake, self.names)))
        return "value", name

    def _param_name(self, source: str) -> str:
        """The name in the state dict of the module that the frame runs; with its own name before it for another one."""
        name = ".".join(_PATH.findall(source)) or re.sub(r"\W+", "_", source).strip("_")
        owner = re.sub(r"\W+", "_", source.split("._", 1)[0]).strip("_")
        tried = chain((name, f"{owner}.{name}"), (f"{owner}.{number}.{name}" for number in count(1)))
        return next(each for each in tried if each not in self.params)

    def _known(self) -> dict[str, tuple[fx.Node, int]]:
        """For every size name, the input and dimension that have that size."""
        known: dict[str, tuple[fx.Node, int]] = {}
        for node in self.graph.nodes:
            for dim, size in enumerate(node.meta["val"].shape if "value" in node.meta else ()):
                name = self.names.of(size)
                if isinstance(name, str) and name.isidentifier():
                    known.setdefault(name, (node, dim))
        return known

    def _read_sizes(self, known: Mapping[str, tuple[fx.Node, int]]) -> None:
        """Sizes that are inputs are read off the tensors."""
        nodes = [n for n in self.graph.nodes if n.op == "placeholder" and not isinstance(n.meta["val"], Tensor)]
        with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op != "placeholder")):
            emitter = SizeEmitter(self.graph, known)
            for node in nodes:
                size = self.names.of(node.meta["val"])
                if node.users and not emitter.can(size):
                    refuse("a number that varies is an input of the graph", next(iter(node.users)), "sizes of tensors")
                made = emitter.emit(size) if node.users else 0
                if isinstance(made, fx.Node):
                    made.meta["val"] = node.meta["val"]
                    node.replace_all_uses_with(made)
                else:
                    inline(node, made)
                self.graph.erase_node(node)

    def _symbols(self) -> dict[Any, tuple[int, int | None]]:
        found: dict[Any, tuple[int, int | None]] = {}
        for at, fake in enumerate(self.fakes):
            sizes = [(None, fake)] if isinstance(fake, SymInt) else enumerate(getattr(fake, "shape", ()))
            for dim, size in sizes:
                if isinstance(size, SymInt) and size.node.expr.is_Symbol:
                    found.setdefault(size.node.expr, (at, dim))
        return found

    # calls

    def _call(self, node: fx.Node) -> Any:
        """What a call of a torch function or method becomes: nodes in the structure of its result."""
        if (number := _number(node)) is not None:
            return number
        if node.target is torch._C._log_api_usage_once:
            return None
        if node.target is torch._C._set_grad_enabled:
            if node.args[0] and not self.trains:
                refuse("gradients are switched on within no_grad", node)
            self.grad = bool(node.args[0])
            return None
        if node.target in (_ENTER_AUTOCAST, _EXIT_AUTOCAST):
            if node.target is _ENTER_AUTOCAST and (node.args[2] or torch.is_autocast_enabled(str(node.args[0]))):
                refuse("autocast is switched on or off within the graph", node, "one autocast around all of it")
            return None
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            refuse(f"there is a higher-order op: {node.target}", node, "torch functions")
        if _STATE.match(str(getattr(node.target, "__module__", ""))):
            refuse(f"the state of torch is changed: {node.target.__name__}", node, "functions of tensors")
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
        if node.target in (operator.getitem, getattr) and not isinstance(args[0], fx.Node):
            return node.target(*args)  # type: ignore[arg-type]  # one of several results
        return self._lowered(node, args, kwargs)

    def _lowered(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        call = self.calls.call(node, args, kwargs)
        copies = call.copy(self.graph, self._constant)
        for copy in copies.values():
            copy.meta |= {k: node.meta[k] for k in ("stack_trace", "nn_module_stack") if k in node.meta}
        results = [copies.get(leaf, leaf) for leaf in call.results]
        follows = self.trains and (self.changed or not self.follows.isdisjoint(call.operands))
        if follows and self.grad:
            self.follows.update(copies.values())
            self.changed = self.changed or call.changes  # then a tensor may follow that shares memory with an operand
        if follows and not self.grad:
            if call.changes:
                refuse("a tensor is changed in place under no_grad", node)
            results = [self._detached(result) for result in results]
        return pytree.tree_unflatten(results, call.structure)

    def _constant(self, template: fx.GraphModule, node: fx.Node) -> fx.Node:
        """A tensor that a call makes of numbers, as an input."""
        value = getattr(template, str(node.target))
        if isinstance(value, FakeTensor):
            refuse("a constant has no data")
        name = f"depth.constants.{len(self.weights)}"
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            made = self.graph.placeholder(f"constant{len(self.weights)}")
        made.meta |= {"param": name, "val": self.mode.from_tensor(value, static_shapes=True)}
        self.params[name], self.weights[name] = Param(tensor_type(value, self.names), "constant"), value
        return made

    def _detached(self, result: Any) -> Any:
        """A result that no gradient flows through, for the call stands under no_grad."""
        value = result.meta["val"] if isinstance(result, fx.Node) else None
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            return result
        made = self.graph.call_function(aten.detach.default, (result,))
        made.meta |= result.meta
        return made

    # the whole

    def _output(self, output: fx.Node) -> int:
        """Make the graph's output; returns how many results it has."""
        results: Any = fx.map_arg(output.args[0], self.values.__getitem__)
        for result in results:
            if not isinstance(result, fx.Node) or not isinstance(result.meta["val"], Tensor):
                refuse("the graph returns a number", output, "tensors")
        made = self.graph.output(())
        made.args = (tuple(computed(self.graph, made, result) for result in results),)
        return len(results)

    def _functional(self) -> fx.Graph:
        """The graph without ops in place. It is traced as a whole, for any tensor may share memory with another."""
        old = [n for n in self.graph.nodes if n.op == "placeholder"]
        module: Any = fx.GraphModule(nn.Module(), self.graph)
        values = [n.meta["val"] for n in old]
        try:
            with tracing(TracingContext(self.mode)):
                module, signature = aot_export_module(
                    module, values, trace_joint=False, pre_dispatch=True, decompositions={}
                )
        except Exception as error:  # whatever an op may raise
            first = str(error).strip().split("\n", 1)[0]
            refuse(f"it changes tensors in place, and does not trace: {type(error).__name__}: {first}")
        new = [n for n in module.graph.nodes if n.op == "placeholder"]
        named = {n.name: before for n, before in zip(new, old, strict=True)}
        for changed in signature.user_inputs_to_mutate.values():
            before = named[changed]
            what = before.meta.get("param") or before.meta.get("value")
            refuse(f"the model changes {what!r} in place when it runs", expected="a forward without side effects")
        for n, before in zip(new, old, strict=True):
            n.meta = dict(before.meta)
        output = next(iter(reversed(module.graph.nodes)))
        results: Any = output.args[0]
        output.args = (tuple(computed(module.graph, output, result) for result in results),)
        return module.graph

    def _signature(self, count: int) -> Signature:
        names = tuple(leaf.name for leaf in self.leaves)
        ranges: dict[str, tuple[int, int | None]] = {}
        for symbol in self._symbols():
            bounds = self.mode.shape_env.var_to_range[symbol]
            if symbol in self.names:
                high = bounds.upper
                ranges[str(self.names.of_expr(symbol))] = (int(bounds.lower), int(high) if high.is_Integer else None)
        in_spec = pytree.tree_structure(dict.fromkeys(names, 0))
        out_spec = pytree.tree_structure((0,) * count)
        return Signature(names, tuple(self.leaves), in_spec, ("",) * count, out_spec, ranges)

    def _origin(self) -> tuple[str, str]:
        """The class that all of the graph is of, as far as Dynamo says, and the line of its first op; for people."""
        calls = [n for n in self.module.graph.nodes if n.op.startswith("call_")]
        kinds = {next(iter(stack.values()))[1] for n in calls if (stack := n.meta.get("nn_module_stack"))}
        name = getattr(kinds.pop(), "__name__", "") if len(kinds) == 1 else ""
        return name or "Graph", next((where for n in calls if (where := source_of(n))), "")


def _source_name(node: fx.Node) -> str:
    """Where Dynamo found an input, as Python: "L['self']._modules['norm']._parameters['weight']"."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)


def _is_number(node: fx.Node) -> bool:
    """Whether an input is a floating-point number, which Dynamo passes as a tensor."""
    return bool(node.users) and all(user.target == "item" and user.op == "call_method" for user in node.users)


def _number(node: fx.Node) -> float | None:
    """The number that a call reads from an input, where that is an attribute of a module: Dynamo then guards it."""
    if node.op != "call_method" or node.target != "item" or node.args[0].op != "placeholder":
        return None
    source = getattr(node.args[0], "_dynamo_source", None)
    kind = getattr(source, "guard_source", None)
    kind = kind() if callable(kind) else kind
    if kind is None or not (kind.is_unspecialized_nn_module() or kind.is_unspecialized_builtin_nn_module()):
        refuse("a floating-point number that varies is an input of the graph", node, "attributes of modules")
    return float(node.meta["example_value"])
