"""The Python form of programs: it runs by itself, and computes what the program means."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import transformers.modeling_outputs  # noqa: F401 - the classes that programs return
from hypothesis import given, settings
from texts import GOLDEN, call, linear_block, program
from torch import Tensor

import depthc
from depthc.codegen.module import lower
from depthc.codegen.python.example import legal_sizes
from depthc.codegen.python.routed import Routed, on, stride
from depthc.codegen.python.text import python_text
from depthc.codegen.state_map import state_map
from depthc.ir.axes.ports import ports_of
from depthc.ir.errors import InputError, StateDictError, SubsetError
from depthc.ir.evaluate import Evaluator, WeightParams, run
from depthc.ir.params import Init, Mean, Param, Ref, Shuffle, Svd, Tile, value_of
from depthc.ir.program import Loop, Program
from depthc.ir.settle import settle
from depthc.ir.signature import device_of
from depthc.ir.tokens import TokenSet
from depthc.ir.types import Type
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import RECIPES, recipe_of

from .models import Spec, Stacked, ids, seeded
from .routed import ROWS, counted
from .test_random_stacks import specs

FILES = Path(__file__).parent / "golden"
KEEP = "keep(capacities=(1.0, 0.7, 1.0, 1.0, 0.4, 0.7, 0.1, 1.0))"


def module(text: str) -> dict[str, Any]:
    made: dict[str, Any] = {"__name__": "form"}
    exec(compile(text, "form.py", "exec", dont_inherit=True), made)
    return made


def rewritten(made: Program, recipe: str, **options: Any) -> Program:
    return run_recipe(made, recipe_of(recipe, options))[0]


def arguments(made: Program, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    return made.signature.flatten(args, kwargs or {})


def leaves(tree: Any) -> list[Any]:
    """The outputs as they come, whatever holds them."""
    return torch.utils._pytree.tree_leaves(tree)


def same(found: Any, expected: Any) -> None:
    ours, theirs = leaves(found), leaves(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b


def agree(made: Program, args: tuple = (), kwargs: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """The form is the program: parameters, outputs, taps; in every mode of it. Returns the module."""
    form, given = module(python_text(made)), arguments(made, args, kwargs)
    w = form["parameters"](made.weights)
    assert list(w) == list(made.params)
    for name, param in made.params.items():
        assert torch.equal(w[name], value_of(name, param, made.weights)), name
    for training in made.modes:
        evaluator = Evaluator(made, WeightParams(made), device_of(given), training, **options)
        found: dict[str, Any] = {}
        torch.manual_seed(1)
        values = evaluator.run(made.body, dict(given), made.signature.size_values(given))
        torch.manual_seed(1)
        out = form["forward"](w, *given.values(), training=training, taps=found, **options)
        same(out, made.signature.unflatten(values))
        assert list(found) == list(evaluator.taps)
        for name, tapped in evaluator.taps.items():
            mine = found[name]
            assert torch.equal(*(t.mask if isinstance(t, TokenSet) else t for t in (mine, tapped)))
    return form


def drawn(made: Program) -> Program:
    """A program that was read, with weights."""
    generator = torch.Generator().manual_seed(0)
    types = {n: p.type for n, p in made.params.items() if p.expr is None}
    weights = {n: torch.randn(t.sizes({}), generator=generator, dtype=torch.float64) / 3 for n, t in types.items()}
    return made.with_weights({n: w.to(types[n].dtype) for n, w in weights.items()})


@cache
def eight_layers() -> Program:
    """With dropout and a mask, in fp64; captured once, and read since."""
    return drawn(depthc.parse((FILES / "stack.depth").read_text()))


@pytest.mark.parametrize("recipe", [*RECIPES, KEEP])
def test_every_recipe(recipe: str) -> None:
    agree(rewritten(eight_layers(), recipe), (ids(3, 7),))


@cache
def program_of(kind: str) -> Program:
    """A program of four layers; the text was captured once, but for what calls operations of another library."""
    if (FILES / f"{kind}.depth").exists():
        return drawn(depthc.parse((FILES / f"{kind}.depth").read_text()))
    with oracles.Wide():
        return depthc.capture(oracles.build(kind, layers=4), kwargs=inputs_of(kind))


def inputs_of(kind: str) -> dict[str, Tensor]:
    return oracles.inputs_of(kind, ROWS["padded"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.thorough] * (k == "moe")) for k in oracles.KINDS])
def test_architectures(kind: str) -> None:
    """Layers of two kinds cannot be tied here."""
    made, inputs = program_of(kind), inputs_of(kind)
    for recipe in ("identity", "mod", "keep(capacities=(1.0, 0.7, 0.4, 1.0))"):
        agree(rewritten(made, recipe), kwargs=inputs)
    for recipe in ("albert", "mor(loops=2)", "mor_token(loops=2)") if kind != "hybrid" else ():
        agree(rewritten(made, recipe), kwargs=inputs)


def test_keys_of_other_recursions() -> None:
    made = rewritten(eight_layers(), "mor", loops=2, kv="share_first")
    assert "slots=slots" in python_text(made)
    agree(made, (ids(3, 7),))


@pytest.mark.slow
def test_constants_and_values_by_number() -> None:
    model = seeded(lambda: Stacked(Spec(depth=5, dropout=0.25, scaled=True, returns="states", dtype=torch.float64)))
    made = depthc.capture(model, (ids(),))
    text = python_text(made)
    assert 'v[f"' in text
    assert "for l in range(" in text
    agree(made, (ids(3, 4),))
    agree(rewritten(made, "mod", capacity=0.5), (ids(3, 6),))


@pytest.mark.slow
@given(specs())
@settings(max_examples=2)
def test_random_stacks(spec: Spec) -> None:
    model = seeded(lambda: Stacked(spec))
    agree(depthc.capture(model, model.example()), model.example(3, 4))


@pytest.mark.slow
def test_warm_ups_read_the_step() -> None:
    made, inputs = rewritten(eight_layers(), "mor", loops=2, warmup=10), {"ids": ids(3, 8)}
    form = agree(made, kwargs=inputs, step=3)
    w, chosen = form["parameters"](made.weights), []
    for step in (0, None):
        form["forward"](w, **inputs, training=True, step=step, taps=(taps := {}))
        chosen.append(int(taps["route.r.1.chosen"].mask.sum()))
    assert chosen[0] > chosen[1]


@pytest.mark.parametrize("recipe", ["albert", "mor"])
def test_gradients(recipe: str) -> None:
    made, inputs = settle(rewritten(eight_layers(), recipe)), {"ids": ids(3, 7)}
    compiled, form = lower(made).train(), module(python_text(made))
    w = form["parameters"](dict(compiled.named_buffers()) | dict(compiled.named_parameters(remove_duplicate=False)))
    trained = dict(compiled.named_parameters())
    torch.manual_seed(1)
    logits = [compiled(**inputs)]
    torch.manual_seed(1)
    logits.append(form["forward"](w, **inputs, training=True))
    scalars = [(x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in logits]
    wanted, found = (torch.autograd.grad(s, list(trained.values()), allow_unused=True) for s in scalars)
    for name, a, b in zip(trained, found, wanted, strict=True):
        assert (a is None and b is None) or torch.equal(a, b), name


@pytest.mark.slow
def test_what_routing_skips_is_not_computed() -> None:
    made, inputs = rewritten(program_of("llama"), "mod", capacity=0.34), inputs_of("llama")
    model = lower(made)  # over the same tensors
    form = module(python_text(made))
    w = form["parameters"](made.weights)

    def forward() -> None:
        form["forward"](w, **inputs, training=True)

    forward()  # traces the block
    expected = counted(lambda: run(made, (), inputs, training=True), model)
    found = counted(forward, model)
    assert found == expected
    batch, length = inputs["input_ids"].shape
    assert set(found["down_proj"]) == {batch * length, batch * int(0.34 * length)}


def test_blocks_are_those_of_the_program() -> None:
    """What is traced of a printed function is the block that was printed."""
    made = depthc.parse((FILES / "mor.depth").read_text())
    (routed,) = [f for f in module(python_text(made)).values() if isinstance(f, Routed)]
    assert routed.block() == made.blocks[routed.__name__]
    assert ports_of(routed.block())


def test_an_edited_function_is_what_runs() -> None:
    """Also on rows, and with torch's own functions in it."""
    made, inputs = rewritten(eight_layers(), "mod", capacity=0.34), {"ids": ids(3, 7)}
    text = python_text(made)
    assert text.count("aten.gelu(") == 1
    form = module(text.replace("aten.gelu(", "torch.nn.functional.relu("))
    edited = depthc.parse(str(made).replace("gelu(", "relu("), made.weights)
    assert edited != made
    same(form["forward"](form["parameters"](made.weights), **inputs), edited.run(**inputs))


# what the program may hold besides


def test_every_op_has_a_python_form() -> None:
    """A program with every op; what its weights are is not known, so no example is written of an SVD."""
    made = depthc.parse(GOLDEN)
    with pytest.raises(StateDictError, match="the shape of the weight") as caught:
        python_text(made)
    assert caught.value.remedy == "give the program its weights"
    plain = {n: replace(p, expr=None) if isinstance(p.expr, Svd) else p for n, p in made.params.items()}
    text = python_text(replace(made, params=plain))
    compile(text, "form.py", "exec")
    assert "if not training and done.all():\n            break" in text
    assert "with torch.set_grad_enabled(torch.is_grad_enabled() and r >= 1):" in text
    assert 'kv=(Kv("store", f"core.{r}"), Kv("fresh"), Kv("read", f"core.{r}"))' in " ".join(text.split())


def test_parameter_expressions() -> None:
    square = Type(torch.bfloat16, (4, 4))
    weights = {n: torch.randn(4, 4).to(torch.bfloat16) for n in "abc"}
    exprs = {
        "mean": Mean((Ref("a"), Ref("b"), Ref("c"))),
        "left": Svd("left", Ref("a"), Mean((Ref("b"), Ref("c"))), 2),
        "right": Svd("right", Ref("a"), Mean((Ref("b"), Ref("c"))), 2),
        "drawn": Init(square, "normal(0.5)", 3),
        "ones": Init(square, "ones"),
        "shuffled": Shuffle(Ref("b"), 2),
        "tied": Ref("c"),
        "tiled": Tile(Ref("b"), 3, 3),
    }
    params = {name: Param(square, expr=expr) for name, expr in exprs.items()} | {"a": Param(square)}
    made = replace(program([], []), params=params, weights=weights)
    w = module(python_text(made))["parameters"](weights)
    for name, param in params.items():
        assert torch.equal(w[name], value_of(name, param, weights)), name
        assert w[name].dtype is torch.bfloat16
    assert w["tied"] is weights["c"]
    found = state_map(made, replace(made, params={name: Param(square) for name in "abcd"}))
    assert found["parameters"]["left"]["from"] == 'svd_left(ref("a") - mean(ref("b"), ref("c")), 2)'
    assert found["parameters"]["a"] == {
        "shape": [4, 4],
        "dtype": "bf16",
        "kind": "parameter",
        "from": "same",
        "ties": [],
    }
    assert found["unread"] == ["d"]


def test_names_that_python_has_taken() -> None:
    """Values, blocks and indices keep apart."""
    twice = Loop("r", 2, (call(0),))
    made = drawn(program([call(0), call(1), twice], [linear_block()], ["w", "torch", "l", "layer", "r", "under"]))
    agree(made, tuple(torch.randn(7, 2, 3, 4)))
    assert "depthc.codegen" not in python_text(eight_layers())  # `on(` is not called, `attention(` is
    for label in ("r", "b", "print", "inputs"):
        ops = [replace(one, block=label) for one in (call(0), call(1))]
        again = Loop("r", 2, (replace(call(0), block=label),))
        agree(drawn(program([*ops, again], [linear_block(label)])), (torch.randn(2, 3, 4),))


@pytest.mark.slow
def test_gradient_conditions() -> None:
    """No gradient flows where the condition fails; on rows neither."""
    text, found = (FILES / "mor.depth").read_text(), []
    for grad in ('"r < 2"', '"r >= 1"', '"r >= 2"'):
        made = depthc.parse(
            text.replace('y = layer(h, past, w="layers.1")', f'y = layer(h, past, w="layers.1", grad={grad})')
        )
        weights = {n: w.requires_grad_() for n, w in drawn(made).weights.items()}
        made = made.with_weights(weights)
        form = agree(made, (ids(2, 6),))
        outs = (
            run(made, (ids(2, 6),), {}, training=True),
            form["forward"](form["parameters"](weights), ids(2, 6), training=True),
        )
        name = "layers.1.mlp.up.weight"
        wanted, got = (torch.autograd.grad(out.sum(), weights[name], allow_unused=True)[0] for out in outs)
        assert wanted is got is None or torch.equal(wanted, got)
        found.append(wanted)
    assert found[0].abs().sum() > 0
    assert found[1].abs().sum() > 0
    assert not torch.equal(found[0], found[1])
    assert found[2] is None


def test_a_mode_that_was_not_captured() -> None:
    made = replace(eight_layers(), modes=(False,))
    form = agree(made, (ids(),))
    with pytest.raises(ValueError, match="captured with training=False only"):
        form["forward"](form["parameters"](made.weights), ids(), training=True)


# golden file, script, errors


def test_golden_file() -> None:
    """`DEPTHC_GOLDEN=write` writes it anew."""
    made = depthc.parse((FILES / "mor.depth").read_text())
    text, file = python_text(made, "Model after 2. route()"), FILES / "mor.py.txt"
    if os.environ.get("DEPTHC_GOLDEN") == "write":
        file.write_text(text)
    assert file.read_text() == text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.slow
def test_the_file_runs_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "form.py"
    file.write_text((FILES / "mor.py.txt").read_text())
    done = subprocess.run([sys.executable, "-W", "error", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(2, 8, 13)"


def test_the_file_refuses_what_is_too_large() -> None:
    form = (FILES / "mor.py.txt").read_text().replace("import sys", "import sys; sys.argv = ['', '1e-9']")
    with pytest.raises(SystemExit, match="too large"):
        exec(compile(form, "form.py", "exec"), {"__name__": "__main__"})


def test_sizes_are_legal() -> None:
    signature = depthc.parse(GOLDEN).signature
    assert legal_sizes(signature) == {"b": 2, "s": 8}
    odd = replace(signature, guards=("s % 7 == 3",), ranges={"b": (4, 4), "s": (2, None)})
    assert legal_sizes(odd) == {"b": 4, "s": 3}
    never = replace(signature, guards=("s < 0",))
    assert legal_sizes(never) is None
    made = program([call()], [linear_block()])
    text = python_text(replace(made, signature=replace(made.signature, guards=("s < 0",))))
    with pytest.raises(SystemExit, match="no small sizes are legal"):
        exec(compile(text, "form.py", "exec"), {"__name__": "__main__"})


BLOCKS = """\
from depthc.codegen.python.routed import block

@block(values=2)
def scaled(h: "f32[b, s, 4]", n: "int"):
    return h * n

@block(values=1)
def running(h: "f32[b, s, 4]"):
    return h.cumsum(1)
"""


def test_blocks_that_cannot_run_on_rows() -> None:
    made = module(BLOCKS)
    scaled, running = made["scaled"], made["running"]
    h, rows = torch.ones(1, 4, 4), on(stride(torch.zeros(1, 4), 2))
    assert torch.equal(scaled(h, 2), 2 * h)
    with pytest.raises(InputError, match="argument 'n' of the block 'scaled' is a number"):
        scaled(rows.take(h), 2, on=rows)
    with pytest.raises(SubsetError, match="cumsum"):
        running(rows.take(h), on=rows)
    with pytest.raises(InputError, match="a block takes 1 arguments"):
        running(rows.take(h), h, on=rows)
    with pytest.raises(InputError, match="argument 'h' of the block 'running' has no type"):
        module(BLOCKS.replace('running(h: "f32[b, s, 4]")', "running(h)"))


def test_annotations_may_be_postponed() -> None:
    made = module("from __future__ import annotations\n" + BLOCKS)
    assert made["running"].signature == module(BLOCKS)["running"].signature
