"""stagger: stacks of layers that one token passes at the same time (StagFormer, arXiv 2501.15665)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from depthc.ir.axes.ports import ports_of
from depthc.ir.masks.documents import documents_of
from depthc.ir.masks.masks import Mask, masks_of
from depthc.ir.masks.padding import padding_of
from depthc.ir.names import Names
from depthc.ir.params import Init, Mean, Param, Ref
from depthc.ir.program import Block, Call, Op, Program, Segment
from depthc.ir.types import Type
from depthc.passes.base import Pass
from depthc.passes.crossing import Crossing, crossing_of
from depthc.passes.crossing_source import NoCrossing, self_attention
from depthc.passes.glue import wide
from depthc.passes.layers import layers_of, names_in, require_one_stream, stack_of, with_stack
from depthc.passes.routing_glue import document_ids
from depthc.passes.stagger_glue import combine, lagged
from depthc.passes.subsets import group_of, stream_of

_INT, _BOOL = torch.int64, torch.bool
_LOCAL = ("window", "span", "band", "chunk")  # which the layer itself has, and the cross-attention has not


@dataclass(frozen=True)
class Stagger(Pass):
    """Divide the layers into stacks, of which each sees what the one before made of earlier tokens.

    Stack 0 is layers as they are. A later stack begins with the embeddings again; behind the attention of each of its
    layers stands a cross-attention to a memory m, the last state of the stack before, without a norm:

        x_i += SelfAttn(n(x))_i;  x_i += o Attn(q(n_c(x_i)), k(m_j), v(m_j));  x_i += MLP(n(x_i))

    over i - lag - window < j <= i - lag, within the document, without padding; with rotary positions of i and j. Where
    there is no such j it adds exactly zero. With a lag of 1 or more the stacks of a step need nothing of each other.
    The final norm acts on sum_q a_q x^q.

    The cross-attention is a copy of the layer's own attention with its norm; o starts at zero, and a as that of the
    last stack alone. Until it is trained the model is then the original one if the stacks share all layers, or, with
    layers of their own, do not `reinject`. Layers without an attention of their own stay as they are.

    Options:
        stacks: p, from 2 on; divides the layers.
        shared: every stack is all the layers, with cross-attentions of its own.
        lag: how far behind the newest row of memory is; 0 is the token's own, and makes the stacks sequential.
        window: how many rows of memory a token sees; None: all.
        reinject: stacks begin with the embeddings; else with what the stack before made of the same token.
        stack: name or number; the last one by default.

    Raises:
        RecipeError: the stacks do not divide the layers, tokens see later ones (an encoder), a layer does more than
            pass one stream on, its attention cannot be copied, or an option is out of range.

    Example:
        >>> print(Stagger(stacks=3, window=128))
        stagger(stacks=3, window=128)
    """

    stacks: int = 2
    shared: bool = False
    lag: int = 1
    window: int | None = None
    reinject: bool = True
    stack: int | str | None = None

    def __post_init__(self) -> None:
        self.require_whole("stacks", 2)
        self.require_whole("lag", 0)
        if self.window is not None:
            self.require_whole("window", 1)
        for option in ("shared", "reinject"):
            self.require_one_of(option, (False, True))

    def apply(self, program: Program) -> Program:
        """The program with stacks side by side, and the sum of what they make."""
        stack = stack_of(self, program, self.stack)
        ops, places = layers_of(self, stack)
        layers: list[Call] = [ops[at] for at in places]  # type: ignore[misc]
        require_one_stream(self, program, ops, layers, "stagger a model that does not return what its layers compute")
        made, last = _Stacks(self, program, layers), layers[-1].writes[0]
        done: list[Op] = [*made.memory_ops(), *(op for q in range(self.stacks) for op in made.stack(q))]
        name = f"depth.{made.group}.combine"
        done.append(Segment("combine", combine(made.stream, self.stacks), made.states, (last,), (name,)))
        type = Type(wide(made.stream.dtype), (self.stacks,))
        params = {**program.params, **made.params, name: Param(type, expr=Init(type, "last"))}
        staggered = with_stack(program, stack, [*ops[: places[0]], *done, *ops[places[-1] + 1 :]])
        return replace(staggered, params=params, blocks={**program.blocks, **made.blocks})

    def depths(self, layers: int) -> list[range]:
        """The layers of every stack, by number."""
        if self.shared:
            return [range(layers)] * self.stacks
        if layers % self.stacks:
            legal = [n for n in range(2, layers + 1) if layers % n == 0]
            raise self.refuse(
                f"{self.stacks} stacks do not divide {layers} layers",
                expected=f"stacks among {', '.join(map(str, legal))}, or shared=True",
                found=f"stacks={self.stacks}",
                remedy=f"give stacks={min(legal, key=lambda n: abs(n - self.stacks))}" if legal else "give shared=True",
            )
        height = layers // self.stacks
        return [range(q * height, (q + 1) * height) for q in range(self.stacks)]


class _Stacks:
    """Writes the ops of stacks.

    Attributes:
        states: the names of what the stacks make.
        blocks, params: what they add to the program.
    """

    def __init__(self, one: Stagger, program: Program, layers: Sequence[Call]) -> None:
        self.one, self.program, self.layers = one, program, layers
        self.stream, self.group = stream_of(program, layers[0]), group_of(program, "stagger")
        self.depths = one.depths(len(layers))
        names = Names(names_in(program))
        self.states = tuple(names.new(f"x{q}") for q in range(one.stacks))
        self.lagged, self.unseen = names.new("lagged"), names.new("unseen")
        self.names, self.block_names = names, Names(program.blocks)
        self.blocks: dict[str, Block] = {}
        self.params: dict[str, Param] = {}
        self._made: dict[tuple[str, bool], Crossing] = {}
        self._require_decoder()
        self.crossed = [call for call in layers if self._port(call) is not None]
        self.paddings, self.documents = padding_of(program, self.crossed), documents_of(program, self.crossed)
        if not all(any(layers[depth] in self.crossed for depth in depths) for depths in self.depths[1:]):
            raise one.refuse(
                "there is a stack without attention",
                expected="an attention in every stack, of which a cross-attention is made",
                found=f"{len(self.crossed)} layers with attention in {len(layers)}",
                remedy="give shared=True, or fewer stacks",
            )

    def _require_decoder(self) -> None:
        """Refuse layers in which tokens see later ones."""
        for call in self.layers:
            for port, mask in zip(ports_of(self.program.blocks[call.block]), self._masks(call), strict=True):
                if not port.cross and not mask.causal:
                    raise self.one.refuse(
                        "tokens see later ones, as in an encoder, or may",
                        where=call.layer or call.block,
                        expected="layers whose attention is causal",
                        found=f"the mask {mask}" + (f" ({mask.reason})" if mask.reason else ""),
                        remedy="stagger a decoder; give documents by position ids instead of a mask of pairs",
                    )

    def _require_known(self, call: Call, mask: Mask) -> None:
        """Refuse a mask of which the cross-attention's cannot be made."""
        given = {found.argument for found in self.documents}
        strange = [f for f in mask.factors if f.kind == "tensor" or (f.kind == "document" and f.of[0] not in given)]
        local = [f for f in mask.factors if f.kind in _LOCAL] if mask.bias else []
        if strange or local:
            raise self.one.refuse(
                "who may see whom cannot be told from a layer's mask",
                where=call.layer or call.block,
                expected="causality, padding, documents by an entry a token; a window where there is no bias",
                found=str(mask),
                remedy="give padding as a mask [batch, tokens], and documents by position ids",
            )

    def _masks(self, call: Call) -> tuple[Mask, ...]:
        return masks_of(self.program)[call]

    def _port(self, call: Call) -> int | None:
        """The number of the layer's own attention among its ports."""
        block = self.program.blocks[call.block]
        try:
            found = self_attention(block)
        except NoCrossing as error:
            raise self._refusal(call, error) from error
        return None if found is None else ports_of(block).index(found)

    def _refusal(self, call: Call, error: NoCrossing) -> Exception:
        source = str(error.node.meta.get("source", "")) if error.node is not None else ""
        return self.one.refuse(
            f"no cross-attention can be made of a layer's own attention: {error}",
            where=", ".join(filter(None, (call.layer or call.block, source))),
            expected="one attention a layer, between projections of the stream",
            remedy="capture the model with attn_implementation='sdpa', or leave this stack as it is",
        )

    # The ops.

    def memory_ops(self) -> Iterator[Op]:
        """Who sees which row of memory, from what the layers' own masks are made of."""
        ids = []
        for found in self.documents:
            ids.append(self.names.new("document"))
            yield Segment("documents", document_ids(found.type, found.counting), (found.argument,), (ids[-1],))
        types = [Type(_INT, found.type.shape) for found in self.documents]
        body = lagged(self.stream, self.paddings, types, self.one.lag, self.one.window)
        reads = (self.layers[0].reads[0], *(found.argument for found in self.paddings), *ids)
        yield Segment("memory", body, reads, (self.lagged, self.unseen))

    def stack(self, q: int) -> Iterator[Call]:
        """The layers of one stack; those of later stacks attend to the memory too."""
        state = self.states[q - 1] if q and not self.one.reinject else self.layers[0].reads[0]
        for number, depth in enumerate(self.depths[q]):
            call = self.layers[depth]
            yield (
                self._crossing(q, number, call, state)
                if q and call in self.crossed
                else replace(call, reads=(state, *call.reads[1:]), writes=(self.states[q],))
            )
            state = self.states[q]

    def _crossing(self, q: int, number: int, call: Call, state: str) -> Call:
        crossing, memory, own = self._block(call), self.states[q - 1], self.program.blocks[call.block]
        slots = own.body.inputs_of("param")
        fresh = tuple(
            self._copy(call.params[i], f"depth.{self.group}.{q}.{number}.{slots[i].name}", i in crossing.zeros)
            for i in crossing.copied
        )
        return replace(
            call,
            block=crossing.block.name,
            reads=(state, memory, *call.reads[1:], self.lagged, self.unseen),
            writes=(self.states[q], memory),
            params=(*call.params, *fresh),
            layer=f"{call.layer} of stack {q}" if call.layer else "",
        )

    def _copy(self, source: str, name: str, zero: bool) -> str:
        """A parameter that starts as another one, or at zero; what is not trained is read as it is."""
        own = self.program.params[source]
        if own.kind not in ("parameter", "frozen") or not own.type.dtype.is_floating_point:
            return source
        self.params[name] = Param(own.type, expr=Init(own.type, "zeros") if zero else Mean((own.expr or Ref(source),)))
        return name

    def _block(self, call: Call) -> Crossing:
        """The layer with a cross-attention; one for all calls that have the same."""
        block, index = self.program.blocks[call.block], self._port(call)
        assert index is not None
        mask = self._masks(call)[index]
        self._require_known(call, mask)
        key = call.block, mask.bias
        if key not in self._made:
            batch = self.stream.shape[0] if self.paddings or self.documents else 1
            tokens = self.stream.shape[1]
            types = Type(self.stream.dtype, (batch, 1, tokens, tokens)), Type(_BOOL, (batch, tokens, 1))
            try:
                made = crossing_of(block, ports_of(block)[index], mask.bias, *types)
            except NoCrossing as error:
                raise self._refusal(call, error) from error
            name = self.block_names.new(made.block.name)
            self._made[key] = replace(made, block=replace(made.block, name=name))
            self.blocks[name] = self._made[key].block
        return self._made[key]
