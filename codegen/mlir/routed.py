"""Routing in native code: token sets as masks, and the functions that select, gather and write back.

What they compute is traced from the definitions in `depthc.ir`: `choose` of a rule, `take` and `put` of a token set,
`run_rows` of a block. A region runs on as many rows as the fullest batch row has members, and on one at least;
batch rows with fewer are filled up with other tokens, whose results are not written back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from depthc.codegen.rows import Way, trace_rows
from depthc.ir import sizes
from depthc.ir.body import Input
from depthc.ir.errors import MlirError
from depthc.ir.memo import once
from depthc.ir.mlir.functions import Functions
from depthc.ir.mlir.rules import texts
from depthc.ir.mlir.trace import Sizes, trace_function, traced_again
from depthc.ir.mlir.types import ROW_DIMS, TensorType, dtype_of
from depthc.ir.program import Block
from depthc.ir.selection import choose, read_rule
from depthc.ir.tokens import TokenSet
from depthc.ir.types import Type

if TYPE_CHECKING:
    from depthc.codegen.mlir.lower import Lowering, Scope

# Sizes to trace at; equal ones are one symbol. All tokens, the rows of a set, and other unknown sizes differ.
_BATCH, _TOKENS, _ROWS, _OTHERS = 3, 19, 7, (23, 29, 31, 37, 41, 43)
_OPERANDS = ("score", "judge", "among", "of", "within")


class Routed:
    """Lowers selections, regions and merges; makes each function that they call once."""

    def __init__(self, lowering: Lowering) -> None:
        self.to, self._made = lowering, dict[Any, Any]()
        self._functions, self._sizes = Functions(lowering.target), Sizes.of(lowering.program.signature)

    # ops

    def select(self, op: Any, scope: Scope, indices: dict[str, int]) -> list[Any]:
        """The mask of the tokens that the rule of inference selects."""
        present = [name for name, there in zip(_OPERANDS, op.attributes["operandSegmentSizes"], strict=True) if there]
        given = dict(zip(present, op.operands, strict=True))
        judge = given.pop("judge", None)
        if judge is not None:
            given["score"] = judge
        name, number = read_rule(op.attributes["inference" if "inference" in op.attributes else "rule"].value, indices)
        types = [_loose(value.type) for value in given.values()]

        def run(*tensors: Tensor) -> list[Any]:
            found = dict(zip(given, tensors, strict=True))
            everyone = torch.ones(tensors[0].shape[:2], dtype=torch.bool)
            among, of = (TokenSet(found[key]) if key in found else None for key in ("among", "of"))
            chosen = choose(name, number, found.get("score"), among or TokenSet(everyone), of, found.get("within"))
            return [chosen.mask]

        function = self._function(("select", name, number, *given, *types), run, [(t, _TOKENS) for t in types])
        return self.to.call(function, scope.read(list(given.values())))

    def on(self, op: Any, scope: Scope, indices: dict[str, int]) -> list[Any]:
        """A region on the rows of a set."""
        tokens, *packed = op.operands
        positions, valid = self._rows(tokens, scope)
        inner, block = scope.inner(), op.regions[0].blocks[0]
        for argument, value, rows in zip(block.arguments, scope.read(packed), op.attributes["gathered"], strict=True):
            inner.values[argument] = [self._take(argument.type, value, positions) if rows.value else value]
        (mask,) = scope.values[tokens]
        *ops, last = [each.operation for each in block.operations]
        for each in ops:
            if each.name == "depth.call":
                self.to.bind(each, self._apply(each, inner, indices, positions, valid, mask), inner)
            else:
                self.to.one(each, inner, indices)
        return inner.read(last.operands)

    def merge(self, op: Any, scope: Scope, indices: dict[str, int]) -> list[Any]:
        """The stream with the rows of a set replaced."""
        stream, rows, tokens, *packed = op.operands
        positions, valid = self._rows(tokens, scope)
        (old,), (new,) = scope.values[stream], scope.values[rows]
        if "combine" in op.attributes:
            function = self.to.functions[op.attributes["combine"].value]
            inputs = function.attributes["function_type"].value.inputs
            extra = zip(inputs[2:], scope.read(packed), strict=False)
            taken = [self._take(type, value, positions) for type, value in ((inputs[0], old), *extra)]
            params = [self.to.param(text, indices) for text in texts(op, "params")]
            (new,) = self.to.call(function, [taken[0], new, *taken[1:], *params])
        return self._put(op.results[0].type, old, new, positions, valid)

    # rows

    def _rows(self, tokens: Any, scope: Scope) -> tuple[Any, Any]:
        """Positions and validity [batch, rows] of the rows of a set, found once where it is in scope."""
        if tokens not in scope.rows:

            def run(mask: Tensor) -> list[Any]:
                count: Any = mask.sum(1).max().clamp(min=1).item()
                torch._check(count >= 1)  # type: ignore[no-untyped-call]
                torch._check(count <= mask.shape[1])  # type: ignore[no-untyped-call]
                found = TokenSet(mask, most=count)
                return [found.positions, found.valid]

            function = self._function(("rows",), run, [(_loose(tokens.type), _TOKENS)])
            positions, valid = self.to.call(function, scope.values[tokens])
            scope.rows[tokens] = positions, valid
        return scope.rows[tokens]

    def _take(self, type: Any, stream: Any, positions: Any) -> Any:
        """The rows of a stream."""
        loose, places = _loose(type), TensorType((None, None), "si64")

        def run(stream: Tensor, positions: Tensor) -> list[Any]:
            return [_set_of(positions).take(stream)]

        function = self._function(("take", loose), run, [(loose, _TOKENS), (places, _ROWS)])
        return self.to.call(function, [stream, positions])[0]

    def _put(self, type: Any, *operands: Any) -> list[Any]:
        """A stream with rows replaced where they are valid."""
        loose, places, truths = _loose(type), TensorType((None, None), "si64"), TensorType((None, None), "i1")

        def run(stream: Tensor, rows: Tensor, positions: Tensor, valid: Tensor) -> list[Any]:
            return [_set_of(positions, valid).put(stream, rows)]

        types = [(loose, _TOKENS), (loose, _ROWS), (places, _ROWS), (truths, _ROWS)]
        return self.to.call(self._function(("put", loose), run, types), operands)

    def _apply(
        self, op: Any, scope: Scope, indices: dict[str, int], positions: Any, valid: Any, mask: Any
    ) -> list[Any]:
        """A block on rows: the graph of `run_rows`."""
        self.to.refuse_plans(op)
        consts = tuple(n.value for n in op.attributes["consts"]) if "consts" in op.attributes else ()
        name = op.attributes["callee"].value
        key = ("block", name, consts)
        if key not in self._made:
            block = self.to.blocks[name]
            made = once(block, "rows in mlir", lambda: self._trace_block(block, consts), consts, self._sizes)
            self._made[key] = self._functions.add(made, f"{name}_on_rows_{len(self._made)}")
            self.to.publish(self._made[key])
        params = [self.to.param(text, indices) for text in texts(op, "params")]
        ruler = self._ruler(mask, self._made[key], len(scope.read(op.operands)) + len(params))
        return self.to.call(self._made[key], [*scope.read(op.operands), *params, ruler, positions, valid])

    def _ruler(self, mask: Any, function: Any, place: int) -> Any:
        """A tensor without elements, as long as there are tokens: how a graph is told a size."""
        ir = self.to.ir
        index, type = ir.IndexType.get(), self.to.type(function.attributes["function_type"].value.inputs[place])
        one = self.to.op("arith.constant", [], index, {"value": ir.IntegerAttr.get(index, 1)})
        return self.to.op("tensor.empty", [self.to.op("tensor.dim", [mask, one], index)], type)

    def _trace_block(self, block: Block, consts: tuple[float, ...]) -> Any:
        """`run_rows` of a block with fresh keys, as a graph of its carries, sides, parameters, the ruler, and rows."""
        values = block.body.inputs_of("value")
        names = {n for i in values if isinstance(i.type, Type) for n in i.type.size_names()}
        known = self._sizes.hints(sorted(names))
        carries = [_stretched(i, known, rows=True) for i in values[: block.carries]]
        tensors: dict[str, Any] = {
            "carries": tuple(carries),
            "sides": tuple(_stretched(i, known) for i in values[block.carries :]),
            "params": tuple(_stretched(i, known) for i in block.body.inputs_of("param")),
            "ruler": carries[0].new_empty((_TOKENS, 0)),
            "caches": (),
            "slots": None,
            "positions": torch.zeros(_BATCH, _ROWS, dtype=torch.int64),
            "valid": torch.zeros(_BATCH, _ROWS, dtype=torch.bool),
            "key_positions": None,
            "key_valid": None,
        }
        way = Way(block, consts, (), None, True, (), False, torch.device("cpu"), None, None)
        made = traced_again(lambda table: trace_rows(way, tensors, table)[0])
        output = next(n for n in reversed(made.graph.nodes) if n.op == "output")
        output.args = (output.args[0][: len(block.body.results)],)  # not what a cache would keep
        made.graph.eliminate_dead_code()
        return made

    def _function(self, key: Any, run: Callable[..., list[Any]], types: Sequence[tuple[TensorType, int]]) -> Any:
        """A traced function of tensors of some types, whose second dimension has so many tokens; made once."""
        if key not in self._made:
            mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
            fakes = [_fake(type, tokens, mode) for type, tokens in types]
            with mode:
                made = trace_function(run, fakes)
            self._made[key] = self._functions.add(made, f"{key[0]}_rule_{len(self._made)}")
            self.to.publish(self._made[key])
        return self._made[key]


def _loose(type: Any) -> TensorType:
    """The type of a stream or its rows, at any batch and length."""
    found = TensorType.read(type)
    assert found is not None, "the rules of the dialect ask for tensors"
    return found.loosened(ROW_DIMS)


def _fake(type: TensorType, tokens: int, mode: FakeTensorMode) -> Tensor:
    """A fake tensor; unknown sizes are symbols, the batch and the tokens the same ones everywhere."""
    shape = [size if size is not None else (_BATCH, tokens, *_OTHERS)[d] for d, size in enumerate(type.shape)]
    kinds = [DimDynamic.DUCK if size is None else DimDynamic.STATIC for size in type.shape]
    tensor = torch.zeros(shape, dtype=dtype_of(type.dtype))
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


def _stretched(given: Input, known: Mapping[str, int], rows: bool = False) -> Tensor:
    """A tensor of an input's type that takes no memory; `rows` of a stream."""
    type = given.type
    if not isinstance(type, Type):
        raise MlirError("a block that reads a number has no native form on some tokens", found=given.name)
    shape = [sizes.evaluate(size, known) for size in type.shape]
    if rows:
        shape[:2] = _BATCH, _ROWS
    return torch.zeros((), dtype=type.dtype).expand(shape)


def _set_of(positions: Tensor, valid: Tensor | None = None) -> TokenSet:
    """A token set by its rows alone."""
    tokens = TokenSet(torch.empty(0, dtype=torch.bool))
    tokens.found.update(positions=positions, valid=valid, width=positions.shape[1])
    return tokens
