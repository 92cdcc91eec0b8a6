"""stride: layers on every q-th token (Sequence-AltUp), judged by an oracle that goes token by token in fp64."""

from __future__ import annotations

import runpy
from itertools import pairwise
from typing import Any

import oracles
import pytest
import torch
from oracles import Wide
from oracles import strided as oracle
from torch import Tensor, nn

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.codegen.python.text import python_text
from depthc.ir.errors import MlirError, RecipeError
from depthc.ir.evaluate import run
from depthc.ir.program import Merge, Program, Select, Tap
from depthc.ir.text.functions import walk
from depthc.passes.layers import with_stack
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of
from depthc.passes.stride import Stride

from .models import Spec, Stacked, ids, seeded, stack_program
from .optional import TORCH_MLIR
from .routed import (
    DOCUMENTS,
    FORWARD,
    ROWS,
    assert_same_gradients,
    captured,
    changed_last,
    counted,
    documents_of,
    logits_of,
    stepped,
    weighted,
)

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OTHERS = [kind for kind in oracles.KINDS if kind != "llama"]
CHEAP = ("post_norm", "parallel")  # the kinds that CI takes where others show the same
SOME = ["llama", *(pytest.param(k, marks=pytest.mark.slow if k in CHEAP else pytest.mark.thorough) for k in OTHERS)]


def strided(kind: str, rows: str = "full", noise: float = 0.3, **options: Any) -> DepthModule:
    """A model with layers on anchors whose scalars are far from those that they start with."""
    with Wide():
        module = lower(run_recipe(captured(kind, rows)[1], recipe_of(Stride(**options), {}))[0]).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.new_parameters().values():
            parameter.add_(torch.randn((), generator=generator, dtype=parameter.dtype) * noise)
    return module


def scalars(module: DepthModule) -> dict[str, Tensor]:
    """The new parameters, as the oracle names them."""
    named = ((name.split("."), p) for name, p in module.new_parameters().items())
    return {f"{slot}.{layer}": p for (_, _, layer, slot), p in named}


def expected_of(kind: str, rows: str, module: DepthModule, settings: oracle.Settings, **steps: bool) -> Tensor:
    model, _, inputs = captured(kind, rows)
    math = oracles.math_of(kind, model)
    return oracle.stride(math, settings, scalars(module), inputs, ROWS[rows], documents_of(rows), **steps)


def agree(kind: str, rows: str = "full", every: int = 3, **options: Any) -> None:
    """Logits, and every gradient."""
    model, _, inputs = captured(kind, rows)
    module, real = strided(kind, rows, every=every, **options), ROWS[rows]
    with Wide():
        expected = expected_of(kind, rows, module, oracle.Settings(every, **options))
        found = logits_of(module(**inputs))
    assert (found - expected)[real].abs().max() < FORWARD
    shared = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ours, new = dict(module.named_parameters()), module.new_parameters()
    assert len(new) == 3 * (8 - 2)
    names = [*shared, *new]
    theirs = [*shared.values(), *new.values()]
    assert_same_gradients(weighted(found, real), {n: ours[n] for n in names}, weighted(expected, real), theirs)


@pytest.mark.parametrize("every", [2, *(pytest.param(q, marks=pytest.mark.slow) for q in (3, 4, 20))])
def test_strides(every: int) -> None:
    agree("llama", every=every)


@pytest.mark.slow
@pytest.mark.parametrize("compute_on", ["old", pytest.param("predicted", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_architectures(kind: str, compute_on: str) -> None:
    agree(kind, "padded", compute_on=compute_on)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", pytest.param("relative_encoder", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("rows", [pytest.param("full", marks=pytest.mark.thorough), "padded"])
def test_encoders(kind: str, rows: str) -> None:
    """The layers of the paper are those of an encoder."""
    agree(kind, rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", pytest.param("hybrid", marks=pytest.mark.thorough)])
def test_anchors_begin_anew_with_every_document(kind: str) -> None:
    agree(kind, "packed")


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["full", "padded", "packed"])
def test_anchors(rows: str) -> None:
    """The set of the program is the oracle's; two tokens of padding in front are no multiple of the stride."""
    module, model = strided("llama", rows, every=3), captured("llama", rows)[0]
    op = next(op for op, _ in walk(module.program.body) if isinstance(op, Select) and op.write == "anchors")
    assert (op.rule == "stride(3)") == (rows == "full")
    settings, real = oracle.Settings(3), ROWS[rows]
    expected = torch.zeros_like(real)
    for b, row in enumerate(oracles.rows_of(oracles.math_of("llama", model), real, documents_of(rows))):
        expected[b, sorted(set(settings.anchors(row).values()))] = True
    with Wide():
        found = tapped(module.program, captured("llama", rows)[2], after={"anchors": op.write})["anchors"]
    assert torch.equal(found.mask, expected)


def tapped(program: Program, inputs: Any, **taps: dict[str, str]) -> dict[str, Any]:
    """Values `before` and `after` the layers, by the names of taps."""
    stack = program.stacks[-1]
    before, after = ([Tap(*tap) for tap in taps.get(place, {}).items()] for place in ("before", "after"))
    return lower(with_stack(program, stack, [*before, *stack.ops, *after])).eval().forward_with_aux(**inputs)[1].taps


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOME)
def test_stride_one_is_the_model(kind: str) -> None:
    model, _, inputs = captured(kind, "padded")
    with Wide():
        one, two = (logits_of(strided(kind, "padded", 0.0, every=q)(**inputs)) for q in (1, 2))
        expected = logits_of(model(**inputs))
    assert (one - expected)[ROWS["padded"]].abs().max() < 1e-12
    assert (two - expected)[ROWS["padded"]].abs().max() > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_padding_stays_as_it_is() -> None:
    """Of a stack without its outer layers: what comes in at padded tokens goes out."""
    module = strided("llama", "padded", every=2, layers=tuple(range(8)))
    _, program, inputs = captured("llama", "padded")
    with Wide():
        found, expected = (tapped(p, inputs, before={"in": "h"}, after={"out": "h"}) for p in (module.program, program))
    padded = ~ROWS["padded"]
    assert torch.equal(found["out"][padded], found["in"][padded])
    assert not torch.equal(expected["out"][padded], expected["in"][padded])


# what runs


@pytest.mark.parametrize("every", [2, 4])
def test_rows_that_reach_every_product(every: int) -> None:
    """Of two rows of nine tokens: anchors alone, but in the first and in the last layer."""
    module, (model, _, inputs) = strided("llama", every=every), captured("llama", "full")
    with Wide():
        module(**inputs)  # what is traced is not counted
        seen = counted(lambda: module(**inputs), model)
    for name in PRODUCTS:
        assert seen[name] == [18, *[2 * -(-9 // every)] * 6, 18], name


@pytest.mark.slow
def test_rows_of_padded_tokens_are_not_computed() -> None:
    module, (model, _, inputs) = strided("llama", "padded", every=2), captured("llama", "padded")
    with Wide():
        module(**inputs)
        seen = counted(lambda: module(**inputs), model)
    anchors = 4 + 3 + 1  # of 7, 6 and 1 real tokens
    for name in PRODUCTS:
        assert seen[name] == [27, *[anchors] * 6, 27], name


# step by step


@pytest.mark.parametrize("rows", ["full", pytest.param("padded", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", SOME)
def test_step_by_step(kind: str, rows: str) -> None:
    """Teacher-forced, token by token, and the oracle's own steps."""
    module, (_, _, inputs) = strided(kind, rows, every=3), captured(kind, rows)
    with Wide(), torch.no_grad():
        whole = logits_of(module(**inputs))
        parts, _ = stepped(kind, module.program, inputs)
        theirs = expected_of(kind, rows, module, oracle.Settings(3), steps=True)
    assert (parts - whole)[ROWS[rows]].abs().max() < FORWARD
    assert (parts - theirs)[ROWS[rows]].abs().max() < FORWARD


@pytest.mark.slow
@pytest.mark.parametrize("ends", [(4, 5, 6, 7, 8, 9), (4, 6, 9), (2, 8, 9)])
def test_packed_rows_in_steps_of_any_size(ends: tuple[int, ...]) -> None:
    module, (_, _, inputs) = strided("llama", "packed", every=2), captured("llama", "packed")
    with Wide(), torch.no_grad():
        whole = logits_of(module(**inputs))
        tokens = ("input_ids", "position_ids")
        out, past = module.program.start(**{n: inputs[n][:, : ends[0]] for n in tokens})
        parts = [logits_of(out)]
        for begin, end in pairwise(ends):
            out, past = module.program.step(past, **{n: inputs[n][:, begin:end] for n in tokens})
            parts.append(logits_of(out))
    assert (torch.cat(parts, 1) - whole).abs().max() < FORWARD


def test_between_anchors_inner_layers_keep_and_run_nothing() -> None:
    module, (model, _, inputs) = strided("llama", every=3), captured("llama", "full")
    with Wide(), torch.no_grad():
        _, past = module.program.start(input_ids=inputs["input_ids"][:, :5])
        for t in range(5, 9):
            before = past

            def step(t: int = t, before: Any = before) -> None:
                nonlocal past
                _, past = module.program.step(before, input_ids=inputs["input_ids"][:, t : t + 1])

            seen = counted(step, model)
            inner = 6 if t % 3 == 0 else 0
            assert all(seen[name] == [2] * (2 + inner) for name in PRODUCTS)
            kept = sorted(k.keys.count for k in past.caches.values())
            assert kept == [*[1] * 6, *[t // 3 + 1] * 6, t + 1, t + 1], "one row of an anchor, keys of anchors"


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it() -> None:
    module, (_, _, inputs) = strided("llama", every=3), captured("llama", "full")
    with Wide():
        found, other = (logits_of(module(**i)) for i in (inputs, changed_last("llama", inputs)))
    assert (found[:, :-1] - other[:, :-1]).abs().max() < 1e-12
    assert (found[:, -1] - other[:, -1]).abs().max() > 1e-6


@pytest.mark.slow
@torch.no_grad()
def test_documents_are_those_documents_alone() -> None:
    module, (_, _, inputs) = strided("llama", "packed", every=2), captured("llama", "packed")
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    with Wide():
        whole = logits_of(module(**inputs))
        for b, row in enumerate(DOCUMENTS):
            for number in row.unique():
                at = (row == number).nonzero()[:, 0]
                if len(at) > 1:
                    alone = logits_of(module(input_ids=ids[b : b + 1, at], position_ids=positions[b : b + 1, at]))
                    assert (alone - whole[b : b + 1, at]).abs().max() < 1e-12


# forms of the program


def compiled(**options: Any) -> tuple[nn.Module, DepthModule]:
    model: nn.Module = seeded(lambda: Stacked(Spec(depth=4)))
    return model, depthc.compile(stack_program(4), recipe_of("altup_sequence", options)).eval()


@pytest.mark.slow
def test_printed_parsed_saved(tmp_path: Any) -> None:
    _, module = compiled(every=2)
    assert str(depthc.parse(str(module.program))) == str(module.program)
    depthc.save(module, tmp_path / "saved")
    assert torch.equal(depthc.load(tmp_path / "saved").eval()(ids()), module(ids()))


def test_evaluate_and_python_form_are_the_module(tmp_path: Any) -> None:
    _, module = compiled(every=2)
    torch.testing.assert_close(run(module.program, (ids(),), {}), module(ids()), rtol=1e-5, atol=1e-6)
    file = tmp_path / "form.py"
    file.write_text(python_text(module.program))
    form = runpy.run_path(str(file))
    weights = form["parameters"](module.program.weights)
    torch.testing.assert_close(form["forward"](weights, ids()), module(ids()), rtol=1e-5, atol=1e-6)


def test_generation() -> None:
    """Greedy, with caches of anchors, as by the whole sequence every time."""
    _, module = compiled(every=2)
    prompt = ids()
    found = depthc.generate(module, prompt, 4)
    for _ in range(4):
        prompt = torch.cat([prompt, module(prompt)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, prompt)


@pytest.mark.slow
def test_tied_layers_have_scalars_of_their_own() -> None:
    model: nn.Module = seeded(lambda: Stacked(Spec(depth=6)))
    module = depthc.compile(model, 'tie(loops=3, sharing="cycle") | stride(every=2)', args=(ids(),))
    expected = [f"depth.stride.{layer}.{slot}" for layer in range(1, 5) for slot in ("a1", "a2", "b")]
    assert list(module.new_parameters()) == expected


@pytest.mark.skipif(not TORCH_MLIR, reason="needs torch-mlir")
def test_mlir_refuses_it() -> None:
    with pytest.raises(MlirError, match="go to all tokens of 'real'") as caught:
        compiled()[1].program.mlir()
    assert caught.value.remedy


# bad input


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"every": 0}, "option 'every'", "every=1"),
        ({"every": 2.0}, "option 'every'", "every=1"),
        ({"every": True}, "option 'every'", "every=1"),
        ({"compute_on": "new"}, "option 'compute_on'", "use"),
        ({"per": "batch"}, "option 'per'", "use"),
        ({"layers": ()}, "no such layers", "layers=(3,)"),
        ({"layers": (4,)}, "no such layers", "layers=(3,)"),
        ({"layers": (True,)}, "no such layers", "layers=(3,)"),
        ({"layers": 1}, "no such layers", "layers=(3,)"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        compiled(**options)
    assert remedy in caught.value.remedy


def test_two_layers_have_none_between() -> None:
    with pytest.raises(RecipeError, match="no such layers"):
        depthc.compile(stack_program(2), "stride")


@pytest.mark.slow
def test_a_mask_of_pairs_may_hide_documents() -> None:
    _, program, _ = captured("post_norm", "packed")
    with pytest.raises(RecipeError, match="may keep documents apart") as caught:
        run_recipe(program, recipe_of(Stride(), {}))
    assert 'per="row"' in caught.value.remedy
    assert any(isinstance(op, Merge) for op, _ in walk(run_recipe(program, recipe_of(Stride(per="row"), {}))[0].body))
