"""Programs in MLIR: printed, verified, read back, and run as native code."""

import re
from collections.abc import Callable, Sequence
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
from depthc.ir.evaluate import indexed
from depthc.ir.mlir import module_of, new_context, parse_module, verify_module
from depthc.ir.program import Call, Kv, Loop, Program, Segment, Select, Stack
from depthc.ir.settle import settle
from depthc.ir.text.functions import walk
from depthc.ir.verify import verify
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of

from .models import Spec, Stacked, assert_same, ids, seeded
from .optional import needs_torch_mlir
from .texts import GOLDEN, call, linear_block
from .texts import program as chain

pytestmark = needs_torch_mlir

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
    assert text.count('"depth.call"') == 24
    assert text.count("func.func private") == 1
    assert "dense" not in text


def test_ops_without_a_form_are_named() -> None:
    text = GOLDEN.replace("    return old + g * new", "    same = equal(old, new)\n    return old + g * new")
    with pytest.raises(MlirError, match=r"aten\.equal.*has no MLIR form(.|\n)*body 'combine'"):
        depthc.parse(text).mlir()


def test_dtypes_without_a_form_are_named() -> None:
    with pytest.raises(MlirError, match=r"no dtype torch\.uint16"):
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
    "no rule": ('rule = "topk\\(0.5\\)"', "rules = 1", 'depth.select\' op attribute "rule" is expected'),
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
    with context():
        from torch_mlir import ir

        next(op for op in module.body.operations if op.operation.name == "depth.param").attributes["kind"] = (
            ir.StringAttr.get("loan")
        )
    with pytest.raises(MlirError, match=r"'depth.param' op has the kind 'loan'"):
        verify_module(module)


# native code


@cache
def small() -> Program:
    return stacked(depth=2, attention=("plain",), scaled=True, returns="dict")


def repeated(program: Program, count: Any = 3, **options: Any) -> Program:
    """The program with its first layer in a loop, and nothing else in its stack."""
    (stack,) = program.stacks
    call = next(op for op in stack.ops if isinstance(op, Call))
    loop = Loop("r", count, (replace(call, **options),))
    return replace(program, body=tuple(Stack("layers", (loop,)) if item is stack else item for item in program.body))


@pytest.mark.slow
def test_native_code_is_the_program_at_any_size() -> None:
    run = native(small(), optimize=0)
    for args in ((ids(2, 5),), (ids(1, 9),), (ids(4, 1 + 1),)):
        kept = args[0].clone()
        found = run(*args)
        assert_same(found, small().run(*args), TOLERANCE)
        assert torch.equal(args[0], kept)
    assert list(found) == ["logits", "last"]
    with pytest.raises(InputError, match="another dtype"):
        run(ids(2, 5).float())


def test_loops_that_do_not_read_their_index_stay_loops() -> None:
    program = repeated(small())
    lowered = lower(program, module_of(program))
    (entry,) = [op for op in lowered.module.body.operations if op.attributes["sym_name"].value == "main"]
    assert str(entry).count("scf.for") == 1
    assert str(entry).count("call @depth.layer(") == 1
    assert_native(program, (ids(2, 5),), (ids(1, 3),))


def loop_of_two(inner: Sequence[Call]) -> Program:
    """A loop of some calls, and a call that reads what the loop wrote besides."""
    made = chain([Loop("r", 3, tuple(inner)), call(0, reads=("t",))], [linear_block(sides=1)], ["t"])
    weights = {name: torch.randn(4, 4) / 4 for name in made.params}
    return made.with_weights(weights)


@pytest.mark.parametrize("carried", [True, False])
def test_loops_with_several_results(carried: bool) -> None:
    """Two values that every iteration carries; one that it carries, and one that it only writes."""
    main = call(0, reads=("t",))
    side = replace(main, reads=("t" if carried else "h", "h"), writes=("t",))
    program = loop_of_two([main, side] if carried else [replace(main, reads=("h", "h")), side])
    lowered = lower(program, module_of(program))
    (entry,) = [op for op in lowered.module.body.operations if op.attributes["sym_name"].value == "main"]
    assert str(entry).count("scf.for") == carried
    assert_native(program, (torch.randn(2, 3, 4), torch.randn(2, 3, 4)))


def test_loops_that_read_their_index_are_unrolled() -> None:
    first = next(op for op, _ in walk(small().body) if isinstance(op, Call)).params
    program = repeated(small(), 2, params=tuple(name.replace(".0.", ".{1 - r}.", 1) for name in first))
    lowered = lower(program, module_of(program))
    (entry,) = [op for op in lowered.module.body.operations if op.attributes["sym_name"].value == "main"]
    assert "scf.for" not in str(entry)
    assert str(entry).count("call @depth.layer(") == 2
    assert len(lowered.params) == len({n for op, _ in walk(small().body) for n in getattr(op, "params", ())})
    assert_native(program, (ids(2, 5),))


ECHO = """\
# depthc program 1

@block
def main(h: f32[b, s, 4]):
    return h + h

@segment
def free(h: f32[b, s, 4]):
    one = ones([3])
    return one, h

def Echo(x: f32[b, s, 4]):
    sizes(1 <= b, 1 <= s)
    with stack("layers"):
        h = main(x)
        h = main(h)
    one, same = free(h)
    return x, h, one, same, x
"""


def test_results_may_be_arguments_constants_and_each_other() -> None:
    program, x = depthc.parse(ECHO), torch.randn(2, 3, 4)
    assert_native(program, (x,), (torch.randn(5, 1, 4),), (x.transpose(0, 1),))
    run = native(program, optimize=0)
    for _ in range(3):
        found = run(x)
    found[0].zero_()
    assert x.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: repeated(p, kv=(Kv("share", "s"),)), "calls whose keys and values follow a plan(.|\n)*share s"),
        (lambda p: repeated(p, "s"), "loops whose count is a size have no native form"),
        (lambda p: _until(repeated(p)), "loops that end by the data have no native form(.|\n)*depth.loop"),
    ],
)
def test_what_has_no_native_form_is_refused(change: Callable[[Program], Program], message: str) -> None:
    program = change(small())
    with pytest.raises(MlirError, match=message):
        native(program)


def _until(program: Program) -> Program:
    (stack,) = program.stacks
    (loop,) = stack.ops
    ending = Stack("layers", (replace(loop, until=loop.body[0].writes[0]),))
    return replace(program, body=tuple(ending if item is stack else item for item in program.body))


def test_ops_without_native_code_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.special.bessel_j0(self.linear(x))

    model = nn.Sequential(*[Odd() for _ in range(2)])
    program = depthc.capture(model, (torch.ones(2, 3, 4),))
    assert "torch.aten.special_bessel_j0" in program.mlir()
    with pytest.raises(MlirError, match=r"body 'odd' .*test_mlir.py(.|\n)*special_bessel_j0"):
        native(program)


def test_weights_and_arguments_are_on_the_cpu() -> None:
    with pytest.raises(MlirError, match="weights on another device"):
        native(small().with_weights({name: w.to("meta") for name, w in small().weights.items()}))
    with pytest.raises(MlirError, match="arguments on another device"):
        native(small(), optimize=0)(ids(2, 5).to("meta"))


def forms(program: Program) -> tuple[Program, ...]:
    """A program as captured, with its layers in a loop that has their names by its index, and tied."""
    body = tuple(looped(item) if isinstance(item, Stack) else item for item in program.body)
    rolled = replace(program, body=body)
    verify(rolled)
    return program, rolled, run_recipe(program, recipe_of("tie", {"loops": 2}))[0]


def looped(stack: Stack) -> Stack:
    """A stack of calls that differ in the number of their layer alone, as a loop over that number."""
    first, *others = stack.ops
    assert isinstance(first, Call)
    names = tuple(name.replace(".0.", ".{r}.", 1) for name in first.params)
    assert [call.params for call in others] == [
        tuple(indexed(n, {"r": r + 1}) for n in names) for r in range(len(others))
    ]
    return replace(stack, ops=(Loop("r", len(stack.ops), (replace(first, params=names),)),))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", pytest.param("t5", marks=pytest.mark.thorough)])
def test_native_code_of_transformers_and_their_looped_and_tied_forms(name: str) -> None:
    args, kwargs = ZOO[name].example()
    program, other = depthc.capture(ZOO[name].build(), args, kwargs), ZOO[name].elsewhere()
    for form in forms(program):
        run = native(form, optimize=0)
        for given, named in ((args, kwargs), other):
            with torch.no_grad():
                assert_same(run(*given, **named), form.run(*given, **named), TOLERANCE)


def as_trained(program: Program) -> Program:
    """The program with the rules of training in inference too."""

    def change(ops: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            replace(op, inference=None, judge=None)
            if isinstance(op, Select)
            else replace(op, body=change(op.body))
            if isinstance(op, Loop)
            else op
            for op in ops
        )

    body = (replace(item, ops=change(item.ops)) if isinstance(item, Stack) else item for item in program.body)
    return replace(program, body=tuple(body))


REPLACED = """\
# depthc program 1

@block
def layer(h: f32[b, s, 4]):
    return h + h

@segment
def tail(h: f32[b, s, 4]):
    merged = reshape(h, [-1, 4])
    split = reshape(merged, [b, -1, 2, 2])
    flat = flatten.using_ints(split, 1, 3)
    apart = unflatten.int(flat, 1, [-1, 2])
    twice = repeat(unsqueeze(sum.dim_IntList(h, [0]), 0), [b, 3, 1])
    most = cummax(h, 1)
    sorted = sort.stable(h * 0, stable=True, dim=1, descending=True)
    picked = index.Tensor(h, [unsqueeze(arange(b, device=device), 1), unsqueeze(arange(b, device=device) * 0 - 1, 0)])
    truths = (h > 0) & (h < 1) | (h > 2)
    soft = gelu(h * 4, approximate="tanh")
    open = scaled_dot_product_attention(h, h, h, h @ transpose.int(h, 1, 2) > 9)
    causal = scaled_dot_product_attention(unsqueeze(h, 1), unsqueeze(h, 1), unsqueeze(h, 1), None, 0.0, True)
    return merged, split, flat, apart, twice, most[0], most[1], sorted[1], picked, truths, soft, open, causal

def Replaced(x: f32[b, s, 4]):
    sizes(1 <= b, 1 <= s)
    with stack("layers"):
        h = layer(x)
        h = layer(h)
    a, c, d, e, f, g, i, j, k, l, m, n, o = tail(h)
    return a, c, d, e, f, g, i, j, k, l, m, n, o
"""


def test_what_stands_for_an_op_is_the_op() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(shape, generator=draw).round(decimals=1),) for shape in ((3, 5, 4), (1, 1, 4), (2, 7, 4))]
    assert_native(depthc.parse(REPLACED), *inputs)


@pytest.mark.thorough
def test_native_code_of_routed_programs() -> None:
    program = stacked(depth=4, attention=("masked",), sides=("rotary",), norm="rms", mlp="swiglu")
    recursions = {"loops": 2, "sharing": "cycle"}
    for recipe, options in {"mor": recursions, "mor_token": recursions, "mod": {"capacity": 0.5}}.items():
        routed = settle(run_recipe(program, recipe_of(recipe, options))[0])
        assert_native(as_trained(routed) if recipe == "mor" else routed, (ids(2, 7),), (ids(3, 12),), (ids(1, 1),))


RULES = (
    "topk(0.01)",
    "stride(3)",
    "threshold(0.0)",
    "threshold(9.0)",
    "atleast(0.0)",
    "all",
    'topk(0.4)", within=docs',
)


@pytest.mark.parametrize("rule", ["topk(0.5)", *(pytest.param(rule, marks=pytest.mark.slow) for rule in RULES)])
def test_selections_are_native(rule: str) -> None:
    """The state is the score; many tokens tie, and in one row all of them."""
    end = "" if "within" in rule else '"'
    program = depthc.parse(SELECTED.format(rule=f'"{rule}{end}'))
    x = torch.randint(-2, 3, (4, 9, 3), generator=torch.Generator().manual_seed(3)).float()
    x[0], docs = 1, torch.arange(9).div(4, rounding_mode="floor").expand(4, 9)
    run = native(program, optimize=0)
    for rows, tokens in ((slice(0, 4), slice(0, 9)), (slice(1, 3), slice(2, 7)), (slice(0, 1), slice(0, 1))):
        given = x[rows, tokens], docs[rows, tokens]
        assert_same(run(*given), program.run(*given), 0.0)


SELECTED = """\
# depthc program 1

@segment
def gate(h: f32[b, s, 3]):
    return sum.dim_IntList(h, [-1])

@block
def layer(h: f32[b, s, 3]):
    return h * 2 + 1

@glue
def combine(old: f32[b, k, 3], new: f32[b, k, 3], g: f32[b, k]):
    return old + new * unsqueeze(g, -1)

def Selected(x: f32[b, s, 3], docs: i64[b, s]):
    sizes(1 <= b, 1 <= s)
    score = gate(x)
    with stack("layers"):
        h = layer(x)
        A = select("threshold(-3.0)", score=score)
        B = select({rule}, score=score, among=A)
        with on(B, reads=(h,), writes=(y,)):
            y = layer(h)
            y = layer(y)
        h = merge(h, y, B)
        with on(A, reads=(h,), writes=(z,)):
            z = layer(h)
        h = merge(h, z, A, combine=combine, extra=(score,))
    return h
"""
