"""Incremental evaluation: a prompt, then further tokens, with caches derived from the attention ports.

Values fall into three kinds. *Fixed* ones do not depend on arguments that grow (an encoder's states): they are
computed once. *Full* ones lie before the layers (embeddings, masks, rotary tables): they are computed anew at every
step, at full length. *Row* ones are the layers' and what follows them: only the rows of the new tokens are computed,
by `depthc.ir.rows.run.run_rows`, with keys and values from the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, fx

from depthc.ir import sizes
from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.ports import ports_of
from depthc.ir.body import Body
from depthc.ir.continuation import extended
from depthc.ir.errors import IncrementalError, InputError, SubsetError
from depthc.ir.evaluate import Evaluator, WeightParams, indexed
from depthc.ir.masks.masks import masks_of
from depthc.ir.program import Block, Call, Kv, Loop, Op, Program, Segment, Stack, calls
from depthc.ir.rows.run import Cache, run_rows
from depthc.ir.signature import bind, device_of, unbind

Kind = Literal["fixed", "full", "rows"]


@dataclass(frozen=True, eq=False)
class Past:
    """What later tokens need of earlier ones. Immutable: a step returns a new one, so a past can be forked.

    Attributes:
        length: tokens so far.
        arguments: the model's arguments so far, by parameter name, at full length.
        fixed: values that no later token changes.
        caches: what the attention ports of every application keep, by call site and loop indices.
        stream: the first layer's input so far; later tokens must not change it.
    """

    length: int
    arguments: Mapping[str, Any]
    fixed: Mapping[str, Any]
    caches: Mapping[str, tuple[Cache | None, ...]]
    stream: Tensor | None = None

    @property
    def cache_bytes(self) -> int:
        """Bytes that the attention ports keep."""
        tensors = [t for ports in self.caches.values() for cache in ports for t in cache or ()]
        return sum(t.numel() * t.element_size() for t in tensors)


def start(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Past]:
    """Evaluate a prompt: the outputs at all its tokens, and the past.

    Raises:
        IncrementalError: later tokens would change earlier ones (not causal), or a block has a state that is not an
            attention cache; says which and where.
        InputError: arguments that were not captured.
    """
    plan = plan_of(program)
    arguments = bind(program.signature.parameters, args, kwargs)
    return _advance(program, plan, Past(0, arguments, {}, {}))


def step(program: Program, past: Past, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Past]:
    """Evaluate further tokens: the outputs at these tokens, and the new past.

    Args:
        past: of `start` or an earlier step.
        args, kwargs: the arguments that grow with the tokens (token ids, masks), for the new tokens only. A mask over
            queries and keys has a row a new token and a column a token so far.

    Raises:
        IncrementalError: an argument that grows is missing, or one that does not was given.
    """
    plan = plan_of(program)
    given = bind(program.signature.parameters, args, kwargs)
    arguments = dict(past.arguments)
    for name in plan.growing:
        if name in arguments and given.get(name) is None:
            raise IncrementalError(
                f"argument {name!r} grows with the tokens and is missing",
                expected=", ".join(n for n in plan.growing if n in arguments),
                found=", ".join(given),
                remedy=f"pass the part of {name!r} that belongs to the new tokens",
            )
    for name, value in given.items():
        if name not in plan.growing:
            raise IncrementalError(
                f"argument {name!r} does not grow with the tokens",
                expected=", ".join(plan.growing),
                found=name,
                remedy="pass it to start() alone",
            )
        arguments[name] = extended(arguments[name], value, plan.growing[name])
    return _advance(program, plan, replace(past, arguments=arguments))


@dataclass(frozen=True, eq=False)
class Plan:
    """How a program is evaluated token by token.

    Attributes:
        token: the size name that grows.
        growing: for every argument that grows, the growing dimensions of each of its leaves.
        kinds: of every value that the program's body writes, and of the arguments.
    """

    token: str
    growing: Mapping[str, tuple[tuple[int, ...], ...]]
    kinds: Mapping[str, Kind]


def plan_of(program: Program) -> Plan:
    """How to evaluate a program token by token; made once a program.

    Raises:
        IncrementalError: it cannot be.
    """
    if "_plan" not in program.__dict__:
        program.__dict__["_plan"] = _make_plan(program)
    return program.__dict__["_plan"]  # type: ignore[no-any-return]


def _make_plan(program: Program) -> Plan:
    token = _token_size(program)
    growing: dict[str, tuple[tuple[int, ...], ...]] = {}
    kinds: dict[str, Kind] = {}
    leaves = iter(program.signature.inputs)
    for name, spec in zip(program.signature.in_spec.context, program.signature.in_spec.children(), strict=True):
        own = [next(leaves) for _ in range(spec.num_leaves)]
        dims = tuple(tuple(d for d, s in enumerate(leaf.type.shape) if s == token) if leaf.type else () for leaf in own)
        kinds.update((leaf.name, "full" if where else "fixed") for leaf, where in zip(own, dims, strict=True))
        if any(dims):
            growing[name] = dims
    for item in program.body:
        _add_kinds(program, item, kinds)
    _require_causal(program, kinds)
    for output in program.signature.outputs:
        if isinstance(output, str) and kinds[output] == "full":
            raise IncrementalError(
                f"output {output!r} is computed before the layers, from all tokens at once",
                expected="outputs that the layers compute token by token",
                remedy="capture the model without this output (hidden states, masks)",
            )
    return Plan(token, growing, kinds)


def _token_size(program: Program) -> str:
    call = next((call for stack in reversed(program.stacks) for call, _ in calls(stack.ops)), None)
    if call is None:
        raise IncrementalError("the program has no layers", remedy="evaluate the whole sequence with run()")
    block = program.blocks[call.block]
    dim = _token_dim(block)
    size = block.body.inputs_of("value")[0].type.shape[dim]  # type: ignore[union-attr]
    if not isinstance(size, str) or not size.isidentifier():
        raise IncrementalError(
            f"the program was captured at a fixed length ({size})",
            expected="a token axis of any length",
            remedy="capture with an example whose length may vary; a loop over the length in the model's code fixes it",
        )
    return size


def _token_dim(block: Block) -> int:
    """The dimension of the carry that holds the tokens."""
    axes = analyse(block)
    label = axes.labels[block.body.placeholders_of("value")[0]]
    dims = [d for d, dim in enumerate(label) if dim == (axes.token,)]
    if not dims:
        raise IncrementalError(
            f"what flows through block {block.name!r} has no token axis",
            expected="a batch of sequences",
            found=str(block.body.inputs_of("value")[0].type),
            remedy="capture with arguments of a batch and a length above 1",
        )
    return dims[0]


def _add_kinds(program: Program, item: Segment | Stack, kinds: dict[str, Kind]) -> None:
    ops = item.ops if isinstance(item, Stack) else (item,)
    for op in _flat(ops):
        if isinstance(op, Call) and op.kv:
            raise IncrementalError(
                f"a call of {op.block!r} has a key/value plan, which has no incremental form yet",
                expected="calls that keep their own keys and values",
                remedy="evaluate the whole sequence with run()",
            )
        found = _kinds_of(op, kinds)
        if "rows" in found:
            _require_rows(_as_block(program, op, kinds), op, kinds)
        kinds.update(zip(op.writes, found, strict=True))


def _kinds_of(op: Segment | Call, kinds: Mapping[str, Kind]) -> tuple[Kind, ...]:
    """The kinds of what an op writes, from those of what it reads."""
    read = [kinds[name] for name in op.reads]
    if isinstance(op, Call):
        kind: Kind = "fixed" if set(read) <= {"fixed"} else "rows"
        return (kind,) * len(op.writes)
    order: list[Kind] = ["fixed", "full", "rows"]
    reach = _inputs_behind(op.body) if "rows" not in read else [range(len(read))] * len(op.writes)
    return tuple(max((read[i] for i in inputs), key=order.index, default="fixed") for inputs in reach)


@lru_cache(maxsize=256)
def _inputs_behind(body: Body) -> tuple[frozenset[int], ...]:
    """For every result of a body, the value inputs that it depends on."""
    reach: dict[fx.Node, frozenset[int]] = {n: frozenset([i]) for i, n in enumerate(body.placeholders_of("value"))}
    for node in body.nodes:
        reach[node] = frozenset().union(*(reach.get(n, frozenset()) for n in node.all_input_nodes))
    return tuple(reach.get(n, frozenset()) for n in body.results)


def _flat(ops: Sequence[Op]) -> Iterator[Segment | Call]:
    for op in ops:
        if isinstance(op, Segment | Call):
            yield op
        elif isinstance(op, Loop):
            yield from _flat(op.body)
        else:
            raise IncrementalError(
                f"{type(op).__name__.lower()} has no incremental form yet", remedy="evaluate the whole sequence"
            )


def _as_block(program: Program, op: Segment | Call, kinds: Mapping[str, Kind]) -> Block:
    """What runs on rows: a call's block, or a segment behind the layers with its row values as carries."""
    return program.blocks[op.block] if isinstance(op, Call) else _segment_block(op, tuple(kinds[r] for r in op.reads))


@lru_cache(maxsize=256)
def _segment_block(segment: Segment, kinds: tuple[Kind, ...]) -> Block:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    values = segment.body.placeholders_of("value")
    rows = [n for n, kind in zip(values, kinds, strict=True) if kind == "rows"]
    others = [n for n in segment.body.placeholders if n not in rows]
    for node in [*rows, *others, *segment.body.nodes]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in segment.body.results))
    return Block(segment.name, Body(graph), len(rows))


def _require_rows(block: Block, op: Segment | Call, kinds: Mapping[str, Kind]) -> None:
    try:
        analyse(block).require_legal()
    except SubsetError as error:
        raise IncrementalError(
            f"{block.name!r} keeps a state that is not an attention cache: {error.what}",
            where=error.where,
            expected="token-wise ops and attention",
            found=error.found,
            remedy="evaluate the whole sequence with run()",
        ) from error
    sides = [r for r in op.reads[block.carries :] if kinds[r] == "rows"] if isinstance(op, Call) else []
    if sides:
        raise IncrementalError(
            f"{block.name!r} reads {sides[0]!r}, which another layer computes token by token",
            expected="side inputs from before the layers",
            remedy="evaluate the whole sequence with run()",
        )


def _require_causal(program: Program, kinds: Mapping[str, Kind]) -> None:
    masks = masks_of(program)
    for stack in program.stacks:
        for call, _ in calls(stack.ops):
            if kinds[call.writes[0]] != "rows":
                continue
            block = program.blocks[call.block]
            for index, port in enumerate(ports_of(block)):
                mask = masks[call][index]
                if not port.cross and not mask.causal:
                    raise IncrementalError(
                        f"attention {index} of {block.name!r} is not causal: its mask is {mask}",
                        where=str(port.exits[0].meta.get("source", "")),
                        expected="a mask under which no token sees a later one",
                        found=str(mask),
                        remedy="evaluate the whole sequence with run()",
                    )


# one step


def _advance(program: Program, plan: Plan, past: Past) -> tuple[Any, Past]:
    if False not in program.modes:
        raise InputError("the program was captured in train mode only", remedy="capture the model again in eval mode")
    tensors = program.signature.flatten(*unbind(program.signature.parameters, past.arguments))
    length = program.signature.size_values(tensors)[plan.token]
    step = _Step(program, plan, past, tensors, length)
    for item in program.body:
        step.ops(item.ops if isinstance(item, Stack) else (item,), item.name, {})
    fixed = {name: value for name, value in step.values.items() if plan.kinds.get(name) == "fixed"}
    outputs = program.signature.unflatten(step.values)
    return outputs, Past(length, past.arguments, fixed, step.caches, step.stream)


class _Step:
    """The evaluation of the tokens from `past.length` up to `length`."""

    def __init__(self, program: Program, plan: Plan, past: Past, tensors: Mapping[str, Tensor], length: int) -> None:
        self.program, self.plan, self.past, self.length = program, plan, past, length
        device = device_of(tensors)
        self.evaluator = Evaluator(program, WeightParams(program), device)
        self.values: dict[str, Any] = {**past.fixed, **tensors}
        self.kinds: dict[str, Kind] = {leaf.name: plan.kinds[leaf.name] for leaf in program.signature.inputs}
        self.caches: dict[str, tuple[Cache | None, ...]] = {}
        self.stream: Tensor | None = None
        self.positions = torch.arange(past.length, length, device=device)[None]
        self.before = torch.arange(past.length, device=device)[None]

    def ops(self, ops: Sequence[Op], site: str, indices: Mapping[str, int]) -> None:
        for number, op in enumerate(ops):
            if isinstance(op, Loop):
                for index in range(sizes.evaluate(op.count, indices)):
                    self.ops(op.body, f"{site}.{number}[{index}]", {**indices, op.index: index})
            elif isinstance(op, Segment | Call):
                self.apply(op, f"{site}.{number}", indices)

    def apply(self, op: Segment | Call, site: str, indices: Mapping[str, int]) -> None:
        found = _kinds_of(op, self.kinds)
        if "rows" in found:
            self.rows(op, site, indices)
        elif "full" in found or not self.past.length:
            self.evaluator.apply(op, self.values, indices)
        self.kinds.update(zip(op.writes, found, strict=True))

    def rows(self, op: Segment | Call, site: str, indices: Mapping[str, int]) -> None:
        """Run a block, or a segment behind the layers, on the new tokens."""
        block = _as_block(self.program, op, self.kinds)
        if isinstance(op, Call):
            carried, sides = op.reads[: block.carries], op.reads[block.carries :]
        else:
            carried = tuple(r for r in op.reads if self.kinds[r] == "rows")
            sides = tuple(r for r in op.reads if r not in carried)
        ports = ports_of(block)
        caches = self.past.caches.get(site, (None,) * len(ports))
        plans = [Kv("read" if p.cross and c is not None else "store") for p, c in zip(ports, caches, strict=True)]
        results, kept = run_rows(
            block,
            [self._rows_of(r, block) for r in carried],
            [self.values[r] for r in sides],
            [self.evaluator.param(indexed(p, indices)) for p in op.params],
            op.consts if isinstance(op, Call) else (),
            positions=self.positions,
            key_positions=self.before,
            kv=plans,
            caches=caches,
            ordered=True,
            length=self.length,
            device=self.evaluator.device,
        )
        self.values.update(zip(op.writes, results, strict=True))
        if ports:
            self.caches[site] = kept

    def _rows_of(self, name: str, block: Block) -> Tensor:
        """The rows of the new tokens; where the layers begin they are cut from the full value."""
        value: Tensor = self.values[name]
        if self.kinds[name] == "rows":
            return value
        dim = _token_dim(block)
        if self.past.stream is not None:
            _require_unchanged(self.past.stream, value.narrow(dim, 0, self.past.length))
        self.stream = value
        return value.narrow(dim, self.past.length, self.length - self.past.length)


def _require_unchanged(old: Tensor, new: Tensor) -> None:
    if not torch.allclose(old, new, rtol=1e-3, atol=1e-5):
        raise IncrementalError(
            "later tokens changed what earlier ones feed into the layers",
            expected="a part before the layers in which no token depends on a later one",
            found=f"a change of {(old - new).abs().max().item():.3g}",
            remedy="evaluate the whole sequence with run()",
        )
