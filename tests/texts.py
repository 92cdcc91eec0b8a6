"""Programs built by hand, for the tests of their text."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from depthc.ir.body import Body, Input
from depthc.ir.params import Param
from depthc.ir.program import Block, Call, Op, Program, Segment, Stack
from depthc.ir.signature import Leaf, Signature
from depthc.ir.text.parser import parse
from depthc.ir.types import FLOAT, Type
from depthc.ir.verify import verify

aten = torch.ops.aten
WIDE = Type(torch.float32, ("b", "s", 4))
SQUARE = Type(torch.float32, (4, 4))
VECTOR = Type(torch.float32, (4,))

GOLDEN = """\
# depthc program 1
OrderedDict = registered("collections.OrderedDict")

@segment
def embed(ids: i64[b, s]):
    w.embed.weight: f32[10, 4]
    w.scale: buffer(f32[4])
    h = embedding(w.embed.weight, ids) * w.scale
    score = sum.dim_IntList(h, [-1])
    positions = unsqueeze(arange(s, device=device), 0)
    late_0 = positions < s
    return h, score, positions, late_0

@block
def layer(h: f32[b, s, 4], positions: i64[1, s]):
    w.norm.weight: f32[4]
    w.mlp.weight: f32[4, 4]
    w["mlp.0.bias"]: f32[4]
    c.rate: float
    norm = h * rsqrt(mean.dim(h ** 2, [-1], True) + c.rate) * w.norm.weight
    mlp = dropout(linear(norm, w.mlp.weight, w["mlp.0.bias"]), 0.1, training)
    return h + reshape(mlp, [b, s, 4]) * unsqueeze(positions, 2)

@block(carries=2)
def pair(h: f32[b, s, 4], memory: f32[b, s, 4]):
    add_1 = h + memory
    return add_1, h

@segment
def gate(h: f32[b, s, 4]):
    w.weight: f32[1, 4]
    return sigmoid(linear(h, w.weight))

@glue
def combine(old: f32[b, k, 4], new: f32[b, k, 4], g: f32[b, k, 1]):
    return old + g * new

def Model(ids: i64[b, s], scale: 2.0, flags: {"fast": True, "mask": None}, labels, *rest, kind, **kwargs):
    sizes(2 <= b, 2 <= s <= 64)
    assert s % 2 == 0
    w.tied.weight: f32[10, 4] = ref("embed.weight")
    for l in range(4):
        w[f"depth.{l}.a"]: f32[4, 2] = svd_left(ref(f"layers.{l}.mlp.weight") - mean(ref("a"), ref("b")), 2)
    w.depth.fresh: frozen(f32[4]) = init(f32[4], "normal(0.02)", seed=7)
    h, score, positions, v["late.0"] = embed(ids)
    with stack("layers"):
        for l in range(4):
            h = layer(h, positions, w=f"layers.{l}", c=(1e-05,))
        h, memory = pair(h, h)
        for l in range(3):
            h = layer(h, positions, w=f"layers.{2 * l + 4}", c=((0.1, 0.5, 0.25)[l],))
        A0 = select("all", score=score)
        for r in loop(3, until=done):
            done = gate(h, w="gates.0")
            A1 = select("topk(0.5)", score=score, among=A0)
            with on(A1, reads=(h, positions), writes=(y,)):
                y = layer(h, positions, w=f"core.{r}" | {"mlp.0.bias": "core.0.mlp.0.bias"}, c=(1.0,),
                    grad="r >= 1")
            g = gate(h, w=f"gates.{r}", name="gate_again")
            h = merge(h, y, A1, combine=combine, extra=(g,))
            h = layer(h, positions, w="core.0", c=(1,), kv=(store(f"core.{r}"), fresh, read(f"core.{r}")))
        tap("last", h)
    return OrderedDict(out=h, rest=[(score, None)], extra={"n": 1, "late": v["late.0"]})
"""


# building programs


def body(inputs: Sequence[Input], build: Callable[..., Any]) -> Body:
    """A body from a function of its graph and placeholders."""
    graph = fx.Graph()
    nodes = []
    for number, info in enumerate(inputs):
        node = graph.placeholder(f"i{number}")
        node.meta["input"] = info
        nodes.append(node)
    results = build(graph.call_function, *nodes)
    graph.output(results if isinstance(results, tuple) else (results,))
    return Body(graph)


def value(name: str, type: Any = WIDE) -> Input:
    return Input(name, "value", type)


def linear_block(name: str = "layer", sides: int = 0, slots: Sequence[str] = ("mlp.weight",), consts: int = 0) -> Block:
    """h + linear(h) for every slot, with side inputs and constants added."""
    inputs = [value("h"), *(value(f"side{i}") for i in range(sides))]
    inputs += [Input(slot, "param", SQUARE) for slot in slots]
    inputs += [Input(f"c{i}", "const", FLOAT) for i in range(consts)]

    def build(call: Any, h: fx.Node, *others: fx.Node) -> fx.Node:
        for other in others:
            kind = other.meta["input"].kind
            target = aten.linear.default if kind == "param" else aten.add.Tensor
            h = call(aten.add.Tensor, (h, call(target, (h, other))))
        return h

    return Block(name, body(inputs, build))


def program(ops: Sequence[Op], blocks: Sequence[Block], names: Sequence[str] = (), **changes: Any) -> Program:
    """A program of one stack; its values are the inputs `h` and `names`, its parameters what the ops bind."""
    leaves = tuple(Leaf(n, WIDE) for n in ("h", *names))
    spec = pytree.TreeSpec(dict, [leaf.name for leaf in leaves], [pytree.treespec_leaf()] * len(leaves))
    signature = Signature(
        tuple(leaf.name for leaf in leaves),
        leaves,
        spec,
        ("h",),
        pytree.treespec_leaf(),
        {"b": (1, None), "s": (2, 64)},
    )
    params = {name: Param(SQUARE) for op in ops for name in getattr(op, "params", ())}
    made = Program("Model", signature, {b.name: b for b in blocks}, (Stack("layers", tuple(ops)),), params)
    return replace(made, **changes)


def call(number: int = 0, block: str = "layer", reads: Sequence[str] = (), **more: Any) -> Call:
    params = more.pop("params", (f"layers.{number}.mlp.weight",))
    return Call(block, ("h", *reads), ("h",), params, **more)


def round_trip(made: Program) -> str:
    """Print, parse, compare; returns the text."""
    verify(made)
    text = str(made)
    again = parse(text)
    assert again == made
    assert str(again) == text
    assert max(map(len, text.splitlines())) <= 110
    return text


def layers(text: str) -> str:
    """The stack of a printed program."""
    lines = text.split('with stack("layers"):\n')[1].splitlines()
    return "\n".join(line[8:] for line in lines if line.startswith(" " * 8))


# every op, every form


def identity_program(made: Body) -> Program:
    """A program whose prologue is the body."""
    reads = [i.name for i in made.inputs_of("value")]
    params = tuple(i.name for i in made.inputs_of("param"))
    writes = tuple(f"r{i}" for i in range(len(made.results)))
    base = program([call()], [linear_block()], [r for r in reads if r != "h"])
    types = {i.name: Param(i.type) for i in made.inputs_of("param")}  # type: ignore[arg-type]
    segment = Segment("prologue", made, tuple(reads), writes, params)
    return replace(base, body=(segment, *base.body), params=base.params | types)
