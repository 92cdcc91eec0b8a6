"""Parameter sets: which applications of blocks read the same tensors, under one label before and after a recipe.

A set of the captured model is called by its place among the sets of its stack: "0", "1". A set of the rewritten model
has the label of the captured one that it is; what is new gets a label of its own and words that say what it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import count, product
from math import prod
from string import ascii_lowercase, ascii_uppercase

from depthc.codegen.dump.words import NO_VALUE, listed
from depthc.codegen.state_map import sources
from depthc.ir.cost.layers import applications, owner_of
from depthc.ir.evaluate import indexed
from depthc.ir.params import Expr, Init, Mean, Ref, Shuffle
from depthc.ir.program import Call, Loop, Program, Segment, Stack
from depthc.ir.text.functions import walk

Tensor = tuple[str, Expr | None]  # the weight of a name, or what a name was made by
MOST_PASSES = 64  # of a loop that are looked at
TRAINED = ("parameter", "frozen")


@dataclass(frozen=True)
class ParamSet:
    """The trained tensors that an application reads.

    Attributes:
        label: equal for equal sets.
        family: the label of the set with which it has more than half of its parameters in common; else its own.
        words: what it is made of; "" for a set of the captured model.
        place: where in depth its values come from, from 0 to 1; None for values from nowhere in the model.
    """

    label: str
    family: str
    words: str = ""
    place: float | None = None


class Sets:
    """Labels the parameter sets of two programs, as they were before and after passes.

    A settled program (`compiled.program`) no longer says what its values are made of: take the stages of a history.

    Example:
        >>> import torch, depthc
        >>> from depthc.passes.tie import Tie
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> before = depthc.capture(model, (torch.ones(2, 5, 4),))
        >>> after = Tie().apply(before)
        >>> sets = Sets(before, after)
        >>> [sets.of_call(after, call, [indices]).label for call, indices in applications(after.stacks[0].ops)]
        ['0', '3', '0', '3']
    """

    def __init__(self, before: Program, after: Program) -> None:
        self._sizes: dict[Tensor, int] = {}
        self._known: dict[frozenset[Tensor], ParamSet] = {}
        self._homes: dict[Tensor, ParamSet] = {}
        self._variants: dict[str, Iterator[str]] = {}
        self._letters = _names(ascii_uppercase)
        self._add_captured(before)
        self.captured = frozenset(self._known.values())
        for stack in after.stacks:
            for call, indices in applications(stack.ops):
                self.of_call(after, call, [indices])
        self._used = {tensor for name in after.params for tensor in _origins(self._tensor(after, name))}
        tied = dict.fromkeys(t for program in (before, after) for t in self._tied(program))
        self._tags = {tensor: f"T{n}" for n, tensor in enumerate(tied, 1)}

    def of_call(self, program: Program, call: Call, passes: Sequence[Mapping[str, int]]) -> ParamSet:
        """The set that a call reads in these passes through the loops around it; "2*" where a part differs by pass."""
        found = list(dict.fromkeys(self._read(program, call, indices) for indices in passes))
        sets = [self._labelled(tensors) for tensors in found]
        first = sets[0]
        if len(sets) == 1:
            return first
        if {one.family for one in sets} == {first.family}:
            own = self._size(found[0] - frozenset.intersection(*found))
            words = f"{own:,} of its parameters are another set in every pass"
            said = "; ".join(filter(None, (self._named(first.family).words, words)))
            return ParamSet(f"{first.family}*", first.family, said, first.place)
        label = f"{first.label}{'/' if len(sets) == 2 else '…'}{sets[-1].label}"
        return ParamSet(label, label, f"another set by pass: {listed([one.label for one in sets])}")

    def kept(self, label: str) -> bool:
        """Whether the rewritten program has more than half of a captured set, or values made from that."""
        tensors = next(tensors for tensors, found in self._known.items() if found.label == label)
        return not tensors or self._size(tensors & self._used) * 2 > self._size(tensors)

    def size(self, program: Program, call: Call, indices: Mapping[str, int]) -> int:
        """The numbers in the trained tensors that a call reads."""
        return self._size(self._read(program, call, indices))

    def tensors(
        self, program: Program, segment: Segment, passes: Sequence[Mapping[str, int]]
    ) -> tuple[tuple[str, str, int], ...]:
        """(tag, name, numbers) of every trained parameter of a segment, the largest first.

        The tag is equal for equal tensors that several parts of the model read, and "" for all others.
        """
        found = []
        for name in segment.params:
            names = {indexed(name, indices): None for indices in passes}
            own = [self._tensor(program, one) for one in names if program.params[one].kind in TRAINED]
            if own:
                found.append((self._tags.get(own[0], ""), name, self._size(set(own))))
        return tuple(sorted(found, key=lambda row: -row[2]))

    def _tied(self, program: Program) -> Iterator[Tensor]:
        """The tensors that a segment reads, and another segment or the layers as well."""
        readers: dict[Tensor, set[str]] = {}
        for op, loops in walk(program.body):
            if isinstance(op, Segment | Call):
                reader = op.name if isinstance(op, Segment) else "layers"
                for name in op.params:
                    plain = indexed(name, dict.fromkeys(loops, 0))
                    if program.params[plain].kind in TRAINED:
                        readers.setdefault(self._tensor(program, plain), set()).add(reader)
        yield from (tensor for tensor, found in readers.items() if len(found) > 1)

    def _add_captured(self, program: Program) -> None:
        """Label the sets of the captured program by their place in their stack."""
        prefixes, groups = _prefixes(program.stacks), []
        for stack, prefix in zip(program.stacks, prefixes, strict=True):
            found = (self._read(program, call, indices) for call, indices in applications(stack.ops))
            groups += [(tensors, f"{prefix}{n}") for n, tensors in enumerate(dict.fromkeys(found))]
        labels: dict[frozenset[Tensor], str] = {}
        for tensors, label in groups:
            if tensors:
                labels.setdefault(tensors, label)
        self._known[frozenset()] = ParamSet(NO_VALUE, NO_VALUE, "no parameters")
        for n, (tensors, label) in enumerate(labels.items()):
            self._keep(tensors, ParamSet(label, label, place=n / max(1, len(labels) - 1)))

    def _keep(self, tensors: frozenset[Tensor], found: ParamSet) -> ParamSet:
        self._known[tensors] = found
        for tensor in tensors:
            self._homes.setdefault(tensor, found)
        return found

    def _named(self, label: str) -> ParamSet:
        return next(found for found in self._known.values() if found.label == label)

    def _read(self, program: Program, call: Call, indices: Mapping[str, int]) -> frozenset[Tensor]:
        names = (indexed(name, indices) for name in call.params)
        return frozenset(self._tensor(program, name) for name in names if program.params[name].kind in TRAINED)

    def _tensor(self, program: Program, name: str) -> Tensor:
        param = program.params[name]
        plain = param.expr is None or isinstance(param.expr, Ref)
        tensor = (owner_of(program, name), None) if plain else (name, param.expr)
        self._sizes[tensor] = prod(param.type.sizes({}))
        return tensor

    def _size(self, tensors: Set[Tensor]) -> int:
        return sum(self._sizes[tensor] for tensor in tensors)

    def _labelled(self, tensors: frozenset[Tensor]) -> ParamSet:
        return self._known[tensors] if tensors in self._known else self._keep(tensors, self._new(tensors))

    def _new(self, tensors: frozenset[Tensor]) -> ParamSet:
        base = self._nearest(tensors)
        if base is not None:
            own = self._size({t for t in tensors if t not in self._homes or self._homes[t].family != base.family})
            letters = self._variants.setdefault(base.family, _names(ascii_lowercase))
            words = f"{base.label}, but for {own:,} parameters"
            return ParamSet(f"{base.family}{next(letters)}", base.family, words, base.place)
        made = [tensor for tensor in sorted(tensors, key=repr) if tensor[1] is not None]
        origins = [origin for tensor in made or tensors for origin in _origins(tensor)]
        homes = {self._homes[origin] for origin in origins if origin in self._homes}
        sources = sorted(homes, key=lambda one: (one.place or 0.0, one.label))
        places = [one.place for one in sources if one.place is not None]
        place = sum(places) / len(places) if places else None
        words = _made_of({type(expr) for _, expr in made}, [one.label for one in sources])
        label = next(self._letters)
        return ParamSet(label, label, words, place)

    def _nearest(self, tensors: frozenset[Tensor]) -> ParamSet | None:
        """The set whose family holds most of the tensors; None where none holds more than half of their numbers."""
        shares: dict[str, int] = {}
        for tensor in tensors:
            if tensor in self._homes:
                family = self._homes[tensor].family
                shares[family] = shares.get(family, 0) + self._sizes[tensor]
        best = max(shares, key=lambda family: (shares[family], family), default=None)
        return self._named(best) if best is not None and shares[best] * 2 > self._size(tensors) else None


def passes_of(loop: Loop) -> int:
    """How many passes of a loop are looked at; one where their number is not static."""
    return min(loop.count, MOST_PASSES) if isinstance(loop.count, int) else 1


def all_passes(loops: Sequence[Loop]) -> list[dict[str, int]]:
    """The indices of every pass through nested loops."""
    ranges = [range(passes_of(loop)) for loop in loops]
    return [dict(zip((loop.index for loop in loops), found, strict=True)) for found in product(*ranges)]


def _origins(tensor: Tensor) -> Iterator[Tensor]:
    """The captured weights that a tensor is, or is made from."""
    name, expr = tensor
    yield from [(name, None)] if expr is None else [(ref, None) for ref in sources(expr)]


def _made_of(kinds: Set[type], sources: Sequence[str]) -> str:
    """What tensors are, whose expressions are of these kinds and read weights of these sets."""
    said = listed(sources)
    if kinds == {Mean}:
        return f"the mean of {said}"
    if kinds == {Shuffle}:
        return f"fresh values, those of {said} in another order"
    if kinds == {Init} or not sources:
        return "new values"
    return f"made of {said}"


def _names(letters: str) -> Iterator[str]:
    """A, B, ..., Z, A1, B1, ... of these letters."""
    for turn in count():
        yield from (f"{letter}{turn or ''}" for letter in letters)


def _prefixes(stacks: Sequence[Stack]) -> list[str]:
    """What labels of a stack begin with: nothing for the only one, else the first letter of its name, or its number."""
    if len(stacks) == 1:
        return [""]
    letters = [stack.name[:1].lower() for stack in stacks]
    plain = len(set(letters)) == len(stacks) and all(letter.isalpha() for letter in letters)
    return letters if plain else [f"{n}." for n in range(len(stacks))]
