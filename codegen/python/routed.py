"""What a program's Python form needs for token sets: choosing tokens, running blocks on them, keys of other passes.

`everyone`, `stride`, `topk`, `threshold` and `atleast` choose tokens; what they return is a
`depthc.ir.tokens.TokenSet`, whose `merge` writes rows back into a stream. `on` is a region: `take` gathers rows of its
set, and a `block` called with it runs on these rows alone. The function under `block` is what runs: it is traced once
a mode, its axes are found, and everything that it reads at full length is gathered at the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from depthc.codegen.python.tracing import Signature, traced_block
from depthc.ir.program import Block
from depthc.ir.program import Kv as Kv
from depthc.ir.regions import Slot, run_on
from depthc.ir.rows.packing import packable
from depthc.ir.selection import select
from depthc.ir.tokens import TokenSet

_ANY = 0.5  # a constant, where nothing depends on which


def everyone(score: Tensor | None = None, among: TokenSet | None = None) -> TokenSet:
    """All tokens of `score` [batch, tokens, ...], or all that are in an earlier set.

    Example:
        >>> import torch
        >>> everyone(torch.zeros(1, 3)).mask
        tensor([[True, True, True]])
    """
    return select("all", score, among)


def stride(score: Tensor | None, every: float, among: TokenSet | None = None) -> TokenSet:
    """Every so many-th position."""
    return select(f"stride({every!r})", score, among)


def topk(
    score: Tensor,
    share: float,
    *,
    among: TokenSet | None = None,
    of: TokenSet | None = None,
    within: Tensor | None = None,
    warmup: int = 0,
    step: int | None = None,
) -> TokenSet:
    """The best tokens by their score [batch, tokens]; see `depthc.ir.selection.select`.

    Args:
        share: how many, as a share of the tokens of `of` (by default of the candidates, `among`).
        within: ids of documents, int[batch, tokens], each of which chooses for itself.
        warmup, step: the share falls from 1 over the first `warmup` optimizer steps.

    Raises:
        RoutingError: a candidate's score is not a number.

    Example:
        >>> import torch
        >>> topk(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 0.5).mask
        tensor([[False,  True,  True, False]])
    """
    rule = f"topk({share!r}, warmup={warmup})" if warmup else f"topk({share!r})"
    return select(rule, score, among, of, step=step, within=within)


def threshold(score: Tensor, above: float, among: TokenSet | None = None) -> TokenSet:
    """The tokens whose score is above a number."""
    return select(f"threshold({above!r})", score, among)


def atleast(score: Tensor, least: float, among: TokenSet | None = None) -> TokenSet:
    """The tokens whose score is a number or more."""
    return select(f"atleast({least!r})", score, among)


class Routed:
    """A function that can run on some of the tokens; made by `block`."""

    def __init__(self, function: Callable[..., Any], values: int, carries: int) -> None:
        self.function, self.signature = function, Signature.of(function, values, carries)
        self._traced: dict[Any, Block] = {}
        self.__doc__, self.__name__ = function.__doc__, function.__name__

    def __call__(
        self,
        *args: Any,
        on: Region | None = None,
        kv: Sequence[Kv] = (),
        slots: dict[str, Slot] | None = None,
        **env: Any,
    ) -> Any:
        """What the function returns: for all tokens, or for the rows of a region.

        Args:
            args: values, parameters and constants. In a region the carries are rows of it, all else is of all tokens.
            on: the region.
            kv: where the keys and values of every attention come from; empty: from the tokens at hand.
            slots: what earlier applications stored, by slot; it is filled.
            env: `training` and `device`, if the function asks for them.
        """
        if not kv and (on is None or on.tokens.everyone):
            return self.function(*args, **env)
        training = bool(env.get("training", False))
        values, params, consts = self.signature.split(args)
        results = run_on(
            self.block(consts, training),
            values[: self.signature.carries],
            values[self.signature.carries :],
            params,
            tokens=on.tokens if on else None,
            packed=on.packed if on else False,
            kv=kv,
            slots={} if slots is None else slots,
            training=training,
            device=values[0].device,
        )
        return results if len(results) > 1 else results[0]

    def block(self, consts: Sequence[float] | None = None, training: bool = False) -> Block:
        """The function as a block, traced once for every set of constants and mode."""
        given = tuple(self.signature.consts * [_ANY] if consts is None else consts)
        key = (given, training)
        if key not in self._traced:
            self._traced[key] = traced_block(self.function, self.signature, given, training)
        return self._traced[key]


def block(values: int, carries: int = 1) -> Callable[[Callable[..., Any]], Routed]:
    """Mark a function of PyTorch code as a block, which can run on some of the tokens.

    Every argument's annotation is its type, a text such as `"f32[b, s, 64]"` or `"float"`; equal names are equal
    sizes. The first `values` arguments are values, first of all the `carries`; then come parameters, then numbers.
    `training` and `device` may be keyword-only arguments.

    Raises (where it is called in a region):
        SubsetError: the function mixes tokens other than by attention.
        InputError: an argument has no type.

    Example:
        >>> import torch
        >>> @block(values=1)
        ... def double(h: "f32[b, s, 2]", scale: "f32[2]"):
        ...     return h * scale
        >>> h, scale = torch.ones(1, 3, 2), torch.full((2,), 2.0)
        >>> some = topk(torch.tensor([[0.0, 2.0, 1.0]]), 0.67)
        >>> rows = on(some, double)
        >>> double(rows.take(h), scale, on=rows).shape
        torch.Size([1, 2, 2])
        >>> some.merge(h, double(rows.take(h), scale, on=rows))[0, :, 0]
        tensor([1., 2., 2.])
    """
    return lambda function: Routed(function, values, carries)


class Region:
    """Ops on the tokens of a set only.

    Attributes:
        tokens: the set.
        packed: whether its rows are those of all batch rows one behind the other, [1, members, ...], instead of
            [batch, rows, ...].
    """

    def __init__(self, tokens: TokenSet, blocks: Sequence[Routed]) -> None:
        self.tokens = tokens
        self.packed = tokens.ragged and all(packable(one.block()) for one in blocks)

    def take(self, stream: Tensor) -> Tensor:
        """The set's rows of a stream [batch, tokens, ...]."""
        return self.tokens.pack(stream) if self.packed else self.tokens.take(stream)


def on(tokens: TokenSet, *blocks: Routed) -> Region:
    """A region on a token set; `blocks` are those that run in it."""
    return Region(tokens, blocks)
