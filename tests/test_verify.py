"""Verify: every rule of the IR, broken on purpose."""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

from depthc.ir.body import Body
from depthc.ir.errors import VerifyError
from depthc.ir.params import Init, Mean, Param, Ref, Svd, Tile
from depthc.ir.program import Call, Kv, Loop, Merge, On, Op, Program, Segment, Select, Stack, Tap
from depthc.ir.signature import Leaf
from depthc.ir.text.parser import parse
from depthc.ir.types import Type
from depthc.ir.verify import verify

TEXT = """\
# depthc program 1

@segment
def embed(ids: i64[b, s]):
    w.embed.weight: f32[10, 4]
    h = embedding(w.embed.weight, ids)
    score = sum.dim_IntList(h, [-1])
    return h, score

@block
def layer(h: f32[b, s, 4], side: f32[b, s, 4]):
    w.weight: f32[4, 4]
    c.scale: float
    return linear(h, w.weight) * c.scale + side

@glue
def combine(old: f32[b, k, 4], new: f32[b, k, 4], extra: f32[b, k, 4]):
    w.gate: f32[4, 4]
    return old + linear(new, w.gate) * extra

def Model(ids: i64[b, s]):
    sizes(1 <= b, 2 <= s <= 64)
    h, score = embed(ids)
    with stack("layers"):
        h = layer(h, h, w="layers.0", c=(1.0,), kv=(store("a"),))
        A = select("topk(0.5)", score=score)
        with on(A, reads=(h,), writes=(y,)):
            y = layer(h, h, w="layers.1", c=(1.0,))
        h = merge(h, y, A, combine=combine, extra=(h,))
        for r in loop(2):
            h = layer(h, h, w=f"layers.{r}", c=(1.0,), kv=(store(f"{r}"),), grad="r >= 1")
        tap("end", h)
    return {"out": h, "score": score}
"""
WIDE = Type(torch.float32, ("b", "s", 4))


@pytest.fixture(scope="module")
def program() -> Program:
    return parse(TEXT)


def call(number: int = 0, **changes: Any) -> Call:
    """A legal application of the block."""
    made = Call("layer", ("h", "h"), ("h",), (f"layers.{number}.weight",), (1.0,))
    return replace(made, **changes)


def test_a_legal_program_passes(program: Program) -> None:
    verify(program)
    verify(with_ops(program, call(), Loop("r", 2, (call(),), until="h")))


def with_ops(program: Program, *ops: Op) -> Program:
    """The program with these ops as its only stack."""
    return replace(program, body=(program.body[0], Stack("layers", ops)))


def refused(program: Program, what: str) -> VerifyError:
    """The error of a program that breaks a rule; its text holds what, where, found and a remedy."""
    with pytest.raises(VerifyError, match=what) as caught:
        verify(program)
    error = caught.value
    assert error.where
    assert error.remedy
    assert error.expected or error.found
    return error


ROWS = (Select("A", "all", "score"), On("A", ("h",), ("y",), (call(writes=("y",)),)))


@pytest.mark.parametrize(
    ("ops", "what"),
    [
        # applications
        ([call(reads=("h", "q"))], "'q' is read before it is written"),
        ([call(reads=("h",))], "number of reads"),
        ([call(writes=("h", "x"))], "number of writes"),
        ([call(params=())], "number of parameters"),
        ([call(consts=())], "number of constants"),
        ([call(block="other")], "unknown block"),
        ([call(params=("nothing",))], "unknown parameter"),
        ([call(params=("embed.weight",))], "bound to another type"),
        ([call(params=("layers.{r}.weight",))], "name cannot be read"),
        ([call(params=("layers.{1 +}.weight",))], "name cannot be read"),
        ([call(grad="r >= 1")], "gradient condition reads an unknown name"),
        ([call(grad="open()")], "gradient condition cannot be read"),
        # key/value plans
        ([call(kv=(Kv("read", "a"),))], "read before it is stored"),
        ([call(kv=(Kv("update", "a"),))], "read before it is stored"),
        ([call(kv=(Kv("store", ""),))], "not a key/value plan"),
        ([call(kv=(Kv("fresh", "a"),))], "not a key/value plan"),
        ([call(kv=(Kv("steal", "a"),))], "not a key/value plan"),  # type: ignore[arg-type]
        ([Loop("r", 2, (call(kv=(Kv("read", "{r}"), Kv("store", "{r + 1}"))),))], "'0' is read before it is stored"),
        ([call(kv=(Kv("store", "{q}"),))], "name cannot be read"),
        # loops
        ([Loop("r", 2, (call(params=("layers.{r + 1}.weight",)),))], "unknown parameter"),
        ([Loop("r", 2, (Loop("r", 2, (call(),)),))], "no new identifier"),
        ([Loop("not", 2, (call(),))], "no new identifier"),
        ([Loop("r", "n", (call(),))], "loop count reads an unknown name"),
        ([Loop("r", "open(1)", (call(),))], "loop count cannot be read"),
        ([Loop("r", -1, (call(),))], "loop count is negative"),
        ([Loop("r", 2, (call(),), until="done")], "'done' is read before"),
        ([Loop("r", 2, (call(reads=("h", "m")), call(writes=("m",))))], "'m' is read before"),
        # selections
        ([Select("A", "best(3)", "score")], "not a selection rule"),
        ([Select("A", "topk(1.5)", "score")], "not a selection rule"),
        ([Select("A", "stride(0)", "score")], "not a selection rule"),
        ([Select("A", "threshold(x)", "score")], "a rule reads an unknown name"),
        ([Select("A", "atleast(q)", "score")], "a rule reads an unknown name"),
        ([Select("A", "topk(0.5)")], "needs a score"),
        ([Select("A", "topk(0.5)", "score", judge="score")], "only a rule for inference has a judge"),
        ([Select("A", "all", "score", inference="all", judge="nothing")], "'nothing' is read before"),
        ([Select("A", "all")], "needs a score"),
        ([Select("A", "all", "nothing")], "'nothing' is read before"),
        ([Select("A", "all", "score", among="h")], "'h' is read as a token set"),
        ([Select("A", "all", "score"), call(reads=("h", "A"))], "'A' is read as a tensor"),
        # regions
        ([On("h", ("h",), ("h",), (call(),))], "'h' is read as a token set"),
        (
            [Select("A", "all", "score"), On("A", ("h",), ("h",), (call(reads=("h", "score")),))],
            "'score' is read before",
        ),
        ([Select("A", "all", "score"), On("A", ("h",), ("y",), (call(),))], "'y' is read before"),
        ([Select("A", "all", "score"), On("A", ("q",), ("h",), ())], "'q' is read before"),
        ([Select("A", "all", "score"), On("A", ("h",), ("h", "h"), (call(),))], "two of the same name"),
        ([*ROWS, call(reads=("h", "y"))], "'y' is read as a tensor with all tokens"),
        # merges
        ([Select("A", "all", "score"), Merge("h", "h", "score", "A")], "does not hold the rows of 'A'"),
        ([*ROWS, Select("A", "all", "score"), Merge("h", "h", "y", "A")], "does not hold the rows of 'A'"),
        ([*ROWS, Select("B", "all", "score"), Merge("h", "h", "y", "B")], "does not hold the rows of 'B'"),
        ([*ROWS, Merge("h", "y", "y", "A")], "'y' is read as a tensor"),
        ([*ROWS, Merge("h", "h", "y", "A", extra=("h",))], "without a body"),
        # taps
        ([call(), Tap("t", "q")], "'q' is read before"),
        ([call(), Tap("t", "h"), Tap("t", "h")], "two of the same name: tap 't'"),
        (["pass"], "not an op"),
    ],
)
def test_broken_ops(program: Program, ops: list[Any], what: str) -> None:
    error = refused(with_ops(program, *ops), what)
    assert "stack 'layers'" in error.where or "program" in error.where


def test_an_error_names_the_layer_and_the_iteration(program: Program) -> None:
    ops = (call(), Loop("r", 3, (call(params=("layers.{r}.weight",), layer="core"),)))
    error = refused(with_ops(program, *ops), "unknown parameter")
    assert error.where == "stack 'layers', op 1 (loop), r = 2, op 0 (call core)"
    assert error.found == "layers.2.weight"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"extra": ()}, "number of values"),
        ({"params": ()}, "number of parameters"),
        ({"extra": ("y",)}, "'y' is read as a tensor"),
        ({"tokens": "h"}, "'h' is read as a token set"),
        ({"over": "h"}, "'h' is read as a token set"),
    ],
)
def test_broken_merges(program: Program, change: dict[str, Any], what: str) -> None:
    ops = program.stacks[0].ops
    refused(with_ops(program, *ops[:3], replace(ops[3], **change)), what)  # type: ignore[type-var]


def test_merge_bodies_have_one_result(program: Program) -> None:
    ops = program.stacks[0].ops
    merge = ops[3]
    assert isinstance(merge, Merge)
    two = altered(merge.combine, lambda graph, output: setattr(output, "args", (output.args[0] * 2,)))
    refused(with_ops(program, *ops[:3], replace(merge, combine=two)), "number of results")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"outputs": ("h", "q")}, "'q' is read before"),
        ({"outputs": ("h",)}, "outputs do not fit their tree"),
        ({"outputs": ("h", Leaf("x", WIDE))}, "output leaf has a type"),
        ({"inputs": ()}, "inputs do not fit their tree"),
        ({"parameters": ("other",)}, "not in the order of the parameters"),
        ({"guards": ("s % 2 ==",)}, "guard cannot be read"),
        ({"guards": ("q > 2",)}, "guard reads an unknown name"),
        ({"ranges": {"b": (3, 2)}}, "range of size 'b' is empty"),
        ({"ranges": {"b c": (3, 4)}}, "range of size"),
    ],
)
def test_broken_signatures(program: Program, change: dict[str, Any], what: str) -> None:
    refused(replace(program, signature=replace(program.signature, **change)), what)


def test_arguments_are_in_the_order_of_the_parameters(program: Program) -> None:
    leaf = pytree.treespec_leaf()
    spec = pytree.TreeSpec(dict, ["x", "ids"], [leaf, leaf])
    old = program.signature
    inputs = (Leaf("x", WIDE), *old.inputs)
    refused(
        replace(program, signature=replace(old, parameters=("ids", "x"), in_spec=spec, inputs=inputs)),
        "not in the order",
    )


@pytest.mark.parametrize(
    ("param", "what"),
    [
        (Param(Type(torch.float32, ("s",))), "size that is not a number"),
        (Param(WIDE, "secret"), "unknown kind"),  # type: ignore[arg-type]
        (Param(Type(torch.float32, (4,)), expr=Mean(())), "mean of nothing"),
        (Param(Type(torch.float32, (4,)), expr=Svd("left", Ref("a"), Mean(()), 2)), "mean of nothing"),
        (Param(Type(torch.float32, (4,)), expr=Svd("left", Ref("a"), Ref("b"), 0)), "no SVD factor"),
        (Param(Type(torch.float32, (4, 4)), expr=Tile(Ref("a"), 0)), "no row of copies"),
        (Param(Type(torch.float32, (4,)), expr=Init(Type(torch.float32, (4,)), "uniform")), "unknown law"),
    ],
)
def test_broken_parameters(program: Program, param: Param, what: str) -> None:
    refused(replace(program, params={**program.params, "x": param}), what)


def test_references_name_weights(program: Program) -> None:
    weights = {"a": torch.zeros(4)}
    tied = {**program.params, "x": Param(Type(torch.float32, (4,)), expr=Ref("b"))}
    verify(replace(program, params=tied))
    refused(replace(program, params=tied, weights=weights), "no weight 'b'")


def test_names_are_unique(program: Program) -> None:
    refused(replace(program, body=(*program.body, program.body[-1])), "two of the same name: segment or stack 'layers'")
    refused(replace(program, name="not one"), "not an identifier")
    refused(replace(program, modes=()), "no mode")
    refused(replace(program, blocks={"renamed": program.blocks["layer"]}), "another name than its key")


def test_blocks_are_used_and_fit_their_carries(program: Program) -> None:
    block = program.blocks["layer"]
    more = {**program.blocks, "more": replace(block, name="more")}
    refused(replace(program, blocks=more), "never called")
    refused(replace(program, blocks={"layer": replace(block, carries=2)}), "more carries")


# bodies


def altered(body: Body | None, change: Callable[[fx.Graph, fx.Node], Any]) -> Body:
    """A copy of a body whose graph was changed."""
    assert body is not None
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    for old, new in zip(body.graph.nodes, graph.nodes, strict=True):
        new.meta = dict(old.meta)
    change(graph, next(iter(reversed(graph.nodes))))
    return Body(graph)


def unknown_target(graph: fx.Graph, _: fx.Node) -> None:
    next(n for n in graph.nodes if n.op == "call_function").target = torch.relu


def attribute(graph: fx.Graph, output: fx.Node) -> None:
    with graph.inserting_before(output):
        graph.get_attr("weight")


def too_many_arguments(graph: fx.Graph, _: fx.Node) -> None:
    node = next(n for n in graph.nodes if n.target is torch.ops.aten.linear.default)
    node.args = (*node.args, None, 1)


def unknown_keyword(graph: fx.Graph, _: fx.Node) -> None:
    next(n for n in graph.nodes if n.target is torch.ops.aten.linear.default).kwargs = {"scale": 2}


def missing_argument(graph: fx.Graph, _: fx.Node) -> None:
    node = next(n for n in graph.nodes if n.target is torch.ops.aten.linear.default)
    node.args = node.args[:1]


def keyword_of_operator(graph: fx.Graph, output: fx.Node) -> None:
    with graph.inserting_before(output):
        graph.call_function(operator.add, (1, 2), {"x": 1})


def read_too_early(graph: fx.Graph, _: fx.Node) -> None:
    first, *_, last = (n for n in graph.nodes if n.op == "call_function")
    first.args = (last, *first.args[1:])


def described(**changes: Any) -> Callable[[fx.Graph, fx.Node], None]:
    """Change the Input of the last placeholder."""

    def change(graph: fx.Graph, _: fx.Node) -> None:
        node = [n for n in graph.nodes if n.op == "placeholder"][-1]
        node.meta["input"] = replace(node.meta["input"], **changes)

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (unknown_target, "not an op"),
        (attribute, "not closed: get_attr"),
        (too_many_arguments, "4 positional arguments, at most 3"),
        (unknown_keyword, "'scale' is not in the schema"),
        (missing_argument, "'weight' is missing"),
        (keyword_of_operator, "keywords"),
        (read_too_early, "is read before it is computed"),
        (lambda graph, output: setattr(output, "args", ((3,),)), "a result is not a value"),
        (described(kind="secret"), "not declared"),
        (described(kind="value", type=None), "wrong type or name"),
        (described(kind="param", type=None), "wrong type or name"),
        (described(kind="const", type=WIDE), "wrong type or name"),
        (described(kind="env", type=None), "wrong type or name"),
        (described(kind="value", name="h"), "two inputs of one kind"),
    ],
)
def test_broken_bodies(program: Program, change: Callable[[fx.Graph, fx.Node], Any], what: str) -> None:
    block = program.blocks["layer"]
    error = refused(replace(program, blocks={"layer": replace(block, body=altered(block.body, change))}), what)
    assert "block 'layer'" in error.where


def test_an_error_in_a_body_names_the_users_line(program: Program) -> None:
    segment = program.body[0]
    assert isinstance(segment, Segment)

    def change(graph: fx.Graph, output: fx.Node) -> None:
        unknown_target(graph, output)
        next(n for n in graph.nodes if n.op == "call_function").meta["source"] = "model.py:7 (x = relu(x))"

    broken = replace(segment, body=altered(segment.body, change))
    error = refused(replace(program, body=(broken, *program.body[1:])), "not an op")
    assert "model.py:7 (x = relu(x))" in error.where
