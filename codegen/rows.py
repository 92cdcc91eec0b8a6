"""Rows lowering: a block on a subset of its tokens as one FX graph.

`run_rows` decides in Python what every op is told. Those decisions depend on what is given (positions, validity,
caches) and on dtypes, not on data or sizes. So it is traced once for every combination of them, with symbolic sizes,
and from then on the graph runs: it is faster, and torch.compile takes it like any body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from depthc.codegen.functions import with_own_code
from depthc.codegen.over_sections import Parts, PerSection, over_sections
from depthc.ir import sizes
from depthc.ir.axes.analysis import analyse, batch_dim
from depthc.ir.axes.caches import Cached, cached_of
from depthc.ir.axes.ports import ports_of
from depthc.ir.program import Block, Kv
from depthc.ir.rows.execution import Cache
from depthc.ir.rows.fitting import Attend
from depthc.ir.rows.rings import Rings
from depthc.ir.rows.run import prepare, run_rows
from depthc.ir.sizes import Size
from depthc.ir.types import Type

# Sizes to trace at. They are all different, so that no two dimensions become one by chance.
_BATCH, _ROWS, _KEYS, _MEMBERS, _OTHERS = 3, 7, 13, 53, (19, 23, 29, 31, 37, 41, 43)

_ROW_SIZES = {"positions": _ROWS, "valid": _ROWS, "key_positions": _KEYS, "key_valid": _KEYS}

_SEVERAL = (PerSection, Parts)  # leaves that are several tensors

Arguments = dict[str, Any]


class RowsLowering:
    """`run_rows` with a graph for every way in which it is called; the same arguments and results.

    Args:
        compile: applied to every graph's function.
        attend: see `depthc.ir.rows.fitting.Attend`.
    """

    def __init__(
        self,
        compile: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
        attend: Attend | None = None,
    ) -> None:
        self.compile, self.attend = compile, attend
        self._make = torch.compiler.disable(self._made)  # Dynamo sees the graphs, not how they come about
        self._graphs: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self,
        block: Block,
        carries: Sequence[Tensor | Parts],
        sides: Sequence[Any],
        params: Sequence[Tensor | PerSection],
        consts: Sequence[float],
        *,
        kv: Sequence[Kv],
        caches: Sequence[Cache | None],
        length: int | None,
        ordered: bool,
        causal: Sequence[bool],
        training: bool,
        device: torch.device,
        rings: Rings | None = None,
        bounded: bool = False,
        **rows: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Cache | None, ...]]:
        """See `depthc.ir.rows.run.run_rows`; parameters may be `PerSection` and rows `Parts`, of the batch of all."""
        one = carries[0][0] if isinstance(carries[0], Parts) else carries[0]
        ruler = None if length is None else one.new_empty((length, 0))  # a size that is passed as a tensor
        tensors: Arguments = {"carries": tuple(carries), "sides": tuple(sides), "params": tuple(params)}
        tensors |= {"ruler": ruler, "caches": tuple(caches), "slots": rows.get("slots")}
        tensors |= {name: rows.get(name) for name in _ROW_SIZES}
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        way = Way(
            block,
            tuple(consts),
            tuple([plan.mode for plan in kv]),
            rings,
            ordered,
            tuple(causal),
            training,
            device,
            cast,
            self.attend,
            bounded,
        )
        leaves = pytree.tree_leaves(tensors)
        key = (block.body.certificate, block.carries, *way.options, _structure(tensors), tuple(map(_kind, leaves)))
        if key not in self._graphs:
            self._graphs[key] = self._make(way, tensors)
        given = [x for leaf in leaves for x in (leaf if isinstance(leaf, _SEVERAL) else (leaf,))]
        return self._graphs[key](*[x for x in given if isinstance(x, Tensor)])  # type: ignore[no-any-return]

    def _made(self, way: Way, tensors: Arguments) -> Callable[..., Any]:
        return self.compile(_trace(way, tensors))


def _structure(tensors: Arguments) -> tuple[Any, ...]:
    """How many tensors of each kind there are: what tells calls with the same leaves apart."""
    caches = tuple([None if cache is None else len(cache) for cache in tensors["caches"]])
    return len(tensors["carries"]), len(tensors["sides"]), len(tensors["params"]), caches


def _kind(leaf: Any) -> Any:
    """What of a leaf a graph depends on: whether it is there, its dtype, and which of its sizes are 1."""
    if isinstance(leaf, _SEVERAL):
        return tuple([_kind(own) for own in leaf])
    return (leaf.dtype, *(size == 1 for size in leaf.shape)) if isinstance(leaf, Tensor) else leaf


@dataclass(frozen=True)
class Way:
    """How a block is called, its tensors aside."""

    block: Block
    consts: tuple[float, ...]
    modes: tuple[str, ...]
    rings: Rings | None
    ordered: bool
    causal: tuple[bool, ...]
    training: bool
    device: torch.device
    cast: torch.dtype | None  # of autocast, if that is on
    attend: Attend | None
    bounded: bool = False

    @property
    def options(self) -> tuple[Any, ...]:
        modes = self.modes, self.rings, self.ordered, self.causal, self.training, self.bounded
        return self.consts, *modes, str(self.device), self.cast

    def autocast(self) -> torch.autocast:
        """The autocast that the graph will run under: ops are recorded before its casts, but see their dtypes."""
        on = self.cast is not None
        return torch.autocast(self.device.type, self.cast, enabled=on, cache_enabled=False)  # no fakes in its cache

    @property
    def plans(self) -> list[Kv]:
        return [Kv(mode, "" if mode == "fresh" else "slot") for mode in self.modes]  # type: ignore[arg-type]

    def run(self, tensors: Arguments) -> Any:
        given = dict(tensors)
        ruler = given.pop("ruler")
        return run_rows(
            self.block,
            consts=self.consts,
            kv=self.plans,
            length=None if ruler is None else ruler.shape[0],
            rings=self.rings,
            ordered=self.ordered,
            causal=self.causal,
            attend=self.attend,
            bounded=self.bounded,
            training=self.training,
            device=self.device,
            **given,
        )


def _trace(way: Way, tensors: Arguments) -> Callable[..., Any]:
    """The function of one way to call `run_rows`, from its tensors in order."""
    leaves = pytree.tree_leaves(tensors)
    own = [len(x) if isinstance(x, _SEVERAL) else 0 for x in leaves if isinstance(x, (Tensor, *_SEVERAL))]
    made, shape = trace_rows(way, _whole(way.block, tensors) if any(own) else tensors)
    graph = over_sections(made.graph, own, _batch_of(way.block, made.graph)) if any(own) else made.graph
    forward = fx.GraphModule(nn.Module(), graph).forward

    def lowered(*given: Tensor) -> Any:
        return pytree.tree_unflatten(forward(*given), shape)

    return with_own_code(lowered)


def _whole(block: Block, tensors: Arguments) -> Arguments:
    """The rows of all sections, and the parameters of the first one."""
    rows = [torch.cat(x, batch_dim(block)) if isinstance(x, Parts) else x for x in tensors["carries"]]
    params = [x[0] if isinstance(x, PerSection) else x for x in tensors["params"]]
    return tensors | {"carries": tuple(rows), "params": tuple(params)}


def _batch_of(block: Block, graph: fx.Graph) -> SymInt:
    """The size of the batch in a graph of `trace_rows`: that of its first carry."""
    return next(iter(graph.nodes)).meta["val"].shape[batch_dim(block)]  # type: ignore[no-any-return]


def trace_rows(
    way: Way, tensors: Arguments, decompositions: Mapping[Any, Callable[..., Any]] | None = None
) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    """One way to call `run_rows` as a graph of its tensors in order, and the structure of what it returns."""
    prepare(way.block, way.plans, tensors["caches"])  # analyses run on real tensors
    leaves, spec = pytree.tree_flatten(tensors)
    shapes: list[pytree.TreeSpec] = []

    def run(*given: Tensor) -> list[Any]:
        feed = iter(given)
        restored = [next(feed) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        flat, shape = pytree.tree_flatten(way.run(pytree.tree_unflatten(restored, spec)))
        shapes.append(shape)
        return flat

    examples = pytree.tree_leaves(_Examples(way, tensors).all())
    graph = traced(run, [example for example in examples if example is not None], way.autocast(), decompositions)
    graph.eliminate_dead_code()
    return fx.GraphModule(nn.Module(), graph), shapes[-1]


def traced(
    run: Callable[..., Any],
    examples: Sequence[Example],
    context: AbstractContextManager[Any] | None = None,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> fx.Graph:
    """The ops that a function of tensors runs, as autograd will see them; its sizes are symbols."""
    table = dict(decompositions or {})
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        fakes = [example.fake(mode) for example in examples]
        with torch.no_grad(), context or nullcontext():
            made = make_fx(run, decomposition_table=table, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    return made.graph


@dataclass(frozen=True)
class Example:
    """A tensor to trace with; the sizes in `dims` are symbols, equal ones the same symbol."""

    tensor: Tensor
    dims: tuple[int, ...] = ()

    def fake(self, mode: FakeTensorMode) -> Tensor:
        kinds = [DimDynamic.DUCK if d in self.dims else DimDynamic.STATIC for d in range(self.tensor.dim())]
        return mode.from_tensor(self.tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


def _hints(names: Sequence[str], wanted: Set[Size]) -> dict[str, int]:
    """Sizes of the names; larger where those derived of them would be too small: samples of audio make few tokens."""
    bases = dict(zip(names, _OTHERS, strict=False))
    ways = [{"b": _BATCH, **{name: scale * size for name, size in bases.items()}} for scale in (1, 8, 64, 512)]
    return next((way for way in ways if all(sizes.evaluate(size, way) > 1 for size in wanted)), ways[0])


def _keys_of(port: int) -> int:
    return _KEYS + 1009 * port  # another prime


def _apart(block: Block) -> dict[int, int]:
    """The sizes of rows to trace at; others where the block has fixed sizes like that, such as a number of patches."""
    types = [i.type for kind in ("value", "param") for i in block.body.inputs_of(kind)]
    fixed = {size for type in types if isinstance(type, Type) for size in type.shape if isinstance(size, int)}
    wanted = (_ROWS, _MEMBERS, *map(_keys_of, range(len(ports_of(block)))), _KEYS)
    steps = range(0, 97 * (len(fixed) + 1), 97)  # a prime: sizes that differ stay apart
    return {size: next(size + n for n in steps if size + n not in fixed) for size in wanted}


class _Examples:
    """Examples for the tensors of a real call, in their structure: sizes that may vary are replaced by chosen ones."""

    def __init__(self, way: Way, tensors: Arguments) -> None:
        self.block = block = way.block
        self.tensors, self.rings, self.axes = tensors, way.rings, analyse(block)
        self.inputs = block.body.inputs_of("value")
        names = sorted({n for i in self.inputs if isinstance(i.type, Type) for n in i.type.size_names()} - {"b"})
        self.hints = _hints(names, {size for size, now in self._sizes() if now != 1})
        label = self.axes.labels[block.body.placeholders_of("value")[0]]
        self.token_dim = label.index((self.axes.token,))
        self.length = self.inputs[0].type.shape[self.token_dim]  # type: ignore[union-attr]
        self.apart = _apart(block)
        packed = tensors["slots"] is not None
        self.batch = tensors["positions"].shape[0] if packed else tensors["carries"][0].shape[batch_dim(block)]
        self.rows = self._length
        if packed or tensors["positions"] is not None:
            self.rows = self.apart[_MEMBERS if packed else _ROWS]

    def _sizes(self) -> Iterator[tuple[Size, int]]:
        """Every size of the inputs that is an expression, with what it is in the call."""
        for i, tensor in zip(self.inputs, (*self.tensors["carries"], *self.tensors["sides"]), strict=True):
            if isinstance(i.type, Type):
                yield from ((s, n) for s, n in zip(i.type.shape, tensor.shape, strict=True) if isinstance(s, str))

    def all(self) -> Arguments:
        """The examples."""
        given = self.tensors
        carries, sides = self.inputs[: self.block.carries], self.inputs[self.block.carries :]
        ruler = given["ruler"]
        return {
            "carries": tuple(self._carry(i.type, t) for i, t in zip(carries, given["carries"], strict=True)),
            "sides": tuple(self._value(i.type, t, {}) for i, t in zip(sides, given["sides"], strict=True)),
            "params": tuple(Example(t.detach()) for t in given["params"]),
            "ruler": None if ruler is None else Example(ruler.new_empty((self._length, 0)), (0,)),
            "caches": tuple(self._cache(port, cache) for port, cache in enumerate(given["caches"])),
            "slots": None if given["slots"] is None else self._made(given["slots"], {0: self.rows}),
            **{name: self._rows(given[name], count) for name, count in _ROW_SIZES.items()},
        }

    @property
    def _length(self) -> int:
        return sizes.evaluate(self.length, self.hints)

    def _carry(self, type: Any, tensor: Tensor) -> Example:
        return self._value(type, tensor, {self.token_dim: self.rows})

    def _value(self, type: Any, tensor: Tensor, known: dict[int, int]) -> Example:
        """An example of a body's input; `known` are sizes that are not those of its type."""
        wanted = {d: sizes.evaluate(s, self.hints) for d, s in enumerate(type.shape) if isinstance(s, str)} | known
        return self._made(tensor, wanted)

    def _made(self, tensor: Tensor, wanted: Mapping[int, int]) -> Example:
        dims = tuple(d for d in wanted if tensor.shape[d] != 1)
        shape = [wanted[d] if d in dims else size for d, size in enumerate(tensor.shape)]
        return Example(torch.zeros(shape, dtype=tensor.dtype, device=tensor.device), dims)

    def _rows(self, tensor: Any, count: int) -> Any:
        return None if tensor is None else self._made(tensor, {0: _BATCH, 1: self.apart[count]})

    def _cache(self, port: int, cache: Cache | None) -> tuple[Example, ...] | None:
        if cache is None:
            return None
        return tuple(self._cached(port, c, t) for c, t in zip(cached_of(self.block)[port], cache, strict=True))

    def _cached(self, port: int, cached: Cached, tensor: Tensor) -> Example:
        """An example of a cached tensor: its batch and its keys may be merged with other dimensions."""
        names = {size: name for name, size in self.axes.probe.sizes.items()}
        axis = ports_of(self.block)[port].axis
        if axis.kind != "key":
            keys = self.hints.get(names.get(axis.size, ""), axis.size)
        elif self.rings is not None:
            keys = self.apart[_keys_of(port)]
        else:
            keys = self._length if self.tensors["key_positions"] is None else self.apart[_KEYS]
        wanted: dict[int, int] = {}
        for d, dim in enumerate(cached.label):
            factor = 1
            for atom in dim:
                here = {self.axes.batch: _BATCH if self.batch > 1 else 1, self.axes.token: keys, axis: keys}.get(atom)
                factor *= atom.size if here is None else here
            if d in (cached.batch, cached.dim):
                wanted[d] = factor
        return self._made(tensor, wanted)
