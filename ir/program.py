"""The depth IR: a structured program over named values.

A program is a sequence of segments (opaque FX graphs: embedding, final norm, head) and stacks (regions of depth ops:
the layers). Names are rebound as in Python: `h = layer(h, mask)` reads the old `h` and writes the new one. Everything
here is immutable data; `verify`, `evaluate`, `printer` and `parser` are the programs that walk it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from depthc.ir.body import Body
from depthc.ir.params import Param
from depthc.ir.signature import Signature
from depthc.ir.sizes import Size

if TYPE_CHECKING:
    from depthc.ir.incremental import Past


@dataclass(frozen=True)
class Block:
    """A layer body shared by all structurally equal layers.

    The value inputs of `body` are the carries (what flows from layer to layer), then the side inputs (masks, rotary
    tables, encoder states: what a layer reads that does not depend on its carry). Its results are the new carries,
    then the values that the program reads from inside the layer. Its "param" and "const" inputs are slots: every call
    binds them anew.
    """

    name: str
    body: Body
    carries: int = 1


@dataclass(frozen=True)
class Kv:
    """The key/value plan of one attention port of a call.

    `fresh`: keys and values of the tokens at hand. `store s`: the same, and kept in slot `s`. `read s`: those of
    slot `s`; the block's own key/value projections are not run. `share s`: the first application stores, later ones
    read. `update s`: slot `s`, with the rows of the tokens at hand replaced by fresh ones. `overlay s`: the first
    application stores; later ones read the slot with their own rows laid over it, and leave it as it is.
    """

    mode: Literal["fresh", "store", "read", "share", "update", "overlay"] = "fresh"
    slot: str = ""


@dataclass(frozen=True)
class Segment:
    """A straight-line graph: at the top level an embedding, norm or head; inside a stack the glue that a pass made.

    `reads` and `writes` are value names, one a "value" input and one a result of `body`; `params` are parameter
    names, one a "param" input. A token set is read as its mask, bool[batch, tokens]. A `precise` segment runs outside
    of autocast: routers decide in the dtype that they are written in.
    """

    name: str
    body: Body
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    params: tuple[str, ...] = ()
    precise: bool = False


@dataclass(frozen=True)
class Call:
    """One application of a block: `writes = block(reads)`.

    `params` and `consts` bind the block's slots in order; inside loops a parameter name may hold size expressions in
    braces over the loop indices (`"layers.{r + 1}.w"`). `kv` has one plan a port, or is empty: all fresh. `grad` is a
    condition over the enclosing loop indices under which gradients flow ("r >= 4"); None means always. `layer` names
    the layer in messages.
    """

    block: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    params: tuple[str, ...] = ()
    consts: tuple[float, ...] = ()
    kv: tuple[Kv, ...] = ()
    grad: str | None = None
    layer: str = field(default="", compare=False)


@dataclass(frozen=True)
class Loop:
    """Repeat `body` for `index` = 0 .. count-1. Names that the body both reads and writes are carried.

    `until` names a value; when all of it is true after an iteration, the loop ends (inference only).
    """

    index: str
    count: Size
    body: tuple[Op, ...]
    until: str | None = None


@dataclass(frozen=True)
class Select:
    """A token set as a value: `write = select rule(score, among=...)`.

    Rules: "all", "stride(q)", "topk(c)" with capacity c in (0, 1] of the tokens of `of` (the candidates by default),
    "threshold(x)" for score > x, "atleast(r)" for score >= r. Their numbers may be expressions over the loop indices,
    or one number an iteration: "topk([1.0, 0.5][r])". `score` names a value of shape [batch, tokens], which "all" and
    "stride" may go without where `among`, an earlier set, says what the tokens are. `inference` is the rule outside of
    training, if that is another one: one that is causal. `judge` names the value that it reads, if not the score.
    "topk" counts and chooses apart within each document where `within` names their ids, int[batch, tokens].
    """

    write: str
    rule: str
    score: str | None = None
    among: str | None = None
    of: str | None = None
    inference: str | None = None
    judge: str | None = None
    within: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """All names that it reads."""
        names = (self.score, self.judge, self.among, self.of, self.within)
        return tuple(name for name in names if name is not None)


@dataclass(frozen=True)
class On:
    """Run `body` on the tokens of a set only.

    The region is isolated: it sees only `reads`, each gathered on its token axis, and only `writes` leave it (one row
    a selected token).
    """

    tokens: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    body: tuple[Op, ...]


@dataclass(frozen=True)
class Merge:
    """`write = read`, with the rows of `tokens` replaced by those of `value`.

    `combine` (values: old rows, new rows, then `extra` gathered; one result) says what to put there; without it the
    new rows are put there as they are. With `over`, another set, rows are not for the tokens of `tokens` alone: every
    token of `over` takes the row, and the rows of `extra`, of the last token of `tokens` that is not behind it. Tokens
    before the first one keep the old row.
    """

    write: str
    read: str
    value: str
    tokens: str
    combine: Body | None = None
    extra: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    over: str | None = None


@dataclass(frozen=True)
class Tap:
    """Expose a value under a name: losses, exit heads, probes."""

    name: str
    read: str


Op = Call | Segment | Loop | Select | On | Merge | Tap


@dataclass(frozen=True)
class Stack:
    """A region of depth ops: the layers of one tower."""

    name: str
    ops: tuple[Op, ...]

    @property
    def depth(self) -> int:
        """Applications of repeated blocks."""
        return sum(times for _, times in calls(self.ops))


def calls(ops: tuple[Op, ...], times: int = 1) -> Iterator[tuple[Call, int]]:
    """Every call below `ops`, with the number of times that it runs (0 where a loop's count is not static)."""
    for op in ops:
        if isinstance(op, Call):
            yield op, times
        elif isinstance(op, Loop):
            yield from calls(op.body, times * op.count if isinstance(op.count, int) else 0)
        elif isinstance(op, On):
            yield from calls(op.body, times)


@dataclass(frozen=True)
class Program:
    """A whole model as a depth program. Equality is structure plus bindings; `weights` take no part in it.

    Attributes:
        name: of the model's class, for people.
        signature: how arguments become values and values become outputs.
        blocks: the layer bodies by name.
        body: segments and stacks in order.
        params: every parameter and buffer of the model by state-dict name, used or not.
        weights: the captured model's tensors by name; may be empty (a parsed text) or on the meta device.
        modes: the values of `training` under which the program is the model.
    """

    name: str
    signature: Signature
    blocks: Mapping[str, Block]
    body: tuple[Segment | Stack, ...]
    params: Mapping[str, Param]
    weights: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    modes: tuple[bool, ...] = (False, True)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks in execution order: an encoder comes before its decoder."""
        return tuple(item for item in self.body if isinstance(item, Stack))

    @property
    def depths(self) -> tuple[int, ...]:
        """Applications of repeated blocks, one number a stack, encoder first."""
        return tuple(stack.depth for stack in self.stacks)

    def with_weights(self, weights: Mapping[str, Tensor]) -> Program:
        """The same program over other weights."""
        return replace(self, weights=weights)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the program on the model's own arguments; returns what the model returns.

        Example:
            >>> import torch, depthc
            >>> layers = [torch.nn.Linear(4, 4) for _ in range(3)]
            >>> model = torch.nn.Sequential(*layers)
            >>> program = depthc.capture(model, (torch.ones(2, 5, 4),))
            >>> bool((program.run(torch.ones(1, 7, 4)) == model(torch.ones(1, 7, 4))).all())
            True
        """
        from depthc.ir.evaluate import run

        return run(self, args, kwargs)

    def start(self, *args: Any, **kwargs: Any) -> tuple[Any, Past]:
        """Evaluate a prompt and keep what later tokens need: (outputs, past). See `depthc.ir.incremental`."""
        from depthc.ir.incremental import start

        return start(self, args, kwargs)

    def step(self, past: Past, *args: Any, **kwargs: Any) -> tuple[Any, Past]:
        """Evaluate further tokens after `past`: (outputs of these tokens, past). See `depthc.ir.incremental`."""
        from depthc.ir.incremental import step

        return step(self, past, args, kwargs)

    def mlir(self) -> str:
        """The program as the text of an MLIR module: depth ops around bodies in the torch dialect; see docs/mlir.md.

        Weights are named, never written, so a model on the meta device has one too.

        Raises:
            MlirError: torch-mlir is not installed, the program is for training only, or an op has no MLIR form.

        Example:
            >>> import torch, depthc
            >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
            >>> text = depthc.capture(model, (torch.ones(2, 5, 4),)).mlir()
            >>> text.count('"depth.call"'), text.count("func.func private")
            (3, 1)
        """
        from depthc.ir.mlir import module_of

        return str(module_of(self))

    def __str__(self) -> str:
        from depthc.ir.text.printer import program_text

        return program_text(self)
