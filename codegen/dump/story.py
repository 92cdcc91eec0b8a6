"""The story: what a recipe did to a model, in a few sentences that follow from the two programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from depthc.codegen.dump.parts import Bracket, Cell, Part, Region, Strip, Tower, parts_of
from depthc.codegen.dump.sets import Sets
from depthc.codegen.dump.words import TIMES, counted, listed
from depthc.ir.cost.layers import applications
from depthc.ir.program import Program, Stack

NAMED = 12  # labels in a sentence


def story(before: Program, after: Program, sets: Sets) -> str:
    """What happened to the layers.

    Example:
        >>> import torch, depthc
        >>> from depthc.passes.tie import Tie
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(6)])
        >>> before = depthc.capture(model, (torch.ones(2, 5, 4),))
        >>> after = Tie().apply(before)
        >>> story(before, after, Sets(before, after))
        '6 layers became 3: one group of 3 layers runs 2 times. They begin as layers 0, 2 and 5.'
    """
    towers = [part for part in parts_of(after, sets) if isinstance(part, Tower)]
    said = []
    for old, new, tower in zip(before.stacks, after.stacks, towers, strict=False):
        labels = [_labels(program, stack, sets) for program, stack in ((before, old), (after, new))]
        text = " ".join(_Tower(labels[0], labels[1], tower, old == new).sentences())
        said.append(f"In {new.name}: {text[0].lower()}{text[1:]}" if len(towers) > 1 else text)
    return " ".join(said) or "The program has no layers."


def _labels(program: Program, stack: Stack, sets: Sets) -> list[str]:
    return [sets.of_call(program, call, [indices]).family for call, indices in applications(stack.ops)]


@dataclass(frozen=True)
class _Tower:
    """One stack: the labels of its applications before and after, and its parts."""

    before: Sequence[str]
    after: Sequence[str]
    part: Tower
    same: bool

    def sentences(self) -> Iterator[str]:
        if self.same:
            yield f"All {counted(len(self.before), 'layer')} stay as they are."
            return
        stored = [len(set(labels)) for labels in (self.before, self.after)]
        loops = [part for part in self.part.parts if isinstance(part, Bracket)]
        plain = len(loops) == 1 and not any(_loops(loop.parts) for loop in loops)
        if stored[0] == stored[1] and list(self.before) == list(self.after):
            rolled = ", and what repeats is written as a loop" if loops else ""
            yield f"The {counted(len(self.before), 'layer')} keep their parameters and their order{rolled}."
        elif plain:
            yield f"{counted(stored[0], 'layer')} became {stored[1]}: {self._grouped(loops[0])}."
            yield from self._begin(loops[0])
        else:
            times = {cell.times for cell in _cells(self.part.parts)}
            alike = len(times) == 1 and "" not in times
            how = f"each runs {times.pop()[1:]} times" if alike else f"they are applied {len(self.after)} times in all"
            yield f"{counted(stored[0], 'layer')} became {stored[1]}: {how}."
        yield from self._routes()
        for plan in dict.fromkeys(cell.plan for cell in _cells(self.part.parts) if cell.plan):
            yield f"Keys and values: {plan}."

    def _grouped(self, loop: Bracket) -> str:
        """The one loop, and the layers around it."""
        at = self.part.parts.index(loop)
        first, last = (sum(1 for _ in _cells(parts)) for parts in (self.part.parts[:at], self.part.parts[at + 1 :]))
        size = sum(1 for _ in _cells(loop.parts))
        group = f"one {'layer' if size == 1 else f'group of {size} layers'} runs {loop.times.removeprefix(TIMES)} times"
        stays = [f"the first {first if first > 1 else ''}".strip()] if first else []
        stays += [f"the last {last if last > 1 else ''}".strip()] if last else []
        if not stays:
            return group
        if self._outer(self.after, first, last) != self._outer(self.before, first, last):
            return f"{group}, with {counted(first, 'layer')} before it and {last} behind"
        verb = "stays" if first + last == 1 else "stay"
        between = len(self.before) - first - last
        place = f"in place of the {between} in between" if first and last else f"in place of the other {between}"
        return f"{listed(stays)} {verb}, and {place} {group}"

    @staticmethod
    def _outer(labels: Sequence[str], first: int, last: int) -> list[str]:
        return [*labels[:first], *labels[len(labels) - last :]]

    def _begin(self, loop: Bracket) -> Iterator[str]:
        labels = [cell.label.rstrip("*") for cell in _cells(loop.parts)]
        if set(labels) <= set(self.before) and len(labels) <= NAMED:
            yield f"{'They begin as layers' if len(labels) > 1 else 'It begins as layer'} {listed(labels)}."

    def _routes(self) -> Iterator[str]:
        found: dict[tuple[str, bool], list[str]] = {}
        for region, looped in _regions(self.part.parts):
            found.setdefault((region.heading, looped), []).extend(cell.label for cell in _cells(region.parts))
        for (heading, looped), labels in found.items():
            layers = list(dict.fromkeys(labels))
            who = f"layer {layers[0]} runs" if len(layers) == 1 else f"layers {listed(layers)} run"
            who = "the group runs" if looped else who
            yield f"Not every token takes part: {who} {heading}; the others stay as they are."
        routed = [cell for cell in _cells(self.part.parts) if cell.rule]
        rules = dict.fromkeys(cell.only for cell in routed)
        if len(rules) == 1:
            yield f"{len(routed)} of the layers run only {next(iter(rules))}; there, other tokens stay as they are."
        elif routed:
            yield f"{len(routed)} of the layers run on some tokens only; there, the others stay as they are."


def _cells(parts: Sequence[Part]) -> Iterator[Cell]:
    """The layers of some parts, without the segments between them."""
    for part in parts:
        if isinstance(part, Strip):
            yield from (cell for cell in part.cells if cell.label)
        elif isinstance(part, Bracket | Region):
            yield from _cells(part.parts)


def _loops(parts: Sequence[Part]) -> bool:
    """Whether something in the parts runs several times."""
    inside = [part.parts for part in parts if isinstance(part, Region)]
    here = any(isinstance(part, Bracket) for part in parts) or any(cell.times for cell in _cells(parts))
    return here or any(map(_loops, inside))


def _regions(parts: Sequence[Part], looped: bool = False) -> Iterator[tuple[Region, bool]]:
    """Every region, and whether it is in a loop."""
    for part in parts:
        if isinstance(part, Region):
            yield part, looped
        if isinstance(part, Bracket | Region):
            yield from _regions(part.parts, looped or isinstance(part, Bracket))
