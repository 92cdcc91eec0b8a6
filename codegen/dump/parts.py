"""Parts: what a picture of a program shows, in order and nested as it is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from depthc.codegen.dump.sets import Sets, all_passes
from depthc.codegen.dump.words import TIMES, Scope, brief, chosen, counted, inferred, planned
from depthc.ir.cost.layers import applications
from depthc.ir.liveness import reads_of, without_taps
from depthc.ir.program import Call, Loop, Merge, On, Op, Program, Segment, Select, Stack, Tap, calls
from depthc.ir.text.functions import walk

FEW = 2  # so many regions or loops of one layer are drawn as such; more are marks on the layers of a strip
MOST_PARTS = 12  # in a row, before the middle is left out


@dataclass(frozen=True)
class Cell:
    """One layer: a small box with the label of its parameter set.

    `made` says what a set of the rewritten program consists of; `kept` is False where that program has no more than
    half of the layer. `rule` says in a few letters on which tokens it runs, `only` in words, and `times` how often in
    a row. A cell without a label is a segment between layers.
    """

    label: str
    words: str
    made: str = ""
    place: float | None = None
    rule: str = ""
    only: str = ""
    times: str = ""
    plan: str = ""
    grad: str = ""
    kept: bool = True


@dataclass(frozen=True)
class Strip:
    """Layers in a row, and remarks about them."""

    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Box:
    """A segment, or several in a row.

    `tensors` are its trained parameters, the largest first: (tag, name, how many numbers).
    """

    name: str
    tensors: tuple[tuple[str, str, int], ...] = ()


@dataclass(frozen=True)
class Bracket:
    """A loop."""

    times: str
    heading: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Region:
    """Parts that run on some tokens only."""

    heading: str
    notes: tuple[str, ...]
    parts: tuple[Part, ...]
    footing: str


@dataclass(frozen=True)
class Remark:
    """A line of its own."""

    text: str


Part = Strip | Box | Bracket | Region | Remark


@dataclass(frozen=True)
class Tower:
    """A stack."""

    name: str
    summary: str
    parts: tuple[Part, ...]
    notes: tuple[str, ...]


def parts_of(program: Program, sets: Sets) -> tuple[Box | Tower, ...]:
    """What to draw of a program, one part an item of its body.

    Losses, and what else only taps read, are no part of it. A decision (the segments that make the score of a
    selection and nothing else) is said in the words of the region that it opens.
    """
    live = without_taps(program)
    reader = _Reader(live, sets)
    towers = {stack.name: stack for stack in program.stacks}
    return tuple(
        reader.tower(item, towers[item.name]) if isinstance(item, Stack) else reader.box(item, Scope())
        for item in live.body
    )


class _Reader:
    def __init__(self, program: Program, sets: Sets) -> None:
        self.program, self.sets = program, sets
        self.decisions = _decisions(program)

    def tower(self, live: Stack, stack: Stack) -> Tower:
        blocks = [call.block for call, _ in calls(stack.ops)]
        sides: dict[str, None] = {}
        for call, _ in calls(stack.ops):
            sides.update(dict.fromkeys(call.reads[self.program.blocks[call.block].carries :]))
        found = [self.sets.of_call(self.program, call, [indices]) for call, indices in applications(stack.ops)]
        summary = f"{counted(stack.depth, 'layer')} applied, {len({one.family for one in found})} stored"
        notes = [f"layers: {', '.join(dict.fromkeys(blocks))}"]
        notes += [f"they also read {', '.join(sides)}"] if sides else []
        return Tower(stack.name, summary, self.parts(live.ops, Scope()), (*notes, *_taps(stack.ops)))

    def parts(self, ops: Sequence[Op], scope: Scope) -> tuple[Part, ...]:
        """Parts of some ops, with layers in a row as strips."""
        marks = {kind: sum(_single(op, kind) for op in ops) > FEW for kind in (Loop, On)}
        glue = sum(kind is Segment for kind, _ in groupby(map(type, filter(self.drawn, ops)))) > FEW
        found: list[Part | Cell] = []
        for number, op in enumerate(ops):
            match op:
                case Select():
                    scope = replace(scope, sets={**scope.sets, op.write: op})
                case Segment():
                    scope = replace(scope, makers={**scope.makers, **dict.fromkeys(op.writes, op.name)})
                    if id(op) not in self.decisions:
                        found.append(Cell("", f"segment {op.name}") if glue else self.box(op, scope))
                case Call():
                    found.append(self.cell(op, scope))
                case Loop():
                    found.append(self.loop(op, scope, marks[Loop] and _single(op, Loop)))
                case On():
                    found.append(self.on(op, scope, _merge_of(op, ops[number + 1 :]), marks[On] and _single(op, On)))
                case Merge(tokens=tokens) if not any(isinstance(o, On) and o.tokens == tokens for o in ops):
                    found.append(Remark(_footing(op)))
        return _shortened(_joined(found))

    def drawn(self, op: Op) -> bool:
        """Whether an op has a part of its own."""
        return not isinstance(op, Select) and id(op) not in self.decisions

    def loop(self, op: Loop, scope: Scope, mark: bool) -> Part | Cell:
        inner = scope.inside(op)
        if mark:
            (cell,) = (self.cell(inside, inner) for inside in op.body if isinstance(inside, Call))
            return replace(cell, times=f"{TIMES}{op.count}")
        until = f", or until {op.until} in inference" if op.until else ""
        return Bracket(f"{TIMES}{op.count}", f"{op.index} = 0 … {_last(op)}{until}", self.parts(op.body, inner))

    def on(self, op: On, scope: Scope, merge: Merge | None, mark: bool) -> Part | Cell:
        select = scope.sets.get(op.tokens)
        if select is None:
            return Region(f"on the tokens of {op.tokens}", (), self.parts(op.body, scope), _footing(merge))
        training, inference = chosen(select, scope), inferred(select, scope)
        if mark:
            (cell,) = (self.cell(inside, scope) for inside in op.body if isinstance(inside, Call))
            rest = f" (in inference: {inference})" if inference else ""
            return replace(cell, rule=brief(select, scope), only=f"on {training}{rest}")
        notes = (f"in inference: {inference}",) if inference else ()
        return Region(f"on {training}", notes, self.parts(op.body, scope), _footing(merge))

    def box(self, op: Segment, scope: Scope) -> Box:
        return Box(op.name, self.sets.tensors(self.program, op, all_passes(scope.loops)))

    def cell(self, op: Call, scope: Scope) -> Cell:
        passes = all_passes(scope.loops)
        found = self.sets.of_call(self.program, op, passes)
        size = self.sets.size(self.program, op, passes[0])
        words = f"{op.layer or op.block}: parameter set {found.label}, {size:,} parameters"
        kept = found not in self.sets.captured or self.sets.kept(found.label)
        plan = planned(op.kv)
        return Cell(found.label, words, found.words, found.place, plan=plan, grad=op.grad or "", kept=kept)


def _decisions(program: Program) -> set[int]:
    """The segments (by identity) that only selections and merges read, or other such segments."""
    readers: dict[str, list[Op]] = {}
    for op, _ in walk(program.body):
        if not isinstance(op, Loop):
            for name in reads_of(op):
                readers.setdefault(name, []).append(op)
    segments = [op for op, _ in walk(program.body) if isinstance(op, Segment)]
    outputs = {name for name in program.signature.outputs if isinstance(name, str)}
    found: set[int] = set()
    while True:
        more = {
            id(op)
            for op in segments
            if id(op) not in found
            and outputs.isdisjoint(op.writes)
            and all(_decides(name, reader, found) for name in op.writes for reader in readers.get(name, ()))
        }
        if not more:
            return found
        found |= more


def _decides(name: str, reader: Op, decisions: set[int]) -> bool:
    if isinstance(reader, Merge):
        return name in reader.extra and name not in (reader.read, reader.value)
    return isinstance(reader, Select) or id(reader) in decisions


def _single(op: Op, kind: type) -> bool:
    """Whether an op is a loop (or a region) around one layer."""
    body = op.body if isinstance(op, Loop | On) else ()
    return isinstance(op, kind) and len(body) == 1 and isinstance(body[0], Call)


def _merge_of(op: On, later: Sequence[Op]) -> Merge | None:
    return next((o for o in later if isinstance(o, Merge) and o.tokens == op.tokens and o.value in op.writes), None)


def _footing(merge: Merge | None) -> str:
    if merge is None:
        return ""
    if merge.over is not None:
        return f"their rows go into {merge.write} of all tokens of {merge.over}, up to the next one of {merge.tokens}"
    if merge.combine is None:
        return f"their rows go back into {merge.write}; other tokens stay as they are"
    extra = "".join(f", {name}" for name in merge.extra)
    return f"{merge.write} = combine({merge.read}, {merge.value}{extra}) for them; other tokens stay as they are"


def _last(op: Loop) -> str:
    return str(op.count - 1) if isinstance(op.count, int) else f"{op.count} - 1"


def _joined(found: Sequence[Part | Cell]) -> list[Part]:
    """Cells in a row as one strip, segments in a row as one box."""
    parts: list[Part] = []
    for kind, group in groupby(found, key=lambda part: type(part)):
        members = list(group)
        if kind is Cell:
            parts.append(_strip(members))  # type: ignore[arg-type]
        elif kind is Box:
            names = " → ".join(box.name for box in members)  # type: ignore[union-attr]
            parts.append(Box(names, tuple(t for box in members for t in box.tensors)))  # type: ignore[union-attr]
        else:
            parts += members  # type: ignore[arg-type]
    return parts


def _strip(cells: Sequence[Cell]) -> Strip:
    notes = [f"keys and values: {words}" for words in dict.fromkeys(c.plan for c in cells) if words]
    notes += [f"gradients flow where {grad}" for grad in dict.fromkeys(c.grad for c in cells) if grad]
    return Strip(tuple(cells), (*notes, *_routed(cells)))


def _routed(cells: Sequence[Cell]) -> Iterator[str]:
    """One remark a rule; many rules are left to the marks of the cells."""
    rules = dict.fromkeys(c.only for c in cells if c.rule)
    if len(rules) == 1:
        yield f"dashed: only {next(iter(rules))}; other tokens stay as they are"
    elif rules:
        yield "dashed: only on as many tokens as the box says; other tokens stay as they are"


def _shortened(parts: Sequence[Part]) -> tuple[Part, ...]:
    if len(parts) <= MOST_PARTS:
        return tuple(parts)
    left = len(parts) - MOST_PARTS + 2
    half = MOST_PARTS // 2 - 1
    return (
        *parts[:half],
        Remark(f"… {counted(left, 'part')} more, in the program's text below …"),
        *parts[half + left :],
    )


def _taps(ops: Sequence[Op]) -> list[str]:
    """One line that says what is exposed, with the numbers in its names left out."""
    groups: dict[str, dict[str, None]] = {}
    for op, _ in walk(tuple(ops)):
        if isinstance(op, Tap):
            *head, name = [part for part in op.name.split(".") if not part.isdigit() and "{" not in part] or [op.name]
            groups.setdefault(".".join(head), {})[name] = None
    said = [f"{head} ({', '.join(names)})" if head else ", ".join(names) for head, names in groups.items()]
    return [f"tapped: {'; '.join(said)}"] if said else []
