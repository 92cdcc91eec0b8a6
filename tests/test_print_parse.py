"""Program text: everything prints short and parses back equal."""

import collections
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from texts import (
    GOLDEN,
    SQUARE,
    VECTOR,
    WIDE,
    aten,
    body,
    call,
    identity_program,
    layers,
    linear_block,
    program,
    round_trip,
    value,
)
from torch import fx
from torch.utils import _pytree as pytree

from depthc.ir.body import Input, interpret
from depthc.ir.params import Init, Mean, Param, Ref, Svd
from depthc.ir.program import Call, Kv, Loop, Merge, On, Op, Segment, Select, Stack, Tap
from depthc.ir.signature import Leaf
from depthc.ir.text.parser import parse
from depthc.ir.types import INT, Type


def test_golden_text_is_a_fixed_point() -> None:
    program = parse(GOLDEN)
    assert str(program) == GOLDEN
    kinds = {type(op) for stack in program.stacks for op in all_ops(stack.ops)}
    assert kinds == set(Op.__args__)


def all_ops(ops: Sequence[Op]) -> list[Op]:
    return [
        inner for op in ops for inner in (op, *all_ops(getattr(op, "body", ()) if not isinstance(op, Segment) else ()))
    ]


def test_golden_text_means_what_it_says() -> None:
    made = parse(GOLDEN)
    ops = made.stacks[0].ops
    layer = ops[3]
    assert layer == Call(
        "layer",
        ("h", "positions"),
        ("h",),
        tuple(f"layers.3.{n}" for n in ("norm.weight", "mlp.weight", "mlp.0.bias")),
        (1e-05,),
    )
    assert ops[4] == Call("pair", ("h", "h"), ("h", "memory"))
    assert [op.consts for op in ops[5:8]] == [(0.1,), (0.5,), (0.25,)]
    assert ops[7].params[0] == "layers.8.norm.weight"
    loop = ops[9]
    assert isinstance(loop, Loop)
    assert (loop.index, loop.count, loop.until) == ("r", 3, "done")
    gate, select, on, again, merge, last = loop.body
    assert select == Select("A1", "topk(0.5)", "score", "A0")
    assert isinstance(on, On)
    assert (on.tokens, on.reads, on.writes) == ("A1", ("h", "positions"), ("y",))
    assert on.body[0].params == ("core.{r}.norm.weight", "core.{r}.mlp.weight", "core.0.mlp.0.bias")
    assert on.body[0].grad == "r >= 1"
    assert (gate.name, again.name, again.params) == ("gate", "gate_again", ("gates.{r}.weight",))
    assert merge == Merge("h", "h", "y", "A1", merge.combine, ("g",))
    assert last.kv == (Kv("store", "core.{r}"), Kv(), Kv("read", "core.{r}"))
    assert ops[10] == Tap("last", "h")
    assert made.params["tied.weight"] == Param(Type(torch.float32, (10, 4)), "parameter", Ref("embed.weight"))
    assert made.params["scale"].kind == "buffer"
    assert made.params["depth.3.a"].expr == Svd("left", Ref("layers.3.mlp.weight"), Mean((Ref("a"), Ref("b"))), 2)
    assert made.params["depth.fresh"] == Param(VECTOR, "frozen", Init(VECTOR, "normal(0.02)", 7))
    assert {f"core.{r}.norm.weight" for r in range(3)} <= made.params.keys()
    assert made.signature.parameters == ("ids", "scale", "flags", "labels", "*rest", "kind=", "**kwargs")
    assert made.signature.inputs[1:] == (Leaf("scale", None, 2.0), Leaf("flags.fast", None, True), Leaf("flags.mask"))
    assert made.signature.outputs == ("h", "score", Leaf(""), Leaf("", None, 1), "late.0")
    assert made.signature.ranges == {"b": (2, None), "s": (2, 64)}
    assert made.signature.guards == ("s % 2 == 0",)


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (call(), 'h = layer(h, w="layers.0")'),
        (call(params=("mlp.weight",)), "h = layer(h)"),
        (call(params=("other",)), 'h = layer(h, w={"mlp.weight": "other"})'),
        (call(kv=(Kv(), Kv("store", "a"))), 'h = layer(h, w="layers.0", kv=(fresh, store("a")))'),
        (call(kv=(Kv("store", "a"), Kv("read", "a"), Kv("update", "a"))), 'kv=(store("a"), read("a"), update("a"))'),
        (call(grad="1 > 0"), 'grad="1 > 0"'),
        (call(layer="first"), 'layer="first"'),
        (Loop("r", 4, (call(),)), 'for r in loop(4):\n    h = layer(h, w="layers.0")'),
        (Loop("r", "2 * s + 1", (call(),), until="x"), "for r in loop(2 * s + 1, until=x):"),
        (Loop("r", 2, ()), "for r in loop(2):\n    pass"),
        (Select("A", "all", "x"), 'A = select("all", score=x)'),
        (Select("A", "threshold(0.5)", "x"), 'A = select("threshold(0.5)", score=x)'),
        (
            Select("A", "topk(0.5)", "x", inference="threshold(0.0)", judge="x"),
            'A = select("topk(0.5)", score=x, inference="threshold(0.0)", judge=x)',
        ),
        (Tap("h 1", "h"), 'tap("h 1", h)'),
    ],
)
def test_each_op_prints_and_parses(op: Op, text: str) -> None:
    made = program([call(), op], [linear_block()], ["x"])
    names = [name for inner in all_ops([op]) for name in getattr(inner, "params", ())]
    made = replace(made, params={name: Param(SQUARE) for name in [*made.params, *names]})
    assert text in layers(round_trip(made))


def test_regions_print_and_parse() -> None:
    combine = body([value("old"), value("new")], lambda call, old, new: call(aten.maximum.default, (old, new)))
    plain = [
        Select("A", "stride(2)", "h"),
        On("A", ("h",), ("y",), (replace(call(), writes=("y",)),)),
        Merge("h", "h", "y", "A"),
    ]
    mixed = [*plain[:2], Merge("h", "h", "y", "A", combine)]
    text = layers(round_trip(program([call(), *plain], [linear_block()])))
    assert text.endswith('with on(A, reads=(h,), writes=(y,)):\n    y = layer(h, w="layers.0")\nh = merge(h, y, A)')
    wide = [*plain[:2], Merge("h", "h", "y", "A", combine, over="A"), Merge("h", "h", "y", "A", over="A")]
    text = layers(round_trip(program([call(), *wide], [linear_block()])))
    assert text.endswith("h = merge(h, y, A, combine=combine, over=A)\nh = merge(h, y, A, over=A)")
    assert "h = merge(h, y, A, combine=combine)" in round_trip(program([call(), *mixed], [linear_block()]))


def test_segments_share_a_function() -> None:
    def glue(name: str, param: str, precise: bool = False) -> Segment:
        shape = [value("h"), Input("w", "param", SQUARE)]
        made = body(shape, lambda call, h, w: call(aten.linear.default, (h, w)))
        return Segment(name, made, ("h",), ("h",), (param,), precise)

    ops = [glue("a", "gates.0.weight"), call(), glue("a", "gates.1.weight", True), glue("b", "gates.2.weight")]
    text = round_trip(program(ops, [linear_block()]))
    assert text.count("precise=True)") == 1
    assert text.count("@segment") == 1
    assert 'h = a(h, w="gates.2", name="b")' in text


# folding


def test_equal_layers_are_one_loop() -> None:
    text = layers(round_trip(program([call(i) for i in range(32)], [linear_block()])))
    assert text == 'for l in range(32):\n    h = layer(h, w=f"layers.{l}")'


def test_tied_layers_nest() -> None:
    ops = [call(i % 4) for i in range(12)]
    text = layers(round_trip(program(ops, [linear_block()])))
    assert text == 'for _ in range(3):\n    for l in range(4):\n        h = layer(h, w=f"layers.{l}")'


def test_alternating_masks_fold_by_period() -> None:
    ops = [call(i, reads=["full" if i % 6 == 5 else "near"]) for i in range(26)]
    made = program(ops, [linear_block(sides=1)], ["near", "full"])
    expected = """\
for l in range(0, 24, 6):
    for k in range(5):
        h = layer(h, near, w=f"layers.{l + k}")
    h = layer(h, full, w=f"layers.{l + 5}")
h = layer(h, near, w="layers.24")
h = layer(h, near, w="layers.25")"""
    assert layers(round_trip(made)) == expected


def test_hybrids_fold_by_period() -> None:
    ops = [call(i, block="attention" if i % 2 else "scan") for i in range(8)]
    text = layers(round_trip(program(ops, [linear_block("scan"), linear_block("attention", slots=("mlp.weight",))])))
    assert text.splitlines()[1:] == ['    h = scan(h, w=f"layers.{l}")', '    h = attention(h, w=f"layers.{l + 1}")']


def test_irregular_layers_fold_by_runs() -> None:
    blocks = [linear_block("a"), linear_block("b", slots=("mlp.weight",), sides=0)]
    ops = [call(i, block="b" if i in (5, 7) else "a") for i in range(16)]
    text = layers(round_trip(program(ops, blocks)))
    assert [line for line in text.splitlines() if line.startswith("for")] == [
        "for l in range(5):",
        "for l in range(5, 9, 2):",
        "for l in range(9, 16):",
    ]


def test_irregular_parameters_are_listed() -> None:
    slots = ("a.weight", "b.weight")
    ops = [call(i, params=(f"layers.{i}.a.weight", "layers.0.b.weight")) for i in range(4)]
    text = layers(round_trip(program(ops, [linear_block(slots=slots)])))
    assert 'h = layer(h, w=f"layers.{l}" | {"b.weight": "layers.0.b.weight"})' in text


def test_constants_fold_as_tables_or_indices() -> None:
    block = linear_block(consts=2)
    made = program([call(i, consts=(float(i) ** 0.5, 10 * i)) for i in range(3)], [block])
    assert "c=((0.0, 1.0, 1.4142135623730951)[l], 10 * l)" in layers(round_trip(made))


def test_value_names_that_count_fold() -> None:
    sides = [f"side_{i}" for i in range(4)]
    made = program([call(i, reads=[side]) for i, side in enumerate(sides)], [linear_block(sides=1)], sides)
    assert 'h = layer(h, v[f"side_{l}"], w=f"layers.{l}")' in layers(round_trip(made))


def test_two_names_are_no_rule() -> None:
    names = ["m_27", "n_3", "m_47", "n_1"]
    ops = [call(i, reads=[n]) for i, n in enumerate(names)]
    assert "for" not in layers(round_trip(program(ops, [linear_block(sides=1)], names)))


def test_slots_fold() -> None:
    slots = [f"experts.{i}.{w}.weight" for i in range(8) for w in ("up", "down")]
    ops = [call(i, params=tuple(f"layers.{i}.{slot}" for slot in slots)) for i in range(3)]
    text = round_trip(program(ops, [linear_block(slots=slots)]))
    assert '    for l in range(8):\n        w[f"experts.{l}.up.weight"]: f32[4, 4]\n' in text


@pytest.mark.parametrize(
    "name", ["a.{r}.w", "a.{r + 1}.w", "a.{r+1}.w", "a.{2 * r}.w", 'odd "q" \\ {r}', "{r}", "lambda.0007.{r}"]
)
def test_names_over_loop_indices(name: str) -> None:
    ops = [call(), Loop("r", 2, tuple(call(params=(f"{name}.{i}",)) for i in range(3)))]
    from depthc.ir.evaluate import indexed

    names = {indexed(f"{name}.{i}", {"r": r}) for i in range(3) for r in range(2)}
    made = program(ops, [linear_block()])
    round_trip(replace(made, params=made.params | {n: Param(SQUARE) for n in names}))


# the frame


def test_parameters_that_nothing_binds_or_whose_kind_differs() -> None:
    made = program([call(i) for i in range(6)], [linear_block()])
    extra = {f"rope.{i}.inv": Param(VECTOR, "constant") for i in range(4)}
    extra |= {"layers.2.mlp.weight": Param(SQUARE, "frozen"), "layers.3.mlp.weight": Param(SQUARE, expr=Ref("x"))}
    text = round_trip(replace(made, params=made.params | extra))
    assert 'w[f"rope.{l}.inv"]: constant(f32[4])' in text
    assert 'w["layers.2.mlp.weight"]: frozen(f32[4, 4])' in text
    assert 'w["layers.3.mlp.weight"]: f32[4, 4] = ref("x")' in text
    buffers = {name: Param(SQUARE, "buffer") for name in made.params}
    assert "    w.mlp.weight: buffer(f32[4, 4])\n" in round_trip(replace(made, params=buffers))


def test_weights_give_their_order_and_stay() -> None:
    made = program([call(i) for i in range(3)], [linear_block()])
    weights = {name: torch.zeros(4, 4) for name in reversed(made.params)}
    again = parse(str(made), weights)
    assert list(again.params) == list(weights)
    assert again.weights is weights


@pytest.mark.parametrize("modes", [(False,), (True,), (True, False)])
def test_modes(modes: tuple[bool, ...]) -> None:
    round_trip(program([call()], [linear_block()], modes=modes))


class Point(NamedTuple):
    x: Any
    y: Any


@pytest.mark.parametrize(
    "tree",
    [
        "h",
        ("h",),
        ["h", ("x", None)],
        {"a": "h", 1: [], "b": {"c d": "x"}},
        Point("h", Point(1.5, ("x",))),
        collections.OrderedDict(a="h", b="x"),
        collections.OrderedDict({"a b": "h"}),
        collections.defaultdict(list, {"a": "h"}),
        collections.deque(["h", "x"], maxlen=4),
        torch.return_types.max(["h", "x"]),
        (float("nan"), float("-inf"), -3, "text", torch.bfloat16, True, "h"),
    ],
)
def test_structures_of_arguments_and_outputs(tree: Any) -> None:
    leaves, spec = pytree.tree_flatten(tree)
    outputs = tuple(leaf if leaf in ("h", "x") else Leaf("", None, leaf) for leaf in leaves)
    made = program([call()], [linear_block()], ["x"])
    text = str(replace(made, signature=replace(made.signature, outputs=outputs, out_spec=spec)))
    again = parse(text)
    assert str(again) == text
    assert again.signature.out_spec == spec
    assert repr(again.signature.outputs) == repr(outputs)


def test_arguments_keep_their_names() -> None:
    made = program([call()], [linear_block()])
    inner = pytree.tree_structure({"past": ({"k": 0}, 0)})
    old = made.signature
    inputs = (*old.inputs, Leaf("past.0.k", WIDE), Leaf("odd name", INT_TENSOR))
    spec = pytree.TreeSpec(dict, ["h", "past"], [pytree.treespec_leaf(), *inner.children()])
    signature = replace(old, parameters=("h", "past", "**kw"), inputs=inputs, in_spec=spec)
    ops = (*made.stacks[0].ops, Tap("late", "past.0.k"))
    text = round_trip(replace(made, signature=signature, body=(Stack("layers", ops),)))
    assert 'past: ({"k": f32[b, s, 4]}, leaf("odd name", i64[()]))' in text
    assert 'tap("late", v["past.0.k"])' in text


INT_TENSOR = Type(torch.int64, ())


@pytest.mark.parametrize("guard", ["s % 4 == 0", "(s) == 2*b", "max(s, 4) + b**2 <= 9", "not s == 3 or b > 1"])
def test_guards_keep_their_spelling(guard: str) -> None:
    made = program([call()], [linear_block()])
    round_trip(replace(made, signature=replace(made.signature, guards=(guard,))))


# bodies


@pytest.mark.parametrize(
    "argument",
    [
        *(0, -1, 2**63 - 1, 1.5, -0.0, 1e-05, float("inf"), float("-inf"), float("nan"), True, None, "tanh"),
        *(torch.float32, torch.bfloat16, torch.uint16, torch.strided, torch.channels_last, torch.device("cuda:0")),
        *(1 + 2j, complex(0.0, float("-inf")), [1, [2, -3]], [], slice(1, None, 2), [None, "x", torch.bool]),
    ],
)
def test_arguments_of_ops(argument: Any) -> None:
    made = body([value("h")], lambda call, h: call(operator.getitem, (h, argument)))
    round_trip(identity_program(made))


@pytest.mark.parametrize(
    ("target", "args", "text"),
    [
        (aten.add.Tensor, ("x", "y"), "x + y"),
        (aten.add.Tensor, ("x", 1), "x + 1"),
        (aten.add.Scalar, ("x", 1), "add.Scalar(x, 1)"),
        (aten.add.Tensor, ("x", "n"), "x + n"),
        (operator.add, ("n", 1), "n + 1"),
        (operator.add, ("n", "n"), "n + n"),
        (operator.mul, ("training", 0.5), "training * 0.5"),
        (operator.add, (1, 2), "operator.add(1, 2)"),
        (aten.sub.Tensor, (1, "x"), "sub.Tensor(1, x)"),
        (aten.pow.Tensor_Scalar, ("x", -2), "x ** (-2)"),
        (aten.pow.Tensor_Tensor, ("x", "y"), "x ** y"),
        (aten.matmul.default, ("x", "y"), "x @ y"),
        (aten.le.Tensor, ("x", "y"), "x <= y"),
        (aten.le.Scalar, ("x", 3), "x <= 3"),
        (aten.le.Tensor, ("x", 3), "le.Tensor(x, 3)"),
        (aten.__and__.Tensor, ("x", "y"), "x & y"),
        (aten.bitwise_and.Tensor, ("x", "y"), "bitwise_and.Tensor(x, y)"),
        (aten.neg.default, ("x",), "-x"),
        (operator.neg, ("n",), "-n"),
        (aten.bitwise_not.default, ("x",), "~x"),
        (aten.sym_size.int, ("x", 2), "x.shape[2]"),
        (aten.sym_size.int, ("x", 1), "s"),
        (operator.getitem, ("x", 0), "x[0]"),
        (operator.floordiv, ("n", 2), "n // 2"),
        (torch.sym_max, ("n", 2), "sym_max(n, 2)"),
        (aten.slice.Tensor, ("x", 1, 0, 2**63 - 1), "slice.Tensor(x, 1, 0, end)"),
        (
            torch.ops.prims.convert_element_type.default,
            ("x", torch.float32),
            "prims.convert_element_type.default(x, f32)",
        ),
        (getattr(aten.random, "from"), ("x", 1, 2), 'op["aten.random.from"](x, 1, 2)'),
        (aten.zeros.default, ([2],), "zeros([2])"),
    ],
)
def test_notation_of_ops(target: Any, args: tuple[Any, ...], text: str) -> None:
    inputs = [value("x"), value("y"), value("n", INT), Input("training", "env")]

    def build(call: Any, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        named = dict(zip("x y n training".split(), nodes, strict=True))
        return (call(target, tuple(named.get(a, a) if isinstance(a, str) else a for a in args)),)

    assert f" {text}\n" in round_trip(identity_program(body(inputs, build)))


def test_precedence_and_nesting() -> None:
    def build(call: Any, x: fx.Node) -> fx.Node:
        total = call(aten.add.Tensor, (x, call(aten.mul.Tensor, (x, 2))))
        return call(aten.pow.Tensor_Scalar, (call(aten.neg.default, (call(aten.mul.Tensor, (total, x)),)), 2))

    assert "return (-((x + x * 2) * x)) ** 2" in round_trip(identity_program(body([value("x")], build)))


def test_sizes_of_inputs_go_by_their_name() -> None:
    def build(call: Any, x: fx.Node, y: fx.Node) -> fx.Node:
        sizes = [call(aten.sym_size.int, (n, 1)) for n in (x, y, x)]
        return call(aten.reshape.default, (x, sizes))

    text = round_trip(identity_program(body([value("x"), value("y")], build)))
    assert "reshape(x, [s, y.shape[1], x.shape[1]])" in text


def test_random_ops_keep_their_order() -> None:
    def build(call: Any, x: fx.Node) -> fx.Node:
        first, second, third = (call(aten.rand_like.default, (x,)) for _ in range(3))
        return call(aten.sub.Tensor, (call(aten.mul.Tensor, (third, second)), first))

    made = body([value("x")], build)
    again = parse(round_trip(identity_program(made))).body[0].body
    x = torch.ones(2, 3, 4)
    results = []
    for one in (made, again):
        torch.manual_seed(0)
        results += interpret(one, [x])
    assert torch.equal(*results)


def test_long_bodies_stay_narrow() -> None:
    def build(call: Any, x: fx.Node) -> fx.Node:
        parts = [call(aten.add.Tensor, (x, i)) for i in range(40)]
        return call(aten.cat.default, ([call(aten.mul.Tensor, (p, p)) for p in parts], -1))

    round_trip(identity_program(body([value("x")], build)))


def test_long_lists_of_results_are_broken() -> None:
    def build(call: Any, x: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(call(aten.add.Tensor, (x, i)) for i in range(40))

    made = identity_program(body([value("x")], build))
    segment = made.body[0]
    assert isinstance(segment, Segment)
    writes = tuple(f"a = 'long, name, {i}" for i in range(40))
    round_trip(made)
    round_trip(replace(made, body=(replace(segment, writes=writes), *made.body[1:])))


def test_names_that_mean_something_else_are_replaced() -> None:
    names = ["w", "c", "s", "inf", "f32", "device", "training", "end", "lambda", "linear", "a b"]

    def build(call: Any, *nodes: fx.Node) -> fx.Node:
        return call(aten.cat.default, (list(nodes),))

    made = identity_program(body([value(n) for n in names], build))
    round_trip(replace(made, signature=replace(made.signature, parameters=("h", "**rest"), in_spec=rest_spec(names))))


def rest_spec(names: Sequence[str]) -> pytree.TreeSpec:
    leaf = pytree.treespec_leaf()
    return pytree.TreeSpec(dict, ["h", "rest"], [leaf, pytree.TreeSpec(dict, list(names), [leaf] * len(names))])


def test_names_of_blocks_that_mean_something_else() -> None:
    blocks = [linear_block("merge"), linear_block("two words", slots=("a.w",)), linear_block("Model", slots=("b.w",))]
    ops = [call(block="merge"), call(block="two words"), call(block="Model")]
    assert '@block("two words")' in round_trip(program(ops, blocks))


# random programs
