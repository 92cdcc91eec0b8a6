"""Sections: the applications of a stack that one token needs one after another, and those that need nothing of them.

Within a step, generation's work for one token, an application depends on what other applications make of that token.
An attention under whose mask no token sees its own key takes no part in that: what comes in through its keys alone was
made in earlier steps. Sections are what is connected in a step; they may run at the same time. All of it is derived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from depthc.ir import sizes
from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.ops import operands
from depthc.ir.axes.ports import ports_of
from depthc.ir.body import reached
from depthc.ir.liveness import reads_of, writes_of
from depthc.ir.masks.masks import Mask, masks_of
from depthc.ir.memo import once
from depthc.ir.program import Block, Call, Loop, On, Op, Program, Stack


@dataclass(frozen=True)
class Section:
    """Applications that one token passes one after another.

    Attributes:
        calls: they, in order; of a loop one an iteration.
        numbers: their places among all applications of the stack.
    """

    calls: tuple[Call, ...]
    numbers: tuple[int, ...]

    @property
    def depth(self) -> int:
        """How many there are."""
        return len(self.calls)


def sections_of(program: Program, stack: Stack) -> tuple[Section, ...]:
    """The sections of a stack in the order in which they begin; one, where nothing lags behind.

    Example:
        >>> import torch, depthc
        >>> from torch.nn.functional import scaled_dot_product_attention
        >>> class Layer(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv, self.o = torch.nn.Linear(4, 12), torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        ...         return x + self.o(scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        >>> model = torch.nn.Sequential(*[Layer() for _ in range(4)])
        >>> for lag in (1, 0):
        ...     program = depthc.compile(model, "stagformer", args=(torch.ones(2, 5, 4),), lag=lag).program
        ...     print([section.depth for section in sections_of(program, program.stacks[0])])
        [2, 2]
        [4]
    """
    kept: dict[int, tuple[Stack, tuple[Section, ...]]] = program.__dict__.setdefault("_sections", {})
    if id(stack) not in kept:
        kept[id(stack)] = stack, _sections(program, stack)
    return kept[id(stack)][1]


def _sections(program: Program, stack: Stack) -> tuple[Section, ...]:
    walk = _Walk(program)
    walk.ops(stack.ops, {}, {})
    groups: dict[int, list[int]] = {}
    for number in range(len(walk.calls)):
        groups.setdefault(walk.root(number), []).append(number)
    return tuple(Section(tuple(walk.calls[n] for n in numbers), tuple(numbers)) for numbers in groups.values())


def lag_of(mask: Mask) -> int:
    """How many tokens the newest key that a query sees is behind it, whatever the arguments are; 0 if it is not.

    Example:
        >>> from depthc.ir.masks.factors import Factor
        >>> lag_of(Mask((Factor("span", (None, -2)),))), lag_of(Mask((Factor("causal"),)))
        (2, 0)
    """
    highs = [factor.of[1] for factor in mask.factors if factor.kind == "span" and factor.of[1] is not None]
    return max([0, *(-high for high in highs)])


def lagged_ports(program: Program, call: Call) -> tuple[int, ...]:
    """The ports of an application whose keys are all of earlier tokens than the query."""
    ports, masks = ports_of(program.blocks[call.block]), masks_of(program)[call]
    return tuple(i for i, port in enumerate(ports) if not port.cross and lag_of(masks[i]))


def inputs_now(block: Block, lagged: Sequence[int]) -> list[frozenset[int]]:
    """For every result of a block, the value inputs of which it needs the token's own row.

    Args:
        lagged: the ports whose keys are of earlier tokens.
    """
    return once(block, "inputs now", lambda: _inputs_now(block, lagged), *lagged)


def _inputs_now(block: Block, lagged: Sequence[int]) -> list[frozenset[int]]:
    ports = ports_of(block)
    edges = {edge for number in lagged for edge in ports[number].key_edges}
    values = {node: i for i, node in enumerate(block.body.placeholders_of("value"))}
    labels = analyse(block).labels

    def data(node: fx.Node) -> list[fx.Node]:
        read = (source for slot, source in operands(node) if (node, slot) not in edges)
        return [source for source in read if isinstance(labels.get(source), tuple | list)]

    needed = (reached([result], data) for result in block.body.results)
    return [frozenset(values[node] for node in nodes if node in values) for nodes in needed]


class _Walk:
    """Connects applications by what they need in a step.

    Attributes:
        calls: the applications in order.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.calls: list[Call] = []
        self.slots: dict[str, int] = {}
        self._parents: list[int] = []

    def root(self, number: int) -> int:
        """The first application of the section."""
        while self._parents[number] != number:
            number = self._parents[number]
        return number

    def _join(self, numbers: frozenset[int]) -> None:
        roots = sorted({self.root(n) for n in numbers})
        for other in roots[1:]:
            self._parents[other] = roots[0]

    def ops(self, ops: Sequence[Op], made: dict[str, frozenset[int]], indices: Mapping[str, int]) -> None:
        """Run ops over the applications that every value was made by."""
        for op in ops:
            match op:
                case Call():
                    self._call(op, made)
                case Loop():
                    count = op.count if isinstance(op.count, int) else 2  # what is carried meets itself
                    for index in range(sizes.evaluate(count, indices)):
                        self.ops(op.body, made, {**indices, op.index: index})
                case On():
                    inner = {name: made.get(name, frozenset()) | made.get(op.tokens, frozenset()) for name in op.reads}
                    self.ops(op.body, inner, indices)
                    made.update((name, inner[name]) for name in op.writes)
                case _:
                    read = frozenset().union(*(made.get(name, frozenset()) for name in reads_of(op)))
                    made.update(dict.fromkeys(writes_of(op), read))

    def _call(self, op: Call, made: dict[str, frozenset[int]]) -> None:
        block, number = self.program.blocks[op.block], len(self.calls)
        self.calls.append(op)
        self._parents.append(number)
        lagged = lagged_ports(self.program, op) if block.carries > 1 else ()
        values, written = block.body.placeholders_of("value"), dict[str, frozenset[int]]()
        for name, result, needed in zip(op.writes, block.body.results, inputs_now(block, lagged), strict=True):
            before = frozenset().union(*(made.get(op.reads[i], frozenset()) for i in needed))
            if result not in values:  # it is computed here
                before |= {number}
                self._join(before)
            written[name] = before
        for plan in op.kv:
            if plan.slot:  # keys of the token itself, that another application made
                self._join(frozenset({number, self.slots.setdefault(plan.slot, number)}))
        made.update(written)
