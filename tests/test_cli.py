"""The command line: every command on every kind of target; bad input is one clear message and a status."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import depthc
from depthc.cli import main
from depthc.targets import FORMS, resolve

from .optional import needs_torch_mlir

FACTORY = """
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, h):
        return h + self.down(torch.relu(self.up(self.norm(h))))

def plain():
    return nn.Sequential(nn.Embedding(9, 8), *[Layer() for _ in range(6)])

def whole():
    return plain(), (torch.ones(2, 5, dtype=torch.long),)

def named():
    return plain(), {"input": torch.ones(2, 5, dtype=torch.long)}

def both():
    return plain(), (), {"input": torch.ones(2, 5, dtype=torch.long)}

def nothing():
    return 3

def broken():
    raise KeyError("no such layer")
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    file = tmp_path / "model.py"
    file.write_text(FACTORY)
    return f"{file}:whole"


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    tiny = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 31, "bos_token_id": 1, "eos_token_id": 2}
    file.write_text(json.dumps({"model_type": "gpt2", **tiny}))
    return str(file)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(arguments) == status, capsys.readouterr()
    out, err = capsys.readouterr()
    return err if status else out


@pytest.mark.slow
def test_show(capsys: pytest.CaptureFixture[str], factory: str) -> None:
    text = said(capsys, "show", factory)
    assert depthc.parse(text).depths == (6,)
    looped = said(capsys, "show", factory, "--recipe", "tie", "-o", "loops=3")
    assert "for r in loop(3)" in looped
    found = json.loads(said(capsys, "show", factory, "--json"))
    assert (found["name"], found["depths"], found["depth"]) == ("Sequential", [6], text.removesuffix("\n"))
    assert "def forward(" in said(capsys, "show", factory, "--form", "python")
    assert "'dot' is none of" in said(capsys, "show", factory, "--form", "dot", status=2)


@needs_torch_mlir
def test_show_mlir(capsys: pytest.CaptureFixture[str], factory: str) -> None:
    assert "depth.call" in said(capsys, "show", factory, "--form", "mlir")


@pytest.mark.slow
def test_explain(capsys: pytest.CaptureFixture[str], factory: str, config: str, tmp_path: Path) -> None:
    assert "layers stored" in said(capsys, "explain", factory, "tie")
    found = json.loads(said(capsys, "explain", config, "tie", "--size", "s=64", "--json"))
    assert found["sizes"] == {"b": 1, "s": 64}
    assert found["after"]["layers_stored"] == 2
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('recipe = "tie"\n[options]\nloops = 3\n')
    said(capsys, "explain", factory, str(recipe), "--dump", str(tmp_path / "dumped"))
    assert (tmp_path / "dumped" / "report.html").is_file()


@pytest.mark.slow
def test_compile_and_what_it_saved(capsys: pytest.CaptureFixture[str], config: str, tmp_path: Path) -> None:
    out = str(tmp_path / "saved")
    found = json.loads(said(capsys, "compile", config, "tie", "--out", out, "--dump", str(tmp_path / "d"), "--json"))
    assert found["passes"] == ["1. tie(): 4 ops -> 3"]
    assert found["parameters"] == sum(p.numel() for p in depthc.load(out).parameters())
    assert (tmp_path / "d" / "01_tie.depth").is_file()
    assert "for r in loop(2)" in said(capsys, "show", out)
    assert "tie()" in said(capsys, "explain", out)
    error = said(capsys, "compile", out, "tie", "--out", out, status=1)
    assert "is compiled already" in error
    assert "remedy: give the model that it was compiled from" in error


@pytest.mark.slow
def test_bisect(capsys: pytest.CaptureFixture[str], factory: str) -> None:
    assert "first to differ: 2. tie()" in said(capsys, "bisect", factory, "loop() | tie()")
    found = json.loads(said(capsys, "bisect", factory, "loop()", "--json"))
    assert (found["first"], found["differences"][0]["largest"]) == (None, 0.0)


@pytest.mark.slow
def test_zoo(capsys: pytest.CaptureFixture[str], factory: str, config: str) -> None:
    found = json.loads(said(capsys, "zoo", factory, config, "nowhere", "-r", "tie", "-r", "tie(loops=4)", "--json"))
    assert found[factory]["tie"] == found[config]["tie"] == found[config]["tie(loops=4)"] == "legal"
    assert "4 loops do not divide the 6 layers" in found[factory]["tie(loops=4)"]
    assert "there is no model 'nowhere'" in found["nowhere"]["tie"]
    assert "yes" in said(capsys, "zoo", factory, "-r", "tie")


@pytest.mark.slow
def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = said(capsys, "demo", "--out", str(tmp_path), "--seconds", "1")
    assert "nats a byte" in text
    assert {"report.html", "depth.html", "02_route.depth"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["whole", "named", "both"])
def test_factories_may_say_what_they_take(factory: str, name: str) -> None:
    found = resolve(factory.replace("whole", name))
    assert found.model(*found.args, **found.kwargs).shape == (2, 5, 8)


def test_arguments_may_be_given(capsys: pytest.CaptureFixture[str], factory: str) -> None:
    plain = factory.replace("whole", "plain")
    assert "i64[b, s]" in said(capsys, "show", plain, "--input", "input=i64[3, 7]")
    error = said(capsys, "show", plain, "-i", "input=int[3]", status=1)
    assert "this is not an example argument" in error
    assert 'remedy: write it like "input_ids=i64[2,16]"' in error


@pytest.mark.parametrize(
    ("target", "what", "remedy"),
    [
        ("nowhere/at.all", "there is no model", "check the path"),
        ("lama", "there is no model 'lama'", "use 'llama'"),
        ("no_such_module_:f", "cannot be imported: ModuleNotFoundError", "import it in Python"),
        ("FILE:hole", "has no function 'hole'", "use 'whole'"),
        ("FILE:nothing", "returned no model", "return one of these"),
        ("FILE:broken", "raised KeyError: 'no such layer'", "call it in Python"),
        ("FOLDER/bad.json", "the config cannot be read", "check the file"),
        ("FOLDER", "the config cannot be read", "check the file"),
    ],
)
def test_bad_targets(
    capsys: pytest.CaptureFixture[str], factory: str, tmp_path: Path, target: str, what: str, remedy: str
) -> None:
    (tmp_path / "bad.json").write_text('{"model_type": "no such type"}')
    text = target.replace("FILE", factory.rpartition(":")[0]).replace("FOLDER", str(tmp_path))
    error = said(capsys, "explain", text, "tie", status=1)
    assert what in error
    assert f"remedy: {remedy}" in error
    main(["explain", text, "tie", "--json"])
    assert what in json.loads(capsys.readouterr().out)["error"]["what"]


def test_without_transformers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = said(capsys, "explain", "llama", "tie", status=1)
    assert "needs the transformers library" in error
    assert "remedy: pip install 'depthc[hf]'" in error


@pytest.mark.parametrize("arguments", ["bogus", "explain", "show FILE --bogus", "explain FILE tie -o loops"])
def test_wrong_usage(capsys: pytest.CaptureFixture[str], factory: str, arguments: str) -> None:
    assert main(arguments.replace("FILE", factory).split()) == 2
    assert "Usage" in capsys.readouterr().err


def test_help_names_every_kind_of_target(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(said(capsys, "explain", "--help").replace("│", " ").split())
    assert "module:factory" in text
    assert all(word in FORMS for word in ("config.json", "saved folder", "module:factory"))


@pytest.mark.slow
def test_the_installed_command() -> None:
    script = Path(sys.executable).with_name("depthc")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("show", "explain", "compile", "bisect", "zoo", "demo"))


@pytest.mark.slow
@pytest.mark.parametrize("page", ["quickstart.md", "doors.md"])
def test_commands_of_the_pages_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, config: str, page: str
) -> None:
    text = (Path(__file__).parent.parent / "docs" / page).read_text(encoding="utf-8")
    commands = re.findall(r"^\$ depthc (.*)$", text, re.MULTILINE)
    assert commands
    monkeypatch.chdir(Path(config).parent)
    for command in commands:
        assert said(capsys, *shlex.split(command))
