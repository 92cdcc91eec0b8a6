"""Side by side: a step of generation whose sections run in any order, or at the same time.

The sections of a step (see `depthc.ir.sections`) read of each other only what was made of earlier tokens, and that is
in the caches. A section runs with those alone; what the new tokens show to other sections is added when all have run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from depthc.ir.axes.caches import cached_of
from depthc.ir.errors import IncrementalError
from depthc.ir.evaluate import as_data, indexed
from depthc.ir.incremental import Past, advance, continued
from depthc.ir.liveness import writes_of
from depthc.ir.masks.masks import masks_of
from depthc.ir.memo import once, once_a_program
from depthc.ir.pieces import Piece, piece_of, up_to
from depthc.ir.plans import plan_of
from depthc.ir.program import Block, Call, Kv, Op, Program, Segment, Stack
from depthc.ir.rows.execution import Cache
from depthc.ir.rows.gather import append_rows
from depthc.ir.sections import Section, inputs_now, lag_of, lagged_ports, sections_of
from depthc.ir.steps import Kept, Steps


def step(
    program: Program, past: Past, args: Sequence[Any], kwargs: Mapping[str, Any], order: Sequence[int] | None = None
) -> tuple[Any, Past]:
    """A step as `Program.step` makes it, section after section in the order given.

    Args:
        past, args, kwargs: as of `Program.step`; no more new tokens than the smallest lag.
        order: the numbers of the last stack's sections; None: as they begin in the program.

    Returns:
        The outputs of the new tokens, and the new past: the same in every order.

    Raises:
        IncrementalError: the layers need each other in a step, or new tokens would see what others of them show.

    Example:
        >>> logits, past = step(program, past, (), {"input_ids": token}, order=(1, 0))  # doctest: +SKIP
    """
    stack, sections = independent(program)
    chosen = list(range(len(sections))) if order is None else list(order)
    if sorted(chosen) != list(range(len(sections))):
        remedy = "name every section once"
        raise IncrementalError(
            "not an order of the sections", expected=f"0 to {len(sections) - 1}", found=str(chosen), remedy=remedy
        )
    return advance(
        program, continued(program, past, args, kwargs), lambda *given: Sections(stack, sections, chosen, *given)
    )


def independent(program: Program) -> tuple[Stack, tuple[Section, ...]]:
    """The last stack, as it is evaluated token by token, and its sections: two or more, made of layers alone.

    Raises:
        IncrementalError: the layers need each other in a step, stand among other ops, or write over one another's
            values.
    """
    return once_a_program(program, "_independent", lambda: _independent(program))


def _independent(program: Program) -> tuple[Stack, tuple[Section, ...]]:
    stack = next(item for item in reversed(plan_of(program).body) if isinstance(item, Stack))
    sections = sections_of(program, stack)
    if len(sections) < 2:
        raise IncrementalError(
            f"the layers of {stack.name!r} cannot run side by side",
            expected="sections that read of each other only what lags behind by a token or more",
            found="layers of which each needs the one before in the same step",
            remedy="use program.step; stacks that are staggered with lag >= 1 and reinject=True have such sections",
        )
    _require_flat(program, stack)
    _require_apart(program, stack, sections)
    return stack, sections


def _require_flat(program: Program, stack: Stack) -> None:
    """Refuse layers among other ops, and a memory that changes behind a layer that reads it."""
    numbers = [n for n, op in enumerate(stack.ops) if isinstance(op, Call)]
    inner = stack.ops[numbers[0] : numbers[-1] + 1] if numbers else stack.ops
    shown: set[str] = set()
    for op in inner:
        made = made_by(program, op) if isinstance(op, Call) else set()
        if not isinstance(op, Call) or made & shown:
            raise IncrementalError(
                f"the sections of {stack.name!r} cannot be taken apart",
                where=getattr(op, "layer", "") or type(op).__name__.lower(),
                expected="layers alone, which read what another section ends with",
                found=f"a change of {', '.join(sorted(made & shown))}" if made else type(op).__name__.lower(),
                remedy="use program.step",
            )
        shown |= {op.reads[i] for i in late_carries(program, op)}
        for port in lagged_ports(program, op):
            shown_by(program.blocks[op.block], port)


def _require_apart(program: Program, stack: Stack, sections: Sequence[Section]) -> None:
    """Refuse sections that write over what another one, or an op in front of the layers, made."""
    seen = {leaf.name for leaf in program.signature.inputs}
    for op in _in_front(plan_of(program).body, stack):
        seen |= writes_of(op)
    for number, section in enumerate(sections):
        made = {name for call in section.calls for name in made_by(program, call)}
        if made & seen:
            raise IncrementalError(
                f"section {number} of {stack.name!r} writes over {', '.join(sorted(made & seen))}",
                expected="a name of its own for what every section makes",
                found="one name for values of two sections, or of one and what stands in front of the layers",
                remedy="rename what the section writes, or use program.step",
            )
        seen |= made


def _in_front(items: Sequence[Segment | Stack], stack: Stack) -> Iterator[Op]:
    """All ops in front of a stack's layers."""
    for item in items:
        for op in item.ops if isinstance(item, Stack) else (item,):
            if item is stack and isinstance(op, Call):
                return
            yield op


def made_by(program: Program, op: Call) -> set[str]:
    """What a layer writes, but for what it hands on as it is."""
    body = program.blocks[op.block].body
    return {name for name, node in zip(op.writes, body.results, strict=True) if node.op != "placeholder"}


def late_carries(program: Program, op: Call) -> set[int]:
    """The carries of a layer of which it reads no new token, by number."""
    block = program.blocks[op.block]
    lagged = lagged_ports(program, op)
    return set(range(block.carries)) - inputs_now(block, lagged)[0] if lagged else set()


class Alone(Steps):
    """Evaluates new tokens layer by layer, each without what layers of other sections make of these tokens.

    When all have run, what the new tokens show to layers of other sections is added to the caches.
    """

    def __init__(self, stack: Stack, *given: Any) -> None:
        super().__init__(*given)
        self.stack = stack
        self.late: dict[str, tuple[int, ...]] = {}  # by place: the ports whose keys are added when all have run

    def ops(self, ops: Sequence[Op], site: str, indices: Mapping[str, int]) -> None:
        """Run ops in order; those of the stack as what stands in front of its layers, the layers, and what follows."""
        if ops is not self.stack.ops:
            super().ops(ops, site, indices)
            return
        places = [n for n, op in enumerate(ops) if isinstance(op, Call)]
        for n in range(places[0]):
            self.op(ops[n], f"{site}.{n}", indices)
        self.layers({f"{site}.{n}": ops[n] for n in places}, indices)  # type: ignore[misc]
        for n in range(places[-1] + 1, len(ops)):
            self.op(ops[n], f"{site}.{n}", indices)

    def layers(self, calls: Mapping[str, Call], indices: Mapping[str, int]) -> None:
        """Run the layers of the stack, given by their places."""
        raise NotImplementedError

    def run_alone(self, op: Call, site: str, indices: Mapping[str, int]) -> None:
        """A layer without the memory of the new tokens: the stream stands in for it, and none of them reads it."""
        block, lagged = self.program.blocks[op.block], lagged_ports(self.program, op)
        if not lagged:
            self.op(op, site, indices)
            return
        self._require_lag(op, lagged)
        self.late[site] = lagged
        late, values = late_carries(self.program, op), block.body.placeholders_of("value")
        passed = [any(result is values[i] for i in late) for result in block.body.results]
        made = [name for name, as_given in zip(op.writes, passed, strict=True) if not as_given]
        outer = self.values, self.kinds
        self.values, self.kinds = ({**of, **{op.reads[i]: of[op.reads[0]] for i in late}} for of in outer)
        self.op(op, site, indices)
        inner = self.values, self.kinds
        self.values, self.kinds = ({**of, **{n: new[n] for n in made}} for of, new in zip(outer, inner, strict=True))

    def _require_lag(self, op: Call, lagged: Sequence[int]) -> None:
        lag = min(lag_of(masks_of(self.program)[op][port]) for port in lagged)
        if self.fresh > lag:
            raise IncrementalError(
                f"{self.fresh} new tokens would see what others of them show",
                where=op.layer or op.block,
                expected=f"{lag} new tokens at most, the lag",
                found=str(self.fresh),
                remedy="use program.step, or give the tokens one by one",
            )

    def _plans(self, op: Segment | Call, block: Block, site: str, indices: Mapping[str, int]) -> tuple[list[Kv], Kept]:
        plans, kept = super()._plans(op, block, site, indices)
        for port in self.late.get(site, ()):
            plans[port] = Kv("read", "")
        return plans, kept

    def show(self, op: Call, site: str, indices: Mapping[str, int]) -> None:
        """Add what the new tokens show to a layer of another section."""
        block, now = self.program.blocks[op.block], self.caches.get(site)
        if now is None:  # it has no attention
            return
        caches = list(now.caches)
        for number in self.late.get(site, ()):
            rows = self.shown(op, number, indices)
            old: Cache = caches[number] or ()
            pairs = zip(old, rows, cached_of(block)[number], strict=True)
            caches[number] = tuple(append_rows(a, b, cached.dim) for a, b, cached in pairs)
        keys, here = now.keys, self._positions(None)
        if keys.count < self.length:  # none of the layer's own ports has added the new tokens
            keys = keys.followed_by(here, here.index(self.device).shape[0], self.device)
        self.caches[site] = Kept(tuple(caches), keys)
        self._forget(op, block, site)

    def shown(self, op: Call, number: int, indices: Mapping[str, int]) -> Cache:
        """What one port of a layer keeps of the new tokens."""
        piece = shown_by(self.program.blocks[op.block], number)
        sides = [as_data(self.values[op.reads[i]]) for i in piece.values]
        return self.run_piece(piece, op, self.params_of(piece, op, indices), [self.memory_of(op, piece)], sides)

    def memory_of(self, op: Call, piece: Piece) -> Tensor:
        """The new tokens' rows of the state that `shown_by` says a layer is shown."""
        block = self.program.blocks[op.block]
        return self._rows_of(op.reads[block.body.placeholders_of("value").index(piece.takes[0])], block)

    def params_of(self, piece: Piece, op: Call, indices: Mapping[str, int]) -> list[Tensor]:
        """The parameters of a piece of a layer."""
        return [self.evaluator.param(indexed(op.params[i], indices)) for i in piece.params]

    def run_piece(
        self,
        piece: Piece,
        op: Call,
        params: Sequence[Any],
        states: Sequence[Tensor],
        sides: Sequence[Any],
        plans: Sequence[Kv] = (),
        kept: Kept | None = None,
    ) -> tuple[Tensor, ...]:
        """What a piece of a layer makes of the new tokens."""
        consts = [op.consts[i] for i in piece.consts]
        return self.run_block(piece.block, states, sides, params, consts, self._positions(None), plans, kept)[0]


class Sections(Alone):
    """Evaluates new tokens section by section."""

    def __init__(self, stack: Stack, sections: Sequence[Section], order: Sequence[int], *given: Any) -> None:
        super().__init__(stack, *given)
        self.sections, self.order = sections, order

    def layers(self, calls: Mapping[str, Call], indices: Mapping[str, int]) -> None:
        """Run the layers, then add what the new tokens show to the caches."""
        sites = list(calls)
        parts = [[sites[at] for at in self.sections[number].numbers] for number in self.order]
        for site in (site for part in parts for site in part):
            self.run_alone(calls[site], site, indices)
        for site, call in calls.items():
            self.show(call, site, indices)


def shown_by(block: Block, port: int) -> Piece:
    """What one port of a block keeps of a state."""
    return once(block, "shown", lambda: _make_shown(block, port), port)


def _make_shown(block: Block, port: int) -> Piece:
    wanted, carries = [c.node for c in cached_of(block)[port]], block.body.placeholders_of("value")[: block.carries]
    needed = up_to(block, wanted, {*carries})
    states = [n for n in carries if n in needed]
    if len(states) != 1:
        raise IncrementalError(
            f"the keys of attention {port} are made of {len(states)} states",
            where=block.name,
            expected="one state, that of another section",
            found=", ".join(n.meta["input"].name for n in states) or "none",
            remedy="use program.step",
        )
    return piece_of(block, "shown", states, wanted)
