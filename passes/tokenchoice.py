"""tokenchoice: every token says at once how deep it goes (Mixture-of-Recursions, arXiv 2507.10524, token choice)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from depthc.ir.names import Names
from depthc.ir.params import STEP, Init, Param, drawn, steps_taken
from depthc.ir.program import Merge, Op, Program, Segment, Select, Tap
from depthc.ir.types import Type
from depthc.passes.base import Pass
from depthc.passes.depth_glue import GATES, balance_loss, depth, leave, shares
from depthc.passes.glue import wide
from depthc.passes.layers import names_in, stack_of, with_stack
from depthc.passes.recursion import KEYS, Recursion, recursion_of
from depthc.passes.routing_glue import COMBINES, ROUTERS, router, router_shapes, z_loss
from depthc.passes.subsets import candidates_of
from depthc.passes.taps import loss_taps, route_taps


@dataclass(frozen=True)
class TokenChoice(Pass):
    """Run a token through the iterations of a loop up to the depth that it chose before them.

    A router gives every token a share pi_i of each depth; it goes through d + 1 recursions, d being the depth with the
    largest share (among equal ones the least), without gates in between. As it leaves, the state x that it came with
    and what the recursions made of it are combined by pi_d. Tokens choose by themselves, so training and inference
    choose alike, and no later token changes an earlier one.

    Options:
        gate, alpha: pi = alpha softmax(logits), alpha 1 by default; or alpha sigmoid(logits), 0.1 by default.
        combine: "weighted" x + pi y, "additive" x + y, "delta" x + pi (y - x), "off" y.
        kv: "recursion": keys and values of the tokens that are as deep; "share_first": those of recursion 0, of all
            tokens; "update": those of recursion 0, but of tokens that are as deep their own.
        router: "linear" (D to N), or "mlp" (D to 2D, GELU, to N).
        balance: the weight of N sum f_i P_i: the fraction of tokens at each depth times its mean share.
        bias: whether a bias [N] counts in the choice alone, which `runtime.balance.update` moves instead of a loss.
        bal_warmup: optimizer steps of training in which everyone goes to full depth. See `DepthModule.set_step`.
        z_loss: the weight of mean(logsumexp(logits)^2).
        temperature: what the router divides its input by.
        std, seed: of the router's normal initial values.
        loop: the index of the loop; the only one of the stack by default.
        stack: name or number; the last one by default.

    Raises:
        RecipeError: there is no loop, a block mixes tokens other than by attention, or the options do not fit.

    Example:
        >>> print(TokenChoice(combine="delta"))
        tokenchoice(combine="delta")
    """

    gate: str = "softmax"
    alpha: float | None = None
    combine: str = "weighted"
    kv: str = "recursion"
    router: str = "linear"
    balance: float = 0.1
    bias: bool = False
    bal_warmup: int = 0
    z_loss: float = 0.0
    temperature: float = 1.0
    std: float = 0.02
    seed: int = 0
    loop: str | None = None
    stack: int | str | None = None

    def __post_init__(self) -> None:
        self.require_one_of("gate", tuple(GATES))
        self.require_one_of("combine", COMBINES)
        self.require_one_of("kv", KEYS)
        self.require_one_of("router", ROUTERS)
        self.require_one_of("bias", (False, True))
        self.require_whole("bal_warmup", 0)
        for name in ("balance", "z_loss", *(() if self.alpha is None else ("alpha",))):
            self.require_weight(name)

    def apply(self, program: Program) -> Program:
        """The routed program."""
        stack = stack_of(self, program, self.stack)
        recursion = recursion_of(self, program, stack, self.loop, self.kv)
        if not isinstance(recursion.loop.count, int):
            found, remedy = str(recursion.loop.count), "give the loop a number of iterations"
            raise self.refuse("the loop has no fixed count", expected="an integer", found=found, remedy=remedy)
        names = Names(names_in(program))
        candidates = candidates_of(self, program, recursion.calls, names, "row")
        build = _Depths(self, recursion, recursion.loop.count, candidates.real, names)
        routed = recursion.replaced(stack, [*candidates.ops, *build.ops()])
        return replace(with_stack(program, stack, routed), params={**program.params, **build.params()})


class _Depths:
    """Writes the ops around and in the loop."""

    def __init__(self, one: TokenChoice, recursion: Recursion, count: int, real: str, names: Names) -> None:
        self.one, self.recursion, self.count, self.real = one, recursion, count, real
        self.stream, self.h, self.index = recursion.stream, recursion.h, recursion.loop.index
        self.start, self.logits, self.pi, self.depth = map(names.new, ("start", "logits", "pi", "depth"))
        self.share, self.active, self.chosen, self.y = map(names.new, ("share", "active", "chosen", "y"))
        self.names = names

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The router's parameters."""
        shapes = router_shapes(self.one.router, self.stream, (self.count,))
        return {f"depth.{self.index}.router.{slot}": shape for slot, shape in shapes.items()}

    def ops(self) -> list[Op]:
        """Choose a depth, go through the recursions up to it, and combine on leaving."""
        one, stream = self.one, self.stream
        scored = router(stream, one.router, one.temperature, (self.count,))
        chosen = depth(stream, self.count, one.bias, one.bal_warmup)
        read = (*((self._bias,) if one.bias else ()), *((STEP,) if one.bal_warmup else ()))
        imposed = (self.names.new("imposed"),) if one.bal_warmup else ()
        return [
            Segment("router", scored, (self.h,), (self.logits,), tuple(self._shapes), precise=True),
            Segment("shares", shares(stream, self.count, one.gate, one.alpha), (self.logits,), (self.pi,)),
            Segment("depth", chosen, (self.pi,), (self.depth, self.share, *imposed), read),
            *(Tap(f"balance.{self.index}.imposed", name) for name in imposed),
            *self._losses(),
            Segment("start", leave(stream, None), (self.h,), (self.start,)),
            Select(self.active, "all", among=self.real),
            replace(self.recursion.loop, body=tuple(self._recursion())),
            Segment("leave", leave(stream, one.combine), (self.start, self.h, self.share, self.real), (self.h,)),
        ]

    def _recursion(self) -> list[Op]:
        """The tokens that go at least as deep as this; to recursion 0 all do, whatever the data."""
        deeper = ["-inf", *map(str, range(self.count - 1))] if self.count > 1 else ["-1"]  # NaN is refused
        return [
            Select(self.chosen, f"threshold([{', '.join(deeper)}][{self.index}])", self.depth, self.active),
            self.recursion.on(self.chosen, self.y),
            Merge(self.h, self.h, self.y, self.chosen),
            *route_taps(f"{self.index}.{{{self.index}}}", self.active, self.chosen),
            Select(self.active, "all", among=self.chosen),
        ]

    def _losses(self) -> Iterator[Op]:
        one, stream = self.one, self.stream
        if one.balance:
            body = balance_loss(stream, self.count, one.balance)
            yield from loss_taps(self.index, "balance", body, (self.pi, self.depth, self.real), self.names)
        if one.z_loss:
            body = z_loss(stream, one.z_loss, (self.count,))
            yield from loss_taps(self.index, "z", body, (self.logits, self.real), self.names)

    @property
    def _bias(self) -> str:
        return f"depth.{self.index}.bias"

    def params(self) -> dict[str, Param]:
        """The router, the bias that balances, and the steps of the warm-up."""
        dtype = wide(self.stream.dtype)
        made = drawn(self._shapes, dtype, self.one.std, self.one.seed)
        if self.one.bias:
            type = Type(dtype, (self.count,))
            made[self._bias] = Param(type, "buffer", Init(type, "zeros"))
        return made | (steps_taken() if self.one.bal_warmup else {})
