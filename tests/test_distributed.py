"""Staggered stacks on several processes: the plan, and what every process computes, holds and sends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from compositions import with_noise
from oracles import Wide
from processes import run_ranks
from torch import Tensor, distributed

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.ir.errors import IncrementalError, InputError
from depthc.ir.incremental import Past
from depthc.ir.program import Program
from depthc.ir.sections import sections_of
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of
from depthc.passes.stagger import Stagger
from depthc.runtime.distributed import Stage
from depthc.runtime.split import split

from .models import WIDTH, Spec, Stacked, ids, seeded
from .routed import ROWS, captured, logits_of
from .test_stagger import EVERY
from .test_stagger import compiled as compiled_kind
from .test_stagger_steps import split as growing_of

PROMPT, LENGTH, DEPTH, BATCH = 4, 9, 6, 2
MODELS: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared": {"shared": True},
    "window": {"lag": 2, "window": 2},
    "three": {"stacks": 3},
    "three shared": {"stacks": 3, "shared": True, "window": 3},
}
AT_ONCE = {"window": 2}  # tokens a step: as many as the lag at most
GENERATIONS: list[dict[str, Any]] = [{}, {"temperature": 1.0, "top_k": 5, "seed": 3}]


@cache
def plain() -> Program:
    return depthc.capture(seeded(lambda: Stacked(Spec(depth=DEPTH, dtype=torch.float64))), (ids(),))


def staggered(**options: Any) -> Program:
    return run_recipe(plain(), recipe_of(Stagger(**options), {}))[0]


@cache
def compiled(name: str) -> DepthModule:
    """A staggered model, and some noise on its new parameters: `o` is zero, and one stack alone counts."""
    return with_noise(lower(staggered(**MODELS[name])).eval())


def bytes_of(module: DepthModule, *prefixes: str) -> int:
    state = {n: t for n, t in module.state_dict().items() if n.startswith(prefixes)}
    return sum(t.numel() * t.element_size() for t in state.values())


def own_bytes(name: str, number: int) -> int:
    """What a device has to hold, by the names of the model's parameters."""
    stacks, shared = MODELS[name].get("stacks", 2), MODELS[name].get("shared", False)
    height = DEPTH if shared else DEPTH // stacks
    first = 0 if shared else number * height
    own = ["embed.", *(f"layers.{layer}." for layer in range(first, first + height)), f"depth.stagger.{number}."]
    last = ["norm.", "head.", "depth.stagger.combine"] if number == stacks - 1 else []
    return bytes_of(compiled(name), *own, *last)


# the plan


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_part_is_the_layers_of_a_section_and_what_they_read(name: str) -> None:
    parts = split(compiled(name).program).parts
    stacks = MODELS[name].get("stacks", 2)
    assert [len(part.layers) for part in parts] == [DEPTH if "shared" in name else DEPTH // stacks] * stacks
    assert [part.bytes for part in parts] == [own_bytes(name, number) for number in range(stacks)]
    for part in parts:
        assert set(part.params) == set(part.weights)  # of a compiled model
        sent = [(m.name, str(m.type), m.target) for m in part.sends]
        readers = dict.fromkeys((min(part.number + 1, stacks - 1), stacks - 1))  # the next one, and the last one
        last = part.number == stacks - 1
        assert sent == ([] if last else [(f"x{part.number}", f"f64[b, 1, {WIDTH}]", n) for n in readers])
        assert all(m in parts[m.source].sends for m in part.receives)


def test_before_weights_are_made_parts_name_the_captured_models() -> None:
    """Cross-attentions begin as copies: a device that makes them loads the weights of its own layers."""
    program = staggered()
    one, other = split(program).parts
    assert not any(n.startswith(("depth.", "layers.3.", "layers.4.", "layers.5.")) for n in one.weights)
    assert not any(n.startswith(("depth.", "layers.0.", "layers.1.", "layers.2.")) for n in other.weights)
    assert any(n.startswith("depth.stagger.1.") for n in other.params)


def test_the_table() -> None:
    lines = str(split(compiled("three").program)).splitlines()
    assert [line.split()[:2] for line in lines] == [["part", "layers"], ["0", "2"], ["1", "2"], ["2", "2"]]
    assert lines[1].endswith("x0 f64[b, 1, 8] to 1; x0 f64[b, 1, 8] to 2")
    assert lines[2].endswith("x1 f64[b, 1, 8] to 2")


@pytest.mark.parametrize("options", [{"lag": 0}, {"reinject": False}])
def test_stacks_that_need_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(IncrementalError, match="cannot run side by side"):
        split(staggered(**options))


def test_a_model_as_it_is_is_refused() -> None:
    with pytest.raises(IncrementalError, match="cannot run side by side"):
        split(plain())


def test_a_section_that_writes_over_what_is_in_front_is_refused() -> None:
    text = str(compiled("separate").program).replace("(x1, x0) = ", "(h, x0) = ").replace("crossing(x1", "crossing(h")
    program = depthc.parse(text.replace("combine(x0, x1)", "combine(x0, h)"))
    assert len(sections_of(program, program.stacks[-1])) == 2
    with pytest.raises(IncrementalError, match="section 1 of 'layers' writes over h"):
        split(program)


# processes


def processes(folder: Path, cases: Mapping[str, tuple[DepthModule, str, Mapping[str, Tensor]]]) -> list[dict[str, Any]]:
    """What every process found of every case; each is given the weights of its own part alone."""
    plans = {name: split(module.program).parts for name, (module, _, _) in cases.items()}
    (ranks,) = {len(parts) for parts in plans.values()}
    for rank in range(ranks):
        jobs = {}
        for name, (module, kind, inputs) in cases.items():
            tokens, fixed = growing_of(kind, inputs)
            own = {n: module.program.weights[n].detach().clone() for n in plans[name][rank].weights}
            job = {"text": str(module.program), "weights": own, "tokens": tokens, "fixed": fixed, "prompt": PROMPT}
            job["at_once"] = AT_ONCE.get(name, 1)
            simple = tokens.keys() == {"ids"}
            jobs[name] = job | {"ids": inputs["ids"] if simple else None, "generations": GENERATIONS if simple else []}
        torch.save((jobs, ranks), folder / f"{rank}.pt")
    run_ranks(Path(__file__).with_name("staged.py"), ranks, folder, limit=240)
    return [torch.load(folder / f"found{rank}.pt") for rank in range(ranks)]


def alone(module: DepthModule, kind: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Past]:
    """Logits of a prompt and of further tokens one by one in one process, and the past behind the last."""
    tokens, fixed = growing_of(kind, inputs)
    with Wide(), torch.no_grad():
        out, past = module.program.start(**fixed, **{n: v[:, :PROMPT] for n, v in tokens.items()})
        parts = [logits_of(out)]
        for t in range(PROMPT, LENGTH):
            out, past = module.program.step(past, **{n: v[:, t : t + 1] for n, v in tokens.items()})
            parts.append(logits_of(out))
    return torch.cat(parts, 1), past


def own_cache_bytes(program: Program, past: Past) -> list[int]:
    """What the layers of every section keep in one process."""
    (stack,) = program.stacks
    sections = sections_of(program, stack)
    found = [0] * len(sections)
    for site, kept in past.caches.items():
        op = stack.ops[int(site.rpartition(".")[2])]
        (number,) = (n for n, section in enumerate(sections) if any(call is op for call in section.calls))
        found[number] += sum(t.numel() * t.element_size() for cache in kept.caches for t in cache or ())
    return found


def check(name: str, found: list[dict[str, Any]]) -> None:
    """Results as in one process; only own weights and caches; a row a step; nothing is waited for before the layers."""
    module, last = compiled(name), len(found) - 1
    starts = range(PROMPT, LENGTH, AT_ONCE.get(name, 1))
    widths = [PROMPT, *(min(LENGTH - t, starts.step) for t in starts)]
    expected, past = alone(module, "post_norm", {"ids": ids(BATCH, LENGTH)})
    assert (found[last]["logits"] - expected).abs().max() < 1e-10
    assert [rank["weight_bytes"] for rank in found] == [own_bytes(name, number) for number in range(last + 1)]
    assert [rank["cache_bytes"] for rank in found] == own_cache_bytes(module.program, past)
    for number, rank in enumerate(found):
        assert number == last or rank["logits"] == [None] * len(widths)
        targets = [] if number == last else sorted({number + 1, last})
        sources = range(0 if number == last else max(number - 1, 0), number)  # the last one hears of all
        for step, (events, tokens) in enumerate(zip(rank["events"], widths, strict=True)):
            sends = [("send", target, (BATCH, tokens, WIDTH)) for target in targets]
            receives = [("receive", source) for source in sources]
            if step:
                assert [event for event, _ in groupby(events)] == ["layers", *sends, *receives]
            else:  # here "layers" are also those of what is derived from the program, once
                assert [event for event in events if event != "layers"] == [*receives, *sends]
        for options, tokens in zip(GENERATIONS, rank["generated"], strict=True):
            assert torch.equal(tokens, depthc.generate(module, ids(BATCH, LENGTH), 5, **options))


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    names = [name for name in MODELS if "three" not in name]
    found = processes(tmp_path, {n: (compiled(n), "post_norm", {"ids": ids(BATCH, LENGTH)}) for n in names})
    for name in names:
        check(name, [rank[name] for rank in found])


@pytest.mark.thorough
def test_three_processes(tmp_path: Path) -> None:
    names = [name for name in MODELS if "three" in name]
    found = processes(tmp_path, {n: (compiled(n), "post_norm", {"ids": ids(BATCH, LENGTH)}) for n in names})
    for name in names:
        check(name, [rank[name] for rank in found])


@pytest.mark.thorough
@pytest.mark.parametrize("kind", EVERY)
def test_any_transformer_on_two_processes(kind: str, tmp_path: Path) -> None:
    """With padding: masks, and an encoder, are made on every device."""
    case = compiled_kind(kind, "padded"), kind, captured(kind, "padded")[2]
    found = processes(tmp_path, {kind: case})
    assert (found[1][kind]["logits"] - alone(*case)[0])[ROWS["padded"]].abs().max() < 1e-10
    for events in found[0][kind]["events"][1:]:
        (sent,) = (event for event in events if event[0] == "send")
        assert sent[2][:2] == (len(ROWS["padded"]), 1)


# one process


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_as_many_ranks_as_parts() -> None:
    with pytest.raises(InputError, match="2 parts do not fit 1 ranks"):
        Stage(compiled("separate").program)
