"""Programs in MLIR: printed, verified, read back, and run as native code."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from architectures import ZOO
from torch import nn

import depthc
from depthc.codegen.mlir.lower import lower
from depthc.codegen.mlir.native import native
from depthc.ir.errors import InputError, MlirError
from depthc.ir.mlir import module_of, new_context, parse_module
from depthc.ir.program import Call, Kv, Loop, Program, Segment, Select, Stack
from depthc.ir.text.functions import walk

from .models import Spec, Stacked, assert_same, ids, seeded
from .texts import GOLDEN

pytest.importorskip("torch_mlir", reason="torch-mlir has wheels for Linux x86-64 only")

TOLERANCE = 1e-4


@cache
def golden() -> str:
    """A module with every op of the dialect."""
    return depthc.parse(GOLDEN).mlir()


@cache
def context() -> Any:
    return new_context()


def stacked(**options: Any) -> Program:
    model = seeded(lambda: Stacked(Spec(**options)))
    return depthc.capture(model, model.example())


def assert_native(program: Program, *inputs: tuple[Any, ...], **options: Any) -> None:
    run = native(program, optimize=0)
    for args in inputs:
        assert_same(run(*args, **options), program.run(*args, **options), TOLERANCE)


# printing


def test_ops_mirror_the_program() -> None:
    program = depthc.parse(GOLDEN)
    found = re.findall(r'"depth\.(\w+)"', golden())
    ops = [type(op).__name__.lower() for op, _ in walk(program.body)]
    for name in ("call", "segment", "loop", "select", "on", "merge", "tap"):
        assert found.count(name) == ops.count(name), name
    assert found.count("param") == len(program.params)
    assert found.count("stack") == len(program.stacks)
    assert (
        golden().count("func.func private")
        == len({op.body for op, _ in walk(program.body) if isinstance(op, Segment)}) + len(program.blocks) + 1
    )
    assert 'expr = "svd_left(ref(\\22layers.0.mlp.weight\\22)' in golden()
    assert 'params = ["core.{r}.norm.weight"' in golden()


def test_text_is_read_back_as_it_is() -> None:
    assert str(parse_module(golden(), context())) == golden()


def test_weights_are_named_and_never_written() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(8192, 8192) for _ in range(24)])
    text = depthc.capture(model, (torch.ones(2, 3, 8192, device="meta"),)).mlir()
    assert text.count('"depth.call"') == 24 and text.count("func.func private") == 1
    assert "dense" not in text and len(text) < 100_000


def test_torch_mlir_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_mlir"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MlirError, match="torch-mlir is not installed"):
        depthc.parse(GOLDEN).mlir()


def test_programs_for_training_alone_are_refused() -> None:
    with pytest.raises(MlirError, match="train mode only"):
        replace(depthc.parse(GOLDEN), modes=(True,)).mlir()


def test_ops_without_a_form_are_named() -> None:
    text = GOLDEN.replace("    return old + g * new", "    same = equal(old, new)\n    return old + g * new")
    with pytest.raises(MlirError, match=r"aten\.equal.*has no MLIR form(.|\n)*body 'combine'"):
        depthc.parse(text).mlir()


def test_dtypes_without_a_form_are_named() -> None:
    with pytest.raises(MlirError, match="no dtype torch.uint16"):
        depthc.parse(GOLDEN.replace("buffer(f32[4])", "buffer(u16[4])")).mlir()


# broken modules


def edited(pattern: str, new: str) -> str:
    text, count = re.subn(pattern, new, golden(), count=1)
    assert count == 1, pattern
    return text


BROKEN: dict[str, tuple[str, str, str]] = {
    "unknown block": (
        "callee = @pair",
        "callee = @pear",
        "depth.call' op calls the unknown block @pear; the nearest is @pair",
    ),
    "unknown parameter": (
        '"layers.1.mlp.weight", "',
        '"layers.1.mlp.weigh", "',
        "depth.call' op binds the unknown parameter",
    ),
    "parameter of another type": (
        'params = \\["gates.0.weight"',
        'params = ["scale"',
        "depth.segment' op binds 'scale'",
    ),
    "unreadable parameter": (
        "core.{r}.norm",
        "core.{q}.norm",
        "depth.call' op binds 'core.{q}.norm.weight', which cannot",
    ),
    "missing parameter": (
        'params = \\["gates.0.weight"\\]',
        "params = []",
        "depth.segment' op has 1 operands, expected 2",
    ),
    "wrong operands": (
        '"depth.call"\\(%11\\) {callee = @pair',
        '"depth.call"(%11) {callee = @gate',
        "depth.call' op has the operand 1 of type",
    ),
    "capacity": ("topk\\(0.5\\)", "topk(1.5)", "depth.select' op has the capacity 1.5, expected 0 < capacity <= 1"),
    "no capacity": ("topk\\(0.5\\)", "topk(nan)", "depth.select' op has the rule 'topk(nan)'"),
    "stride": ("topk\\(0.5\\)", "stride(0)", "depth.select' op has the stride 0"),
    "rule": ("topk\\(0.5\\)", "best(0.5)", "depth.select' op has the rule 'best(0.5)'"),
    "no score": (
        '"depth.select"\\(%1#1, %20\\)(.*)1, 0, 1, 0, 0>, rule = (.*)f32>, !torch.vtensor<\\[\\?,\\?\\],i1>',
        '"depth.select"(%20)\\g<1>0, 0, 1, 0, 0>, rule = \\g<2>i1>',
        "depth.select' op has the rule 'topk(0.5)' and no score",
    ),
    "no rule": ('rule = "topk\\(0.5\\)"', "rules = 1", "depth.select' op attribute \"rule\" is expected"),
    "count": ('count = "3"', 'count = "-3"', "depth.loop' op has the count -3"),
    "unreadable count": ('count = "3"', 'count = "f(3)"', "depth.loop' op has the count 'f(3)'"),
    "index": ('index = "r"', 'index = "2r"', "depth.loop' op has the index '2r'"),
    "plan": ('"fresh", "read', '"stale", "read', "depth.call' op has the key/value plan 'stale'"),
    "unreadable slot": ("store core.{r}", "store core.{q}", "depth.call' op has the key/value slot"),
    "gradient": ('grad = "r >= 1"', 'grad = "q >= 1"', "depth.call' op has the gradient condition 'q >= 1'"),
    "kind": ('kind = "frozen"', 'kind = "frosen"', "depth.param' op has the kind 'frosen'"),
    "declared twice": ('sym_name = "scale"', 'sym_name = "embed.weight"', "depth.param' op declares 'embed.weight'"),
    "unknown size": (
        'sym_name = "scale", type = !torch.vtensor<\\[4\\]',
        'sym_name = "scale", type = !torch.vtensor<[?]',
        "depth.param'",
    ),
    "no kind": ('kind = "frozen", ', "", "depth.param' op lacks a field"),
    "rows of another set": (
        '("depth.merge"\\(%arg1, %\\d+, )%\\d+',
        "\\1%20",
        "depth.merge' op merges rows that no depth.on",
    ),
    "combine": ("combine = @combine", "combine = @embed", "depth.merge' op has the operand 0 of type"),
    "unknown combine": (
        "combine = @combine",
        "combine = @combined",
        "depth.merge' op calls the unknown function @combined",
    ),
    "gathered": ("gathered = \\[true, false\\]", "gathered = [true]", "depth.on' op says of 1 reads"),
    "region": (
        "TupleConstruct %arg2, %arg3",
        "TupleConstruct %arg1, %arg3",
        "depth.on' op uses a value that it does not read",
    ),
    "tap": ('label = "last"', 'label = "last.{r}"', "depth.tap' op has the name 'last.{r}'"),
    "last op": ('"depth.yield"\\(%32\\)', '"depth.tap"(%32) {label = "x"}', "depth.on"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_modules_are_rejected_by_op(name: str) -> None:
    pattern, new, message = BROKEN[name]
    with pytest.raises(MlirError) as raised:
        parse_module(edited(pattern, new), context())
    assert message in str(raised.value)


CARRIED = """
module {{
  func.func @main(%a: !torch.vtensor<[?,8],f32>, %b: !torch.vtensor<[{there}],{dtype}>) -> !torch.vtensor<[?,8],f32> {{
    %0 = "depth.loop"(%a) ({{
    ^bb0(%x: !torch.vtensor<[?,8],f32>):
      "depth.yield"(%b) : (!torch.vtensor<[{there}],{dtype}>) -> ()
    }}) {{count = "3", index = "r"}} : (!torch.vtensor<[?,8],f32>) -> !torch.vtensor<[?,8],f32>
    return %0 : !torch.vtensor<[?,8],f32>
  }}
}}
"""


@pytest.mark.parametrize(("there", "dtype"), [("?,9", "f32"), ("?,8", "f64"), ("?", "f32"), ("?,8,1", "f32")])
def test_what_is_carried_keeps_its_type(there: str, dtype: str) -> None:
    parse_module(CARRIED.format(there="4,8", dtype="f32"), context())  # more is known of it: it fits
    with pytest.raises(MlirError, match=r"'depth.loop' op has the yielded value 0 of type .*, expected"):
        parse_module(CARRIED.format(there=there, dtype=dtype), context())


def test_broken_modules_in_memory_are_rejected() -> None:
    module = module_of(depthc.parse(GOLDEN), context())
    from depthc.ir.mlir import verify_module

    with context():
        from torch_mlir import ir

        next(op for op in module.body.operations if op.operation.name == "depth.param").attributes["kind"] = (
            ir.StringAttr.get("loan")
        )
    with pytest.raises(MlirError, match=r"'depth.param' op has the kind 'loan'"):
        verify_module(module)
