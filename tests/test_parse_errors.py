"""Program text: random programs read back equal, and what is no program is refused with its place."""

import collections
import contextlib
import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import (
    GOLDEN,
    SQUARE,
    VECTOR,
    aten,
    body,
    call,
    identity_program,
    linear_block,
    program,
    round_trip,
    value,
)
from torch import fx
from torch.utils import _pytree as pytree

from depthc.ir.body import Body, Input
from depthc.ir.errors import DepthError, ParseError
from depthc.ir.params import Init, Mean, Param, Ref, Svd
from depthc.ir.program import Call, Kv, Loop, Op, Program, Tap
from depthc.ir.text.parser import parse
from depthc.ir.types import FLOAT

NAMES = st.sampled_from(["mlp.weight", "attn.0.weight", "experts.1.w1", "w", "class.x", "norm"])


@st.composite
def stacks(draw: st.DrawFn) -> Program:
    """One to three kinds of layers in a random pattern, parameters with prefixes or without, side inputs, loops."""
    sides = ["near", "far", "past.0"]
    blocks = [
        linear_block(
            f"block{i}",
            draw(st.integers(0, 2)),
            draw(st.lists(NAMES, unique=True, max_size=3)),
            draw(st.integers(0, 2)),
        )
        for i in range(draw(st.integers(1, 3)))
    ]
    pattern = draw(st.lists(st.integers(0, len(blocks) - 1), min_size=1, max_size=4))
    pattern = pattern * draw(st.integers(1, 5)) + draw(st.lists(st.integers(0, len(blocks) - 1), max_size=3))
    stems = draw(st.lists(st.sampled_from(["layers.{}", "{}", "model.{}.inner", "shared"]), min_size=1, max_size=2))
    ops: list[Op] = []
    for number, which in enumerate(pattern):
        block = blocks[which]
        slots = [i.name for i in block.body.inputs_of("param")]
        prefix = draw(st.sampled_from(stems)).format(number)
        consts = tuple(draw(st.floats(allow_nan=False)) for _ in block.body.inputs_of("const"))
        reads = ["h", *(draw(st.sampled_from(sides)) for _ in block.body.inputs_of("value")[1:])]
        kv = draw(st.sampled_from([(), (Kv(),), (Kv("store", f"s{number}"),)]))
        ops.append(Call(block.name, tuple(reads), ("h",), tuple(f"{prefix}.{s}" for s in slots), consts, kv))
    if draw(st.booleans()):
        ops = [*ops, Loop("r", draw(st.integers(1, 3)), tuple(ops)), Tap("end", "h")]
    used = {op.block for op in ops if isinstance(op, Call)}
    return program(ops, [b for b in blocks if b.name in used], sides)


@settings(max_examples=40)
@given(stacks())
def test_random_stacks(made: Program) -> None:
    leaves = pytree.tree_structure({"h": 0, "near": 0, "far": 0, "past": [0]})
    parameters = ("h", "near", "far", "past")
    made = replace(made, signature=replace(made.signature, parameters=parameters, in_spec=leaves))
    round_trip(made)


@st.composite
def bodies(draw: st.DrawFn) -> Body:
    """A random graph over tensors and sizes with shared, nested, dead and random ops."""
    inputs = [value("h"), value("mask"), Input("a.weight", "param", SQUARE), Input("0.bias", "param", VECTOR)]
    inputs += [Input("rate", "const", FLOAT), Input("training", "env"), Input("device", "env")]
    order = draw(st.permutations(inputs))
    steps = draw(
        st.lists(st.tuples(st.integers(0, 7), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=30)
    )
    count = draw(st.integers(1, 3))

    def build(call: Any, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        named = {n.meta["input"].name: n for n in nodes}
        tensors, numbers = [named["h"], named["mask"]], [named["rate"], 2]
        for kind, i, j in steps:
            x, y, n = tensors[i % len(tensors)], tensors[j % len(tensors)], numbers[j % len(numbers)]
            match kind:
                case 0:
                    tensors.append(call(aten.add.Tensor, (x, y)))
                case 1:
                    tensors.append(call(aten.mul.Tensor, (x, n)))
                case 2:
                    tensors.append(call(aten.linear.default, (x, named["a.weight"], named["0.bias"])))
                case 3:
                    numbers.append(call(aten.sym_size.int, (x, j % 3)))
                case 4:
                    numbers.append(call(operator.mul, (numbers[0], n)))
                case 5:
                    tensors.append(call(aten.dropout.default, (x, 0.5, named["training"])))
                case 6:
                    tensors.append(call(aten.cat.default, ([x, y, x], -1)))
                case 7:
                    tensors.append(
                        call(aten.zeros.default, ([2, 3],), {"device": named["device"], "dtype": torch.float32})
                    )
        return tuple(tensors[-count:])

    return body(order, build)


@settings(max_examples=40)
@given(bodies())
def test_random_bodies(made: Body) -> None:
    round_trip(identity_program(made))


# what is refused


@pytest.mark.parametrize(
    ("old", "new", "what", "at"),
    [
        ("# depthc program 1", "# depthc program 2", "another version", "# depthc"),
        ("# depthc program 1", "import os", "not a depth program", "import"),
        ("def Model(", "def Model((", "not Python", ""),
        ('h = layer(h, positions, w=f"layers.{l}"', 'h = layer(h, positions, w=f"layers.{m}"', "not an integer", ""),
        ("collections.OrderedDict", "os.PathLike", "not registered", ""),
        ("sigmoid(", "sigmoidal(", "no operation", "sigmoidal"),
        ("sigmoid(linear(h, w.weight))", "sigmoid()", "argument 'self' is missing", "sigmoid"),
        ("sigmoid(linear(h, w.weight))", "sigmoid(q)", "'q' is not defined", "q)"),
        ("sigmoid(linear(h, w.weight))", "sigmoid(w.q)", "not declared", "w.q"),
        ("sigmoid(linear(h, w.weight))", "sigmoid(h < 'a')", "operator does not apply", ""),
        ("sigmoid(linear(h, w.weight))", "__import__('os').system('ls')", "no operation", ""),
        ("sigmoid(linear(h, w.weight))", "[x for x in h]", "not a constant", "[x"),
        ("    return sigmoid(", "    return lambda: (", "not a constant", ""),
        ("    return sigmoid(linear(h, w.weight))", "    del h", "does not end with return", "del"),
        ("norm = h *", "s = h *", "cannot be assigned", ""),
        ("h: f32[b, s, 4], positions: i64[1, s]", "h: f33[b, s, 4], positions", "not a constant", ""),
        ("    c.rate: float", "    c.rate: str", "not a type", ""),
        ("    c.rate: float", "    w.mlp.weight: f32[4]", "does not declare a new slot", ""),
        ("sizes(2 <= b,", "sizes(b > 2,", "not the range of a size", "b > 2"),
        ("assert s % 2 == 0", "assert open(s)", "not a size", ""),
        ("for l in range(4):", "for l in range(10**9):", "not an integer", ""),
        ("for l in range(4):", "for l in range(1000000000):", "too long", ""),
        ("for l in range(4):", "for l in open(4):", "another statement", ""),
        ("        h, memory = pair(h, h)", "        h, memory = trio(h, h)", "no block or segment 'trio'", "trio"),
        ("        h, memory = pair(h, h)", "        print(h)", "no block or segment 'print'", "print"),
        ("        h, memory = pair(h, h)", "        while True: pass", "not an op", "while"),
        ('select("all", score=score)', "select()", "0 positional", "select"),
        ("among=A0)", "omong=A0)", "no option", ""),
        ("combine=combine", "combine=gate", "not a glue", ""),
        ("fresh, read", "stale, read", "not a key/value plan", ""),
        ('{"mlp.0.bias":', '{"mlp.9.bias":', "has no slot", ""),
        ('init(f32[4], "normal(0.02)", seed=7)', "init(7)", "not a parameter expression", ""),
        ("    return OrderedDict(", "    return Ordered(", "not declared", ""),
        ("kind, **kwargs):", "kind=open(1), **kwargs):", "default value", ""),
        ('    tap("last"', '    x = tap("last"', "no result", ""),
    ],
)
def test_bad_text_is_refused_with_its_place(old: str, new: str, what: str, at: str) -> None:
    text = GOLDEN.replace(old, new, 1)
    assert text != GOLDEN
    with pytest.raises(ParseError, match=what) as caught:
        parse(text)
    error = caught.value
    line, column = (int(word) for word in error.where.replace("line ", "").split(", column "))
    assert 1 <= line <= text.count("\n") + 1
    if at:
        before = text[: text.index(new) + new.index(at)]
        assert (line, column) == (before.count("\n") + 1, len(before) - before.rfind("\n"))
    assert error.expected
    assert error.found
    assert error.remedy


@pytest.mark.parametrize(
    "text", ["", "\0", "# depthc program 1", "# depthc program 1\n\0", "# depthc program 1\n" + "(" * 9999]
)
def test_text_that_is_no_program(text: str) -> None:
    with pytest.raises(ParseError):
        parse(text)


@settings(max_examples=80)
@given(st.integers(0, len(GOLDEN)), st.integers(0, 12), st.text("()[]{}.,:=*\"'\\ \nabl0123456789", max_size=4))
def test_damaged_text_is_refused_or_read(at: int, cut: int, put: str) -> None:
    with contextlib.suppress(DepthError):
        parse(GOLDEN[:at] + put + GOLDEN[at + cut :])


def test_a_class_that_is_not_data_is_refused() -> None:
    made = program([call()], [linear_block()])
    spec = pytree.TreeSpec(collections.deque, object(), [pytree.treespec_leaf()])
    with pytest.raises(DepthError, match="cannot be written"):
        str(replace(made, signature=replace(made.signature, out_spec=spec)))


def test_parameter_expressions() -> None:
    made = program([call()], [linear_block()])
    exprs = [
        Mean((Ref("a"), Mean((Ref("b"),)))),
        Svd("right", Mean((Ref("a"), Ref("b"))), Ref("c 0"), 3),
        Init(SQUARE, "zeros"),
        Init(VECTOR, "normal(1e-3)", 12),
    ]
    extra = {f"depth.{i}.x": Param(SQUARE, "parameter", expr) for i, expr in enumerate(exprs)}
    text = round_trip(replace(made, params=made.params | extra))
    assert '= svd_right(mean(ref("a"), ref("b")) - ref("c 0"), 3)' in text
