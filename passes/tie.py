"""tie: layers share parameters (ALBERT, arXiv 1909.11942; RRT, arXiv 2410.20672; MoR, arXiv 2507.10524).

`sharing.py` says which layer becomes which slot, and which layers a slot is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from depthc.ir.names import Names
from depthc.ir.params import Expr, Mean, Param, Ref, Shuffle
from depthc.ir.program import Call, Loop, Op, Program, Segment, Stack
from depthc.passes.base import Pass, text_of
from depthc.passes.layers import layers_of, names_in, stack_of, used_params, with_stack, without_unused_params
from depthc.passes.loop import shortest
from depthc.passes.norms import norm_slots
from depthc.passes.sharing import INITS, SHARINGS, Sharing, cycles, legal_loops


@dataclass(frozen=True)
class Tie(Pass):
    """Share parameters between the layers of a stack, and roll what repeats into a loop.

    Slot k keeps the names of the first layer that uses it; its values come from the layers that `init` says. Everything
    in a layer is tied, norms too.

    Options:
        loops: how often the shared layers are applied; it divides the layers (without the outer ones that are
            kept). For one shared layer, as in ALBERT, as many as there are layers: `loops=0`.
        sharing: "cycle", "sequence", "middle_cycle", "middle_sequence" or "cycle_rev" (recipes: section 1).
        keep: how many layers at the start and at the end stay their own under the middle sharings.
        init: "stepwise", "average", "lower", "upper", "random" (fresh values) or "random_layers".
        round: "" for integer division in "stepwise", "mor" to round as its released code does.
        fit: "" refuses layers that do not divide; "resample" leaves layers out, evenly spread.
        norms: "tied", or "per_depth": vectors that are no bias of a product stay each layer's own.
        stack: name or number; the last one by default.
        name: of the loop's index.
        seed: of "random" and "random_layers".

    Raises:
        RecipeError: the layers do not divide, or two layers of a slot are not the same function of their parameters.

    Example:
        >>> print(Tie(loops=3, sharing="middle_cycle"))
        tie(loops=3, sharing="middle_cycle")
    """

    loops: int = 2
    sharing: str = "cycle"
    keep: tuple[int, int] = (1, 1)
    init: str = "stepwise"
    round: str = ""
    fit: str = ""
    norms: str = "tied"
    stack: int | str | None = None
    name: str = "r"
    seed: int = 0

    def __post_init__(self) -> None:
        self.require_whole("loops", 0)
        self.require_one_of("sharing", SHARINGS)
        self.require_one_of("init", INITS)
        self.require_one_of("round", ("", "mor"))
        self.require_one_of("fit", ("", "resample"))
        self.require_one_of("norms", ("tied", "per_depth"))
        if type(self.keep) is not tuple or len(self.keep) != 2 or any(type(n) is not int or n < 0 for n in self.keep):
            expected, remedy = "two numbers of layers, of the start and of the end", "give for example keep=(1, 1)"
            raise self.refuse("option 'keep'", expected=expected, found=text_of(self.keep), remedy=remedy)

    def apply(self, program: Program) -> Program:
        """The program with fewer parameters."""
        stack = stack_of(self, program, self.stack)
        ops, places = layers_of(self, stack)
        sharing = self._sharing(stack, len(places))
        original: list[Call] = [ops[i] for i in places]  # type: ignore[misc]
        if len(sharing.kept) < len(places):
            ops, places = self._resampled(stack, ops, places, sharing)
        layers: list[Call] = [ops[i] for i in places]  # type: ignore[misc]
        first = self._agree(program, stack, layers, sharing)
        params = dict(program.params)
        for slot, number in enumerate(first):
            wanted = sharing.sources(slot, self.init, self.round, self.seed)
            sources = [_alike(original, i, layers[number]) for i in wanted]
            params.update(self._values(program, layers[number], sources, original, self.seed + slot))
        for place, slot in zip(places, sharing.slots, strict=True):
            ops[place] = self._bound(program, ops[place], layers[first[slot]])  # type: ignore[arg-type]
        unused = program.params.keys() - used_params(program)
        tied = self._rolled(replace(program, params=params), stack, ops, places, sharing)
        return without_unused_params(tied, unused)

    def _sharing(self, stack: Stack, count: int) -> Sharing:
        legal = legal_loops(self.sharing, count, self.keep)
        loops = self.loops or max(legal, default=0)
        if loops not in legal and not (self.fit and loops <= max(legal, default=0)):
            outer = " without the first and the last" if self.keep == (1, 1) else " without those that are kept"
            near = sorted(legal, key=lambda n: (abs(n - loops), n))[:3]
            raise self.refuse(
                f"{loops} loops do not divide the {count} layers of {stack.name!r}"
                f"{outer if self.sharing.startswith('middle') else ''}",
                expected="loops of " + ", ".join(map(str, sorted(near))) if near else "more layers",
                found=f"loops={loops}",
                remedy=f'use loops={near[0]}, or fit="resample"' if near else "use another sharing",
            )
        return Sharing(self.sharing, count, loops, self.keep)

    def _resampled(
        self, stack: Stack, ops: list[Op], places: list[int], sharing: Sharing
    ) -> tuple[list[Op], list[int]]:
        """The ops without the layers that are left out."""
        if any(isinstance(op, Segment) for op in ops):
            remedy = "use loops that divide the layers"
            raise self.refuse(f"layers of {stack.name!r} with ops between them cannot be left out", remedy=remedy)
        return [ops[places[i]] for i in sharing.kept], list(range(len(sharing.kept)))

    def _agree(self, program: Program, stack: Stack, layers: Sequence[Call], sharing: Sharing) -> list[int]:
        """The first layer of every slot; all others of the slot must be the same function of their parameters."""
        first = [sharing.slots.index(slot) for slot in range(sharing.unique)]
        for number, slot in enumerate(sharing.slots):
            differs = difference(program, layers[first[slot]], layers[number])
            if differs:
                raise self.refuse(
                    f"layers {first[slot]} and {number} of {stack.name!r} are to share parameters, but are not the"
                    f" same function of them: {differs}",
                    where=layers[number].layer,
                    expected="layers that agree in all that is no trained parameter",
                    found=f'loops={sharing.loops}, sharing="{sharing.kind}"',
                    remedy=self._remedy(program, stack),
                )
        return first

    def _remedy(self, program: Program, stack: Stack) -> str:
        """Loops under which layers that share agree, of this sharing if there are any."""
        ops, places = layers_of(self, stack)
        layers: list[Call] = [ops[i] for i in places]  # type: ignore[misc]
        own = [
            Sharing(self.sharing, len(layers), n, self.keep) for n in legal_loops(self.sharing, len(layers), self.keep)
        ]
        for way in (*own[1:], *cycles(len(layers))):
            if agree(program, layers, way):
                other = [f"sharing={text_of(way.kind)}"] if way.kind != self.sharing else []
                other += [f"keep={way.keep}"] if any(way.outer) and way.keep != self.keep else []
                return f"use {', '.join([f'loops={way.loops}', *other])}: layers that then share agree"
        return f"leave this stack as it is: under no loops of its {len(layers)} layers do those that share agree"

    def _values(
        self, program: Program, layer: Call, sources: Sequence[Call], layers: Sequence[Call], seed: int
    ) -> dict[str, Param]:
        """The parameters of a slot, under the names of `layer`, with the expressions of their values."""
        own = norm_slots(program.blocks[layer.block]) if self.norms == "per_depth" else frozenset()
        found: dict[str, Param] = {}
        for number, name in enumerate(layer.params):
            param = program.params[name]
            common = all(other.params[number] == name for other in layers if other.block == layer.block)
            if param.kind in ("buffer", "constant") or number in own or common:
                continue
            names = [source.params[number] for source in sources]
            terms: list[Expr] = [program.params[n].expr or Ref(n) for n in names]
            expr = terms[0] if len(set(terms)) == 1 else Mean(tuple(terms))
            if self.init == "random":
                expr = Shuffle(expr, seed)
            found[name] = replace(param, expr=None if expr == Ref(name) else expr)
        return found

    def _bound(self, program: Program, call: Call, first: Call) -> Call:
        """A layer bound to the parameters of its slot's first layer."""
        own = norm_slots(program.blocks[call.block]) if self.norms == "per_depth" else frozenset()
        names = zip(call.params, first.params, strict=True)
        return replace(call, params=tuple(mine if i in own else shared for i, (mine, shared) in enumerate(names)))

    def _rolled(self, program: Program, stack: Stack, ops: list[Op], places: list[int], sharing: Sharing) -> Program:
        """What repeats as a loop, the outer layers outside."""
        start, stop = sharing.outer
        begin, end = places[start] if start else 0, places[-stop] if stop else len(ops)
        if sharing.loops == 1:
            index = Names(names_in(program)).new(self.name)
            inner: tuple[Op, ...] = (Loop(index, 1, tuple(ops[begin:end])),)
        else:
            cycles = sharing.kind.endswith("cycle") and (end - begin) % sharing.loops == 0
            period = (end - begin) // sharing.loops if cycles else 0  # not shorter, where slots are equal as it is
            inner = shortest(program, ops[begin:end], self.name, period)
        return with_stack(program, stack, (*ops[:begin], *inner, *ops[end:]))


def _alike(layers: Sequence[Call], number: int, layer: Call) -> Call:
    """The layer of a number or, if that is another block than `layer`, the nearest that is not: its values fit."""
    fitting = [i for i, other in enumerate(layers) if other.block == layer.block]
    return layers[min(fitting, key=lambda i: abs(i - number))]


def agree(program: Program, layers: Sequence[Call], sharing: Sharing) -> bool:
    """Whether all layers of every slot are the same function of their parameters."""
    slots = sharing.slots
    pairs = ((layers[slots.index(slot)], layer) for slot, layer in zip(slots, layers, strict=True))
    return not any(difference(program, *pair) for pair in pairs)


def difference(program: Program, one: Call, other: Call) -> str:
    """In what two layers differ beside their trained parameters; "" if in nothing."""
    carries = program.blocks[one.block].carries
    if one.block != other.block:
        return f"one is a {one.block}, the other a {other.block}"
    for mine, theirs in zip(one.consts, other.consts, strict=True):
        if mine != theirs:
            return f"a constant is {mine} in one and {theirs} in the other"
    for read, instead in zip(one.reads[carries:], other.reads[carries:], strict=True):
        if read != instead:
            return f"one reads {read!r} where the other reads {instead!r}"
    for a, b in zip(one.params, other.params, strict=True):
        kind = program.params[a].kind
        if a != b and kind in ("buffer", "constant") and not _equal_weights(program, a, b):
            return f"their buffers {a} and {b} differ"
    return ""


def _equal_weights(program: Program, a: str, b: str) -> bool:
    one, other = program.weights.get(a), program.weights.get(b)
    return one is not None and other is not None and not one.is_meta and torch.equal(one, other)
