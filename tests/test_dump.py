"""Dumps: a golden for every pass; whole or not at all, of a recipe that fails, too; where torch's tools find them."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import depthc
from depthc.codegen.dump.files import dump_of, texts_of, write
from depthc.ir.errors import DumpError, RecipeError
from depthc.ir.program import Program
from depthc.passes.base import PASSES
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipe import Recipe
from depthc.passes.stages import Stage, stages_of

from .models import Spec, Stacked, ids, seeded
from .optional import TORCH_MLIR

GOLDEN = Path(__file__).parent / "golden" / "passes"
SUFFIXES = ("depth", "json", "mlir", "py") if TORCH_MLIR else ("depth", "json", "py")
RECIPES = {
    "loop": "tie(sharing='cycle') | loop()",
    "tie": 'tie(sharing="middle_cycle")',
    "route": 'tie(sharing="middle_cycle") | route()',
    "tokenchoice": "tie(sharing='cycle') | tokenchoice()",
    "mod": "mod(capacity=0.5)",
    "widen": "widen()",
    "stride": "stride(every=2)",
    "stagger": "stagger()",
    "keep": "keep(capacities=(1.0, 1.0, 0.5, 0.5, 0.25, 0.25))",
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return seeded(lambda: Stacked(Spec(depth=6)))


@cache
def captured(model: nn.Module) -> Program:
    return depthc.capture(model, (ids(),))


def stages(model: nn.Module, recipe: str) -> tuple[Stage, ...]:
    return stages_of(captured(model), run_recipe(captured(model), Recipe.parse(recipe))[1])


def own_passes() -> list[str]:
    return sorted(name for name, kind in PASSES.items() if kind.__module__.startswith("depthc.passes."))


@pytest.mark.slow
@pytest.mark.parametrize("name", own_passes())
def test_golden_dump_of_every_pass(name: str, model: nn.Module) -> None:
    """`DEPTHC_GOLDEN=write pytest tests/test_dump.py` writes them anew."""
    assert name in RECIPES, f"the pass {name} has no golden dump: give it a recipe here"
    made = stages(model, RECIPES[name])
    for suffix in ("depth", "json"):
        text = texts_of(made[-1], made[0].program)[suffix]()
        file = GOLDEN / f"{name}.{suffix}"
        if os.environ.get("DEPTHC_GOLDEN") == "write":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        assert file.is_file(), f"the pass {name} has no golden dump: DEPTHC_GOLDEN=write pytest {__file__}"
        assert text == file.read_text(), "\n".join(
            difflib.unified_diff(file.read_text().splitlines(), text.splitlines(), "golden", "now", lineterm="")
        )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_compiled_modules_dump_every_stage(model: nn.Module, tmp_path: Path) -> None:
    compiled = depthc.compile(model, 'tie(sharing="middle_cycle") | route()', (ids(),))
    folder = compiled.dump(tmp_path / "deep" / "er")
    prefixes = ("00_capture", "01_tie", "02_route")
    assert names(folder) == [*(f"{p}.{s}" for p in prefixes for s in SUFFIXES), "report.html"]
    captured = depthc.parse((folder / "00_capture.depth").read_text(), dict(model.state_dict()))
    assert torch.equal(captured.run(ids()), model(ids()))
    assert compiled.dump(folder) == folder  # again into the same place
    depthc.save(compiled, tmp_path / "saved")
    loaded = depthc.load(tmp_path / "saved").dump(tmp_path / "loaded")
    assert names(loaded) == [*(f"00_saved.{s}" for s in SUFFIXES), "report.html"]


@pytest.mark.slow
def test_everything_compiled_in_the_block_is_dumped(model: nn.Module, tmp_path: Path) -> None:
    with depthc.dump(tmp_path):
        depthc.compile(model, "tie", (ids(),))
        depthc.compile(model, "identity", (ids(),))
    depthc.compile(model, "identity", (ids(),))
    assert names(tmp_path) == ["Stacked", "Stacked_2"]
    assert "01_tie.depth" in names(tmp_path / "Stacked")
    assert "01_tie.depth" not in names(tmp_path / "Stacked_2")


@pytest.mark.slow
def test_a_recipe_that_fails_leaves_what_was_there_before(model: nn.Module, tmp_path: Path) -> None:
    with depthc.dump(tmp_path), pytest.raises(RecipeError) as caught:
        depthc.compile(model, "loop() | tie(loops=5)", (ids(),))
    folder = tmp_path / "Stacked"
    assert {"00_capture.depth", "01_loop.depth", "02_error.txt", "report.html"} <= set(names(folder))
    assert (folder / "02_error.txt").read_text() == f"{caught.value}\n"


def test_what_cannot_be_made_is_said(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Program) -> str:
        raise depthc.DepthError("torch-mlir is not here", remedy="install it")

    monkeypatch.setattr(Program, "mlir", refuse)
    dump = dump_of(stages(model, "tie"), "tie")
    assert not [name for name in dump.files if name.endswith(".mlir")]
    assert list(dump.missing) == ["00_capture.mlir", "01_tie.mlir"]
    assert "torch-mlir is not here" in dump.files["report.html"]


def test_a_folder_that_cannot_be_written_is_refused_whole(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    dump = dump_of(stages(model, "identity"), "identity")
    with pytest.raises(DumpError, match="cannot be written") as caught:
        write(dump, tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)
    assert "remedy: name a folder that you may write" in str(caught.value)
    (tmp_path / "folder" / "report.html").mkdir(parents=True)
    with pytest.raises(DumpError):
        write(dump, tmp_path / "folder")
    assert names(tmp_path / "folder") == ["report.html"]
    assert names(tmp_path) == ["file", "folder"]


def test_maps_of_the_state_dict_say_what_became_of_every_weight(model: nn.Module) -> None:
    first, last = stages(model, "tie()")
    found = json.loads(texts_of(last, first.program)["json"]())
    assert found["parameters"].keys() == last.program.params.keys()
    read = {name for name, entry in found["parameters"].items() if entry["from"] == "same"}
    read |= {name for entry in found["parameters"].values() for name in re.findall(r'ref\("(.*?)"\)', entry["from"])}
    assert set(found["unread"]) == first.program.params.keys() - read
    assert found["unread"]


def test_logs_and_traces(model: nn.Module, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from depthc.passes import logs

    told: list[tuple[str, str]] = []

    def trace(kind: str, metadata_fn: object, payload_fn: object, expect_trace_id: bool) -> None:
        assert kind == "artifact"
        told.append((metadata_fn()["name"], payload_fn()))  # type: ignore[operator]

    monkeypatch.setattr(logs, "trace_structured", trace)
    with caplog.at_level(logging.DEBUG, "depthc"):
        found: Sequence[Stage] = stages(model, "tie")
    assert [name for name, _ in told] == ["depthc_00_capture", "depthc_01_tie"]
    assert [text for _, text in told] == [str(stage.program) for stage in found]
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if record.name.startswith("depthc")]
    assert [level for level, _ in lines] == ["DEBUG", "INFO", "DEBUG"]
    assert lines[1][1].startswith("1. tie(): 6 ops -> ")


def test_stages_of_nothing_recorded(model: nn.Module) -> None:
    program = captured(model)
    (only,) = stages_of(program, ())
    assert (only.number, only.title, only.name, only.step) == (0, "capture", "00_capture", None)
    assert only.program == program
    assert not only.program.weights
