"""Traces: a body as the ATen graph that torch-mlir's importer reads, with the type of every value."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from depthc.ir import sizes
from depthc.ir.axes.probe import PRIMES
from depthc.ir.body import Body, Input
from depthc.ir.cost.shapes import size_symbols
from depthc.ir.errors import MlirError
from depthc.ir.graph.size_nodes import source_of
from depthc.ir.mlir.decompositions import decompositions, learn
from depthc.ir.signature import Signature
from depthc.ir.types import INT, Type

# Multiples of the sizes to try, for lengths that must be divided; then all small sizes, at most so many.
_SMALL, _MOST_TRIED = 300, 90_000
_SCALES = (1, 2, 4, 8, 16, 32, 64, 3, 5, 6, 12, 24, 48, 96, 10, 20, 60, 120, 840)


@dataclass(frozen=True)
class Sizes:
    """What is known of the size names of a program: the smallest and largest legal value, and further conditions."""

    ranges: tuple[tuple[str, tuple[int, int | None]], ...] = ()
    guards: tuple[str, ...] = ()

    @classmethod
    def of(cls, signature: Signature) -> Sizes:
        """Those of a program."""
        return cls(tuple(signature.ranges.items()), signature.guards)

    def hints(self, names: Sequence[str]) -> dict[str, int]:
        """A legal size for every name, by which ops decide while a body is traced: large, different ones if it can."""
        ladder = (
            {name: self._below(name, base, scale) for name, base in zip(names, bases, strict=False)}
            for bases, scale in itertools.product(PRIMES, _SCALES)
        )
        usual = dict(zip(names, PRIMES[0], strict=False))
        tried = itertools.chain(ladder, itertools.islice(self._small(names), _MOST_TRIED))
        return next((found for found in tried if all(self._met(guard, found) for guard in self.guards)), usual)

    def _small(self, names: Sequence[str]) -> Iterator[dict[str, int]]:
        """All small sizes of the names that guards read: where little else than one size is legal."""
        read = {name for guard in self.guards for name in sizes.names(sizes.read(guard))}
        usual = {name: self._below(name, base, 1) for name, base in zip(names, PRIMES[0], strict=False)}
        guarded = [name for name in names if name in read]
        for values in itertools.product(range(2, _SMALL), repeat=len(guarded)):
            yield usual | dict(zip(guarded, values, strict=True))

    def _below(self, name: str, base: int, scale: int) -> int:
        """A multiple of a scale that is legal: the base times it, or what the range allows."""
        low, high = dict(self.ranges).get(name, (0, None))
        return base * scale if high is None or base * scale <= high else max(low, high - high % scale)

    @staticmethod
    def _met(guard: str, found: Mapping[str, int]) -> bool:
        return not sizes.names(sizes.read(guard)) <= found.keys() or sizes.met(guard, found)


NOTHING = Sizes()


def trace(body: Body, name: str, known: Sizes = NOTHING) -> fx.GraphModule:
    """A body as a graph of its values, parameters and constants, in this order; evaluated, not trained, on the CPU.

    It is traced once and kept with the body, which does not change.

    Raises:
        MlirError: an op cannot be traced; names the op, the body and the line of the model's source.
    """
    kept = vars(body).setdefault("_mlir_traces", {})
    if known not in kept:
        kept[known] = _trace(body, name, known)
    return kept[known]  # type: ignore[no-any-return]


def _trace(body: Body, name: str, known: Sizes) -> fx.GraphModule:
    inputs = inputs_of(body)

    def run(*given: Any) -> list[Any]:
        values = {(i.kind, i.name): value for i, value in zip(inputs, given, strict=True)}
        values |= {("env", "training"): False, ("env", "device"): torch.device("cpu")}
        return _interpret(body, [values[i.kind, i.name] for i in body.inputs], name)

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    given = examples(inputs, mode, known)
    with mode:
        return trace_function(run, given)


def inputs_of(body: Body) -> list[Input]:
    """The inputs of a body in the order in which its function takes them."""
    return [*body.inputs_of("value"), *body.inputs_of("param"), *body.inputs_of("const")]


def trace_function(run: Callable[..., list[Any]], given: Sequence[Any]) -> fx.GraphModule:
    """A function of fake tensors and symbolic numbers as a graph of ops that MLIR knows."""
    with torch.no_grad(), traceback.preserve_node_meta():
        made = traced_again(
            lambda table: make_fx(run, decomposition_table=table, pre_dispatch=True, _allow_non_fake_inputs=True)(
                *given
            )
        )
    made.graph.eliminate_dead_code()
    return made


def traced_again(make: Callable[[dict[Any, Any]], fx.GraphModule]) -> fx.GraphModule:
    """What `make` traces with a table of decompositions, made again until no op is left that is to be decomposed."""
    while True:
        made = make(decompositions())
        if not learn(made.graph):
            return made


def examples(inputs: Sequence[Input], mode: FakeTensorMode, known: Sizes) -> list[Any]:
    """Fake inputs of symbolic sizes; numbers are symbols as well."""
    names = sorted({n for i in inputs if isinstance(i.type, Type) for n in i.type.size_names()})
    numbers = [f"{i.name} {n}" for n, i in enumerate(inputs) if i.type == INT]
    symbols = size_symbols(known.hints(names) | dict.fromkeys(numbers, 7), mode)

    def example(number: int, given: Input) -> Any:
        if isinstance(given.type, Type):
            return torch.empty([sizes.evaluate(s, symbols) for s in given.type.shape], dtype=given.type.dtype)
        return symbols[f"{given.name} {number}"] if given.type == INT else _number(f"{given.name}_{number}", mode)

    with mode:
        return [example(number, given) for number, given in enumerate(inputs)]


def _number(name: str, mode: FakeTensorMode) -> Any:
    """A symbolic floating-point number."""
    source, environment, hint = ConstantSource(name), mode.shape_env, 0.618
    assert environment is not None
    symbol = environment.create_unspecified_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    return environment.create_symfloatnode(symbol, hint=hint, source=source)


def _interpret(body: Body, inputs: Sequence[Any], name: str) -> list[Any]:
    """As `depthc.ir.body.interpret`, with the source of every op on what is traced."""
    values: dict[fx.Node, Any] = dict(zip(body.placeholders, inputs, strict=True))
    for node in body.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        file, line = place_of(node)
        traceback.set_stack_trace([f'File "{file}", line {line}, in {name}\n'])
        try:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # whatever torch raises, it is about this op
            raise no_form(node, name, error) from error
    return [values[node] for node in body.results]


def place_of(node: fx.Node) -> tuple[str, int]:
    """File and line of the model's source that made an op; its own name and 0 where that is not known."""
    found = re.match(r"(.*):(\d+) \(", source_of(node))
    return (found[1], int(found[2])) if found else (node.name, 0)


def no_form(node: fx.Node, body: str, reason: object) -> MlirError:
    """The error of an op without an MLIR form."""
    return MlirError(
        f"the op {node.target} has no MLIR form",
        where=", ".join(filter(None, (f"body {body!r}", f"{node.name}", source_of(node)))),
        found=next(iter(str(reason).strip().splitlines()), type(reason).__name__),
        remedy="write this line of the model with other ops",
    )
