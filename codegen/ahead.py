"""Ahead of time: a program whose bodies are compiled from examples without data, each once, before its first run.

torch.compile's own way (`DepthModule.compile`) compiles a body when it is first called, through a Dynamo of its own.
Inside a backend Dynamo is already at work, and its guards protect all of the graph: sizes, strides, dtypes, what takes
a gradient. So every body goes straight to the compiler behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import config as functorch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

from depthc.codegen.cpp import shared_units
from depthc.ir.body import Body, interpret
from depthc.ir.errors import CaptureError
from depthc.ir.evaluate import Evaluator
from depthc.ir.program import Program

Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class AheadProgram:
    """A program of calls, segments and loops, run with compiled bodies; gradients flow to what it is given.

    A body is compiled once for all its applications that agree in dtypes, sizes, strides and the numbers that are no
    tensors. If one of them needs the gradient of an input, the one compiled function computes it for all.

    Args:
        program: of one mode, without token sets and key/value plans.
        device: that of its arguments.
        mode: of the examples.
        compile: the compiler of a graph and its examples, as torch.compile calls a backend.

    Attributes:
        compiled: how many functions were compiled.
    """

    def __init__(self, program: Program, device: torch.device, mode: FakeTensorMode, compile: Compile) -> None:
        self.program, self.device, self.mode, self._compile = program, device, mode, compile
        self.compiled = 0
        self._sites: list[_Function] = []

    def prepare(
        self, values: Mapping[str, Tensor], param: Callable[[str], Tensor], symbol: Callable[[Any], SymInt]
    ) -> None:
        """Compile every body, from examples of what `__call__` is given.

        Raises:
            CaptureError: a number that varies flows from one part of the program to another.
        """
        functions: dict[Any, _Function] = {}
        results: dict[Any, tuple[Any, ...]] = {}
        varying: dict[str, frozenset[int]] = {}

        def note(body: Body, inputs: Sequence[Any]) -> tuple[Any, ...]:
            if body.certificate not in varying:
                varying[body.certificate] = _varying(body, inputs)
            places = varying[body.certificate]
            key = (body.certificate, *_surroundings(self.device), *_kinds(inputs, places))
            function = functions.setdefault(key, _Function(body, tuple(inputs), places, *_surroundings(self.device)))
            follows = frozenset(at for at, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad)
            function.follows |= follows
            self._sites.append(function)
            found = results.get((key, follows)) or interpret(body, inputs)
            if all(isinstance(x, Tensor) for x in found):  # without data: those of one application serve the next
                results[key, follows] = found
            return found

        # Composite ops decompose by their Python forms, which leave sizes symbols; in C++ some ask for the numbers.
        with self.mode, enable_python_dispatcher():
            self._run(values, param, note)
        with shared_units():  # long bodies first: their kernels are compiled during the short ones
            for function in sorted(functions.values(), key=lambda f: -len(f.body.nodes)):
                function.compile(self.mode, self.device, symbol, self._compile)
        self.compiled = len(functions)

    def __call__(
        self, values: Mapping[str, Tensor], param: Callable[[str], Tensor], symbol: Callable[[Any], int]
    ) -> tuple[Tensor, ...]:
        """The outputs; `symbol` gives the number that a symbol in the sizes of the examples stands for."""
        sites = iter(self._sites)

        def run_body(_: Body, inputs: Sequence[Any]) -> Any:
            return next(sites)(inputs, symbol)

        found = self._run(values, param, run_body)
        return tuple(found[name] for name in self.program.signature.outputs if isinstance(name, str))

    def _run(
        self, values: Mapping[str, Tensor], param: Callable[[str], Tensor], run_body: Callable[..., Any]
    ) -> dict[str, Any]:
        evaluator = Evaluator(self.program, param, self.device, self.program.modes[0], run_body)
        return evaluator.run(self.program.body, dict(values), self.program.signature.size_values(values))


@dataclass
class _Function:
    """One body on inputs of one kind, compiled.

    Attributes:
        inputs: those of its first application.
        varying: the places of constants that are passed as tensors, for they differ between layers.
        grad, cast: whether gradients and autocast are on where it runs.
        follows: the places of inputs that take a gradient in some application.
        symbols: what the sizes of the inputs are made of; their numbers are its first arguments.
    """

    body: Body
    inputs: tuple[Any, ...]
    varying: frozenset[int]
    grad: bool
    cast: bool
    follows: set[int] = field(default_factory=set)
    symbols: tuple[Any, ...] = ()
    call: Callable[..., Any] | None = None

    def compile(
        self, mode: FakeTensorMode, device: torch.device, symbol: Callable[[Any], SymInt], compile: Compile
    ) -> None:
        """Compile it in a tracing context of its own.

        Compilers keep there what they know of a graph, such as which saved tensors its backward may overwrite, and read
        it when they compile the backward. That may be much later, and in one context it would be of another graph.
        """
        with mode, torch.no_grad():
            examples = [self._example(at) for at in self._tensors()]
        symbols = {s for x in examples for n in (*x.shape, *x.stride()) if isinstance(n, SymInt) for s in _free(n)}
        self.symbols = tuple(sorted(symbols, key=str))
        numbers = [symbol(s) for s in self.symbols]
        with (
            tracing(TracingContext(mode)),
            functorch.patch(force_non_lazy_backward_lowering=True),
            torch.set_grad_enabled(self.grad),
            torch.autocast(device.type, enabled=self.cast),
        ):
            self.call = compile(self._graph(examples, numbers), [*numbers, *examples])

    def __call__(self, inputs: Sequence[Any], symbol: Callable[[Any], int]) -> Any:
        tensors = (_as_tensor(inputs[at]) if at in self.varying else inputs[at] for at in self._tensors())
        return self.call(*map(symbol, self.symbols), *tensors)  # type: ignore[misc]

    def _tensors(self) -> list[int]:
        return [at for at, value in enumerate(self.inputs) if isinstance(value, Tensor) or at in self.varying]

    def _example(self, at: int) -> Tensor:
        value = _as_tensor(self.inputs[at]) if at in self.varying else self.inputs[at].detach()
        return value.requires_grad_(at in self.follows)  # type: ignore[no-any-return]

    def _graph(self, examples: Sequence[Tensor], numbers: Sequence[SymInt]) -> fx.GraphModule:
        """The body as a graph over sizes and tensors alone: all else is part of what is compiled."""
        graph = fx.Graph()
        for symbol, number in zip(self.symbols, numbers, strict=True):
            graph.placeholder(str(symbol)).meta["example_value"] = number
        made: dict[fx.Node, Any] = dict(zip(self.body.placeholders, self.inputs, strict=True))
        for at, example in zip(self._tensors(), examples, strict=True):
            node = made[self.body.placeholders[at]] = graph.placeholder(f"input{at}")
            node.meta["example_value"] = example
        for node in self.body.nodes:
            made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(tuple(made[n] for n in self.body.results))
        return fx.GraphModule(nn.Module(), graph)


def _surroundings(device: torch.device) -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled(device.type)


def _kinds(inputs: Sequence[Any], varying: frozenset[int]) -> Iterator[Any]:
    """What of its inputs a compiled function depends on."""
    for at, value in enumerate(inputs):
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise CaptureError(
                "the graph of torch.compile cannot be rewritten: a number that varies flows between its parts",
                expected="tensors between embedding, layers and head",
                found=str(value),
                remedy="leave the recipe out, and Inductor compiles the graph as it is",
            )
        if isinstance(value, Tensor):
            layout = (*value.shape, "", *value.stride(), "", value.storage_offset())
            yield str(value.dtype), str(value.device), tuple(map(str, layout))
        else:
            yield None if at in varying else repr(value)


def _varying(body: Body, inputs: Sequence[Any]) -> frozenset[int]:
    """The places of all constants, if the body computes the same types with tensors in their place; else none.

    An epsilon or a rate of dropout must be a number: then every layer's body is one of its own.
    """
    places = frozenset(at for at, node in enumerate(body.placeholders) if node.meta["input"].kind == "const")
    if not places:
        return places
    given = [_as_tensor(value) if at in places else value for at, value in enumerate(inputs)]
    try:
        same = _dtypes(body, given) == _dtypes(body, inputs)
    except Exception:  # whatever an op raises that takes no tensor there
        return frozenset()
    return places if same else frozenset()


def _dtypes(body: Body, inputs: Sequence[Any]) -> list[Any]:
    found: list[Any] = []

    def observe(_: fx.Node, result: Any) -> Any:
        found.append(getattr(result, "dtype", type(result)))
        return result

    with torch.no_grad():
        interpret(body, inputs, observe)
    return found


def _as_tensor(number: float) -> Tensor:
    """A number as a tensor that takes part in type promotion as numbers do among tensors of floating point."""
    return torch.tensor(number, dtype=torch.float64)


def _free(size: SymInt) -> set[Any]:
    return size.node.expr.free_symbols  # type: ignore[no-any-return]
