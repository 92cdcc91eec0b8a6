"""Fitting: what an op is told differently when it runs on rows.

Sizes follow from labels; slices of extended key axes move with the keys; causality is written out where it no longer
follows from the order; and rows that are not valid are kept out of every sum over keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from depthc.ir.axes.labels import Atom, Label, kinds_in
from depthc.ir.axes.ops import argument, op_name
from depthc.ir.rows.extents import Extents
from depthc.ir.rows.gather import Rows, place_mask
from depthc.ir.rows.rings import Rings
from depthc.ir.rows.schedule import HERE, Frame, Schedule

aten = torch.ops.aten

Attend = Callable[[Tensor, Tensor, Tensor], Callable[..., Tensor] | None]
"""For queries, keys and values [batch, heads, tokens, features] a function (queries, keys, values, positions, valid,
keep, scale) -> output, causal by position (`depthc.codegen.kernels.shared_attention`); None if it takes none such."""

# Ops over the keys in which a score at the lowest number counts for nothing, and those in which a zero does.
_LOGARITHMIC = {"softmax", "log_softmax", "amax", "max", "logsumexp"}
_ADDITIVE = {"sum"}


class Fitting:
    """Adapts the arguments of ops to their frames."""

    def __init__(
        self,
        schedule: Schedule,
        sizes: Extents,
        ordered: bool,
        attend: Attend | None = None,
        rings: Rings | None = None,
    ) -> None:
        self.schedule, self.axes, self.sizes, self.ordered = schedule, schedule.axes, sizes, ordered
        self.attend = attend
        self.attend_ring = None if rings is None else rings.attend

    def target(self, node: fx.Node, frame: Frame, args: list[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """Adapt `args` and `kwargs` in place; returns what to call with them."""
        name, port = op_name(node), self.schedule.port_of.get(node, HERE)
        if name == "unflatten":
            args[1:] = [[-1] * len(self.axes.labels[node])]
        if name in ("view", "expand", "unflatten"):
            args[1] = self.sizes.sizes(self.axes.labels[node], frame, port, args[1])
            return aten.expand.default if name == "expand" else aten.reshape.default
        if name == "slice":
            self._slice(node, frame, port, args)
        elif self.axes.kinds.get(node) == "fused":
            one = self._by_position(node, port, args, kwargs) or self._to_ring(node, port, args, kwargs)
            return one or self._attention(node, port, args, kwargs)
        elif port != HERE and not self.schedule.ports[port].cross:
            self._scores(node, frame, port, args)
        return node.target  # type: ignore[return-value]

    def _slice(self, node: fx.Node, frame: Frame, port: Frame, args: list[Any]) -> None:
        """A slice of a key axis that has sinks or memory in front or behind."""
        source: Any = node.args[0]
        d = argument(node, 1, "dim", 0) % len(self.axes.labels[source])
        dim = self.axes.labels[source][d]
        if not any(atom.extended for atom in dim):
            return
        size = self.sizes.here(frame, port)
        total, before, after = size(dim), sum(map(size, dim[0].before)), sum(map(size, dim[0].after))
        start, count = self.axes.probe.number(argument(node, 2, "start", 0)), self.axes.probe.shape(node)[d]
        if kinds_in([self.axes.labels[node][d]]) & {"token", "key"}:
            start, end = before, total - after
        elif start < sum(a.size for part in dim[0].before for a in part):
            end = start + count
        else:  # of what comes behind, counted from the end
            start += total - (dim[0].size if start >= 0 else 0)
            end = start + count
        args[1:] = [d, start, end]

    def _by_position(
        self, node: fx.Node, port: Frame, args: list[Any], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        """Causal attention of the rows at hand to the keys of all tokens as one function, if there is one."""
        here = self.sizes.frames[HERE]
        if self.attend is None or here.positions is None or not attends_by_position(self.schedule, node):
            return None
        keys, function = self.sizes.frames[port], self.attend(*args[:3])
        if function is None or keys.positions is not None:
            return None
        args[3:] = [here.positions.expand(self.sizes.batch, -1), here.valid, keys.valid, argument(node, 6, "scale")]
        kwargs.clear()
        return function

    def _to_ring(
        self, node: fx.Node, port: Frame, args: list[Any], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        """Attention of the token at hand to the rows of a ring as one function, if there is one."""
        plain = all(is_plain(self.schedule, source) for source in node.args[:3])  # type: ignore[arg-type]
        if self.attend_ring is None or not plain or argument(node, 4, "dropout_p", 0.0) != 0.0:
            return None
        function = self.attend_ring(*args[:3])
        if function is None:
            return None
        mask = kwargs.pop("attn_mask", None) if len(args) < 4 else args[3]
        args[3:] = [mask, self.sizes.frames[HERE].positions, argument(node, 6, "scale")]
        kwargs.clear()
        return function

    def _attention(self, node: fx.Node, port: Frame, args: list[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """An attention op whose keys are not simply the rows at hand in order."""
        here, cross = self.sizes.frames[HERE], self.schedule.ports[port].cross
        own = not cross and self.schedule.sources[port] == "own"
        causal = bool(argument(node, 5, "is_causal", False))
        in_order = own and (self.ordered or here.positions is None)
        axis: Label = self.axes.read(node, (1, -1), node.args[1])[-2:-1]  # type: ignore[arg-type]
        keys = Rows(self.sizes.here(HERE, port)(axis[0])) if cross else self.sizes.frames[port]
        if keys.valid is None and (in_order or not causal):
            return node.target  # type: ignore[return-value]
        key = axis[0][0] if cross else self.axes.key
        space = (*self.axes.labels[node][:-1], *axis)
        mask = self._placed(self._allowed(keys, causal, args[0].device), key, space, HERE, port)
        args.extend([None, 0.0, False][len(args) - 3 :])
        args[5] = False
        args[3] = _both(kwargs.pop("attn_mask", None) if args[3] is None else args[3], mask)
        return node.target  # type: ignore[return-value]

    def _allowed(self, keys: Rows, causal: bool, device: torch.device) -> Tensor:
        """[batch, token, key]: which keys a token may read. Rows that are not valid read all: no row may be empty."""
        here = self.sizes.frames[HERE]
        allowed = torch.ones((1, here.count, keys.count), dtype=torch.bool, device=device)
        if causal:
            allowed = keys.index(device)[:, None, :] <= here.index(device)[:, :, None]
        if keys.valid is not None:
            allowed = allowed & keys.valid[:, None, :]
        if here.valid is not None:
            allowed = allowed | ~here.valid[:, :, None]
        return allowed.expand(self.sizes.batch, -1, -1)

    def _placed(self, allowed: Tensor, key: Atom, space: Label, frame: Frame, port: Frame) -> Tensor:
        return place_mask(allowed, (self.axes.batch, self.axes.token, key), space, self.sizes.here(frame, port))

    def _scores(self, node: fx.Node, frame: Frame, port: Frame, args: list[Any]) -> None:
        """Rows that are not valid take no weight in any op over the keys."""
        keys, name = self.sizes.frames[port], op_name(node)
        logarithmic = name in _LOGARITHMIC
        summed = name in _ADDITIVE or node in self.schedule.ports[port].exits
        if keys.valid is None or not (logarithmic or summed):
            return
        for at, source in enumerate(node.args):
            label = self.axes.labels.get(source) if isinstance(source, fx.Node) else None
            if source in self.axes.moving and isinstance(label, tuple) and "key" in kinds_in(label):
                allowed = self._allowed(keys, False, args[at].device)
                mask = self._placed(allowed, self.axes.key, label, frame, port)
                args[at] = args[at].masked_fill(~mask, torch.finfo(args[at].dtype).min if logarithmic else 0.0)


def attends_by_position(schedule: Schedule, node: fx.Node) -> bool:
    """Whether an op is causal attention, without another mask, to keys that another pass stored."""
    port = schedule.port_of[node]
    given = not schedule.ports[port].cross and schedule.sources[port] in ("given", "update")
    return given and is_causal_alone(node) and all(is_plain(schedule, source) for source in node.args[:3])  # type: ignore[arg-type]


def is_causal_alone(node: fx.Node) -> bool:
    """Whether an attention op is causal by its flag, and has no other mask and drops nothing."""
    masked = argument(node, 3, "attn_mask") is not None or argument(node, 4, "dropout_p", 0.0) != 0.0
    return not masked and bool(argument(node, 5, "is_causal", False))


def is_plain(schedule: Schedule, source: fx.Node) -> bool:
    """Whether a value is laid out as [batch, heads, tokens, features]."""
    axes = schedule.axes
    label = axes.labels[source]
    if source not in axes.moving or len(label) != 4:
        return False
    return label[0] == (axes.batch,) and label[2] == (axes.token,)


def _both(given: Tensor | None, mask: Tensor) -> Tensor:
    """A mask that allows what both allow."""
    if given is None:
        return mask
    if given.dtype is torch.bool:
        return given & mask
    return given.masked_fill(~mask, torch.finfo(given.dtype).min)
