"""Causality shown: that a mask is causality and no more, whatever weights, arguments, mode and chance.

`masks_of` says what a mask does today, for people and for kernels that still read it. Whoever drops a mask needs more.
It is shown that the mask is made of sizes and numbers alone, and that it is the lower triangle, entry for entry, at a
short length and at one above all of those numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.ops import argument, op_name
from depthc.ir.axes.ports import Port, ports_of
from depthc.ir.masks.cones import Choice, Evaluation, Site, Unknown, inside, sites_of
from depthc.ir.memo import once_a_program
from depthc.ir.program import Block, Loop, Program
from depthc.ir.text.functions import walk

SHORT, LONGEST = 37, 2048  # where a mask is looked at, and the longest that is worth a look
_BATCH = 2
_ENDLESS = 1e8  # numbers above are "up to the end", or stand for minus infinity


class Causality:
    """What can be shown of the masks of a program; looked at once a program by `Causality.of`."""

    @classmethod
    def of(cls, program: Program) -> Causality:
        """What can be shown of a program's masks."""
        return once_a_program(program, "_causality", lambda: cls(program))

    def __init__(self, program: Program) -> None:
        self.program, self.sites, self.choice = program, sites_of(program), Choice(program)
        self._shown: dict[tuple[object, ...], bool] = {}
        self._alone: dict[tuple[str, fx.Node], bool] = {}
        self._of_blocks: dict[str, tuple[bool, ...]] = {}
        loops = (op for op, _ in walk(program.stacks) if isinstance(op, Loop))
        self.complete = all(isinstance(op.count, int) for op in loops)  # else there are iterations that are no sites

    def of_ports(self, block: Block) -> tuple[bool, ...]:
        """`alone` of every port of a block; looked at once, so that Dynamo has nothing to look into later."""
        if block.name not in self._of_blocks:
            self._of_blocks[block.name] = tuple(self.alone(block, port) for port in ports_of(block))
        return self._of_blocks[block.name]

    def alone(self, block: Block, port: Port) -> bool:
        """Whether the mask of a port is causality and no more in every application of its block.

        Only of fused self-attention; a mask of more keys than tokens is not square, so it is none.
        """
        if port.kind != "fused" or port.cross or not self.complete:
            return False
        mask = argument(port.entries[0], 3, "attn_mask")
        if not isinstance(mask, fx.Node):
            return False
        if (key := (block.name, mask)) not in self._alone:
            uses = [site for site in self.sites if site.block is block]
            self._alone[key] = bool(uses) and all(self._holds(site, mask) for site in uses)
        return self._alone[key]

    def _holds(self, site: Site, mask: fx.Node) -> bool:
        """The same in one application; looked at once for all that compute it from the same values."""
        cone = inside(site, [mask], frozenset())
        key = (mask, *(site.origin(node) for node in site.body.placeholders if node in cone))
        if key not in self._shown:
            try:
                self._shown[key] = self._is_lower(site, mask)
            except (Unknown, RuntimeError, ValueError, IndexError, TypeError):  # or an op does not take such sizes
                self._shown[key] = False
        return self._shown[key]

    def _is_lower(self, site: Site, mask: fx.Node) -> bool:
        axes = analyse(site.block)  # type: ignore[arg-type]
        names = {size: name for name, size in axes.probe.sizes.items()}
        token, batch = names.get(axes.token.size), names.get(axes.batch.size)
        largest = max(numbers_of(site, [mask]), default=0)
        length = max(2 * largest, SHORT) + 30
        if token is None or length > LONGEST:
            return False
        fixed = {batch: self.choice.clip(batch, _BATCH)} if batch else {}
        sizes = [self.choice.near(token, wish, fixed) for wish in (SHORT, length)]
        if sizes[1][token] <= largest:
            return False
        values = (Evaluation(self.program, own, {}).values(site, [mask])[0] for own in sizes)
        return all(is_lower(value, own[token]) for value, own in zip(values, sizes, strict=True))


def numbers_of(site: Site, wanted: Sequence[fx.Node]) -> set[int]:
    """The numbers in what values are computed from.

    Raises:
        Unknown: more than sizes and numbers is in there.
    """
    found: set[int] = set()
    cone = inside(site, wanted, frozenset())
    for node in cone:
        if node.op == "call_function":
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise Unknown("random numbers")
            leaves = tree_leaves((node.args, dict(node.kwargs)))
            found.update(math.ceil(abs(x)) for x in leaves if isinstance(x, int | float) and abs(x) < _ENDLESS)
        elif node in wanted or any(user in cone and op_name(user) != "sym_size" for user in node.users):
            found |= _numbers_behind(site, node)
    return found


def _numbers_behind(site: Site, node: fx.Node) -> set[int]:
    """The numbers behind an input of a body."""
    origin, input = site.origin(node), node.meta["input"]
    if input.kind == "const":
        return {math.ceil(abs(origin))}
    if input.kind == "value" and isinstance(origin, tuple) and origin[0].block is None:
        source, index = origin
        return numbers_of(source, [source.body.results[index]])
    if (input.kind, input.name) != ("env", "device"):
        raise Unknown(f"{input.name} has a part in it")
    return set()


def is_lower(mask: Tensor, length: int) -> bool:
    """Whether a mask allows the lower triangle, and says nothing else, for every batch row and head.

    Example:
        >>> is_lower(torch.ones(2, 1, 3, 3, dtype=torch.bool).tril(), 3), is_lower(torch.zeros(3, 3), 3)
        (True, False)
    """
    if mask.dim() < 2 or mask.shape[-2:] != (length, length):
        return False
    lower = torch.ones(length, length, dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        return bool((mask == lower).all())
    closed = (mask == -torch.inf) | (mask == torch.finfo(mask.dtype).min)
    return bool(torch.where(lower, mask == 0, closed).all())
