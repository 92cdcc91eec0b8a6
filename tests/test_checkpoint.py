"""Save and load: the same module in another process, each tensor once, and never a mixture of two saves."""

from __future__ import annotations

import copy
import errno
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import depthc
from depthc import checkpoint
from depthc.checkpoint import MANIFEST, PROGRAM, WEIGHTS, load, renamed, save
from depthc.codegen.module import DepthModule, lower
from depthc.ir.errors import CheckpointError
from depthc.ir.program import Program
from depthc.ir.settle import settle
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of

from .models import WIDTH, Chain, Spec, Stacked, assert_same, gradients, ids, outputs, seeded, states
from .test_errors import refused

RECIPES = ["identity", "tie", "mor"]
FILES = [WEIGHTS, PROGRAM, MANIFEST]


class Kept(Stacked):
    """A tied head, a frozen norm, and buffers of every kind, two of which are one tensor."""

    def __init__(self) -> None:
        super().__init__(Spec(attention=("masked",), sides=("rotary",), depth=5, dropout=0.1, returns="dict"))
        self.head.weight = self.embed.weight
        self.norm.weight.requires_grad_(False)
        self.register_buffer("scale", torch.rand(()) + 0.5)
        self.register_buffer("shift", torch.randn(2, WIDTH), persistent=False)
        self.register_buffer("spin", torch.randn(3, dtype=torch.complex128), persistent=False)
        self.norm.register_buffer("shift", self.shift, persistent=False)

    def forward(self, ids: Tensor, extra: Tensor | None = None) -> Any:
        out = super().forward(ids, extra)
        shift = self.shift.sum(0) - self.norm.shift[0]
        return {"logits": out["logits"] * self.scale, "last": (out["last"] + shift) * self.spin.abs().sum().float()}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return seeded(Kept)


@pytest.fixture(scope="module")
def program(model: nn.Module) -> Program:
    return depthc.capture(model, (ids(),))


def compiled(model: nn.Module, program: Program, recipe: str) -> DepthModule:
    """What `depthc.compile` makes, over a copy of the model, from a program that is captured only once."""
    own = copy.deepcopy(model)
    tensors = dict([*own.named_parameters(remove_duplicate=False), *own.named_buffers(remove_duplicate=False)])
    chosen = recipe_of(recipe, {"loops": 5} if recipe == "tie" else {})
    made, history = run_recipe(program.with_weights(program.weights | tensors), chosen)
    return lower(settle(made) if history else made, inspect.signature(model.forward), chosen, history).eval()


def assert_equal(loaded: DepthModule, saved: DepthModule, *args: Any, **kwargs: Any) -> None:
    """The same module: names, values, ties, frozen parameters, outputs, gradients, and how it was made."""
    assert loaded.training == saved.training
    assert (loaded.recipe, loaded.history, loaded.program) == (saved.recipe, saved.history, saved.program)
    assert [loaded.recipe.name, *map(str, loaded.history)] == [saved.recipe.name, *map(str, saved.history)]
    assert list(loaded.program.params) == list(saved.program.params)
    assert (loaded.add_losses, loaded.selection) == (saved.add_losses, saved.selection)
    assert type(loaded).__name__ == type(saved).__name__
    assert list(inspect.signature(loaded.forward).parameters) == list(inspect.signature(saved.forward).parameters)
    assert list(loaded.state_dict()) == list(saved.state_dict())
    assert_same(dict(loaded.state_dict()), dict(saved.state_dict()))
    assert trainable(loaded) == trainable(saved)
    assert_same(dict(loaded.named_buffers()), dict(saved.named_buffers()))
    assert_same(outputs(loaded, *args, **kwargs), outputs(saved, *args, **kwargs))
    assert_same(gradients(loaded, *args, **kwargs), gradients(saved, *args, **kwargs))


def trainable(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


# round trips


@pytest.mark.parametrize(
    ("recipe", "training"),
    [("identity", False), ("tie", True), ("mor", False), pytest.param("mor", True, marks=pytest.mark.slow)],
)
def test_round_trip(model: nn.Module, program: Program, recipe: str, training: bool, tmp_path: Path) -> None:
    module = compiled(model, program, recipe).train(training)
    module.add_losses, module.selection = not training, "training" if training else "inference"
    save(module, tmp_path / "a" / "b")
    loaded = load(tmp_path / "a" / "b")
    assert_equal(loaded, module, ids(3, 7))
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.norm.shift is loaded.shift
    assert not loaded.norm.weight.requires_grad
    assert all(t.data_ptr() % 64 == 0 for t in [*loaded.parameters(), *loaded.buffers()]), "not in the mapped file"


def test_round_trip_in_bfloat16(tmp_path: Path) -> None:
    spec = Spec(norm="rms", depth=2, dtype=torch.bfloat16)
    module = depthc.compile(seeded(lambda: Stacked(spec)), "tie", (ids(),))
    save(module, tmp_path / "a")
    assert_equal(load(tmp_path / "a"), module, ids(3, 7))
    assert {t.dtype for t in stored(tmp_path / "a").values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        pytest.param("identity", torch.float32, marks=pytest.mark.thorough),
        pytest.param("mor", torch.float32, marks=pytest.mark.thorough),
        ("mor", torch.bfloat16),
    ],
)
def test_round_trip_of_llama(recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=23, num_hidden_layers=8, tie_word_embeddings=True, **sizes)
    model = seeded(lambda: transformers.LlamaForCausalLM(config).to(dtype))
    tokens = ids(2, 9)
    module = depthc.compile(model, recipe, kwargs={"input_ids": tokens, "labels": tokens}, add_losses=True)
    for training in (False, True):
        save(module.train(training), tmp_path / "a")
        loaded = load(tmp_path / "a")
        assert_equal(loaded, module, input_ids=ids(3, 7), labels=ids(3, 7))
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in stored(tmp_path / "a")
    assert (len(loaded.new_parameters()) > 0) == (recipe == "mor")


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_tensor_is_stored_once(model: nn.Module, program: Program, recipe: str, tmp_path: Path) -> None:
    module = compiled(model, program, recipe)
    save(module, tmp_path / "a")
    tensors = stored(tmp_path / "a")
    assert sum(t.nbytes for t in tensors.values()) == sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    assert {"shift", "spin", "scale"} < tensors.keys()
    assert not {"head.weight", "norm.shift"} & tensors.keys()
    with safe_open(tmp_path / "a" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_values_are_those_that_the_module_has_now(model: nn.Module, program: Program, tmp_path: Path) -> None:
    module = compiled(model, program, "tie")
    state = {name: tensor + 1 for name, tensor in module.state_dict().items()}
    state["head.weight"] = state["embed.weight"]
    module.load_state_dict(state, assign=True)
    module.get_submodule("layers.0.mlp").requires_grad_(False)
    save(module, tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert_same(dict(loaded.state_dict()), state)
    assert loaded.program == module.program
    assert loaded.head.weight is loaded.embed.weight, "assigned one tensor, though as two parameters"
    assert trainable(loaded).items() <= trainable(module).items()
    assert not loaded.get_parameter("layers.0.mlp.up.weight").requires_grad


def test_ties_are_those_that_the_module_has_now(model: nn.Module, program: Program, tmp_path: Path) -> None:
    module = compiled(model, program, "identity")
    module.head.weight = nn.Parameter(module.head.weight.detach() + 1)
    module.get_submodule("layers.1.mlp.up").weight = module.get_parameter("layers.0.mlp.up.weight")
    module.norm.shift = module.shift.clone()  # as moving to a device does
    save(module, tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert_same(outputs(loaded, ids()), outputs(module, ids()))
    assert not torch.equal(loaded.head.weight, loaded.embed.weight)
    assert loaded.get_parameter("layers.1.mlp.up.weight") is loaded.get_parameter("layers.0.mlp.up.weight")
    assert loaded.norm.shift is loaded.shift


def test_program_says_what_the_folder_holds(program: Program, tmp_path: Path) -> None:
    made, _ = run_recipe(program, recipe_of('tie(loops=5, init="average")', {}))
    module = lower(made)
    assert "= mean(" in str(made)
    save(module, tmp_path / "a")
    text = (tmp_path / "a" / PROGRAM).read_text(encoding="utf-8")
    assert "= mean(" not in text
    parsed = depthc.parse(text, {name: t for name, t in stored(tmp_path / "a").items() if name != "spin"})
    assert parsed == load(tmp_path / "a").program
    assert_same(outputs(load(tmp_path / "a"), ids()), outputs(module, ids()))


def test_loading_to_a_device(model: nn.Module, program: Program, tmp_path: Path) -> None:
    save(compiled(model, program, "tie"), tmp_path / "a")
    loaded = load(tmp_path / "a", device="meta")
    assert all(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    assert loaded(ids().to("meta"))["logits"].shape == (2, 5, 13)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class ReturnsPair(Chain):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x, super().forward(x))


ALONE = """
import pickle, sys
import torch, depthc.checkpoint
from safetensors.torch import load_file
def refuse(*_, **__): raise AssertionError("pickle")
torch.load = pickle.load = pickle.loads = refuse
pickle.Unpickler = type("Unpickler", (pickle.Unpickler,), {"__init__": refuse, "load": refuse})
before = set(sys.modules)
loaded = depthc.checkpoint.load("a")
example = load_file("example")
with torch.no_grad():
    out = loaded(example.pop("ids"))
assert out.keys() == example.keys() and all(torch.equal(out[k], example[k]) for k in out)
new = {m.split(".")[0] for m in set(sys.modules) - before}
assert not new & {"transformers", "models", "tests", "test_checkpoint"}, new
assert "transformers" not in sys.modules
try:
    depthc.checkpoint.load("pair")
except depthc.ir.errors.CheckpointError as error:
    print(error.what, "|", error.remedy)
"""


@pytest.mark.slow
def test_loading_where_the_model_is_not_known(model: nn.Module, program: Program, tmp_path: Path) -> None:
    module = compiled(model, program, "mor")
    save(module, tmp_path / "a")
    save(depthc.compile(seeded(ReturnsPair), args=(states(),)), tmp_path / "pair")
    assert isinstance(load(tmp_path / "pair")(states()), Pair)
    save_file({"ids": ids(3, 7), **outputs(module, ids(3, 7))}, tmp_path / "example")
    run = [sys.executable, "-W", "error", "-c", ALONE]
    result = subprocess.run(
        run, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert "the program cannot be read: the class" in result.stdout
    assert "is not registered" in result.stdout
    assert "| import " in result.stdout


# what cannot be saved


@pytest.fixture(scope="module")
def small() -> DepthModule:
    return depthc.compile(seeded(Chain), args=(states(),))


@pytest.fixture(scope="module")
def small_tied() -> DepthModule:
    return depthc.compile(seeded(Chain, seed=1), "tie", (states(),))


def add(module: nn.Module) -> None:
    module.adapter = nn.Linear(2, 2)


def widen(module: nn.Module) -> None:
    module.load_state_dict({name: t.double() for name, t in module.state_dict().items()}, assign=True)


def to_meta(module: nn.Module) -> None:
    module.to("meta")


@pytest.mark.parametrize(
    ("change", "what", "found"),
    [
        (add, "other tensors than its program", "adapter.bias, adapter.weight"),
        (widen, "has no values of its type", "f64[8]"),
        (to_meta, "has no values of its type", "on meta"),
    ],
)
def test_tensors_that_are_not_those_of_the_program(
    small: DepthModule, change: Callable, what: str, found: str, tmp_path: Path
) -> None:
    module = copy.deepcopy(small)
    change(module)
    error = refused(depthc.StateDictError, lambda: save(module, tmp_path / "a"))
    assert what in error.what
    assert found in error.found
    assert not list(tmp_path.iterdir())


def test_what_is_not_a_compiled_module(small: DepthModule, tmp_path: Path) -> None:
    error = refused(depthc.InputError, lambda: save(nn.Sequential(small), tmp_path / "a"))
    assert "not a compiled module" in error.what
    assert error.found == "Sequential"


def test_recipe_that_does_not_read_back(small_tied: DepthModule, tmp_path: Path) -> None:
    from depthc.passes.base import PASSES
    from depthc.passes.recipe import Recipe
    from depthc.passes.tie import Tie

    class Odd(Tie):
        def __str__(self) -> str:
            return "tie(loops=open)"

    del PASSES["odd"]
    module = copy.deepcopy(small_tied)
    module.recipe = Recipe((Odd(),))
    error = refused(CheckpointError, lambda: save(module, tmp_path / "a"))
    assert "the recipe cannot be read" in error.what
    assert not list(tmp_path.iterdir())
    module.recipe = Recipe((Tie(stack='a"b'),))
    save(module, tmp_path / "a")
    assert load(tmp_path / "a").recipe == module.recipe


@pytest.mark.parametrize("content", [{"notes.txt"}, {MANIFEST, "notes.txt"}, {WEIGHTS}, None])
def test_folder_that_holds_something_else(small: DepthModule, content: set[str] | None, tmp_path: Path) -> None:
    target = tmp_path / "a"
    if content is None:
        target.write_text("x")
    else:
        target.mkdir()
        for name in content:
            (target / name).write_text("x")
    error = refused(CheckpointError, lambda: save(small, target))
    assert "something else than a saved module" in error.what
    assert ("a" if content is None else "notes.txt" if "notes.txt" in content else WEIGHTS) in error.found
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert content is None or {path.name for path in target.iterdir()} == content


# folders that are damaged


@pytest.fixture
def folder(small_tied: DepthModule, tmp_path: Path) -> Path:
    save(small_tied, tmp_path / "a")
    return tmp_path / "a"


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def seal(folder: Path, **changes: Any) -> None:
    """Write `depthc.json` anew, as a version would whose files are these."""
    content = content_of(folder) | changes
    for name in (WEIGHTS, PROGRAM):
        with (folder / name).open("rb") as file:
            content["files"][name] = checkpoint._digest(file)
    (folder / MANIFEST).write_bytes(checkpoint._sealed(content))


def with_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = stored(folder)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    seal(folder)


def with_text(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / PROGRAM
    path.write_text(change(path.read_text()))
    seal(folder)


WEIGHT = "layers.0.linear.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no folder": (shutil.rmtree, "no saved module", "check the path"),
    "truncated weights": (lambda f: os.truncate(f / WEIGHTS, 100), f"{WEIGHTS} has changed", "copy"),
    "empty weights": (lambda f: os.truncate(f / WEIGHTS, 0), f"{WEIGHTS} has changed", "copy"),
    "truncated text": (lambda f: os.truncate(f / PROGRAM, 100), f"{PROGRAM} has changed", "copy"),
    "truncated description": (lambda f: os.truncate(f / MANIFEST, 100), "depthc.json is not JSON", "copy"),
    "not JSON": (lambda f: (f / MANIFEST).write_text("{x}"), "depthc.json is not JSON", "copy"),
    "not text": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"), "depthc.json is not JSON", "copy"),
    "deep JSON": (lambda f: (f / MANIFEST).write_text("[" * 100_000), "depthc.json is not JSON", "copy"),
    "another JSON": (lambda f: (f / MANIFEST).write_text("[1]"), "not a JSON object", "copy"),
    "newer version": (lambda f: seal(f, format=2), "newer version", "update depthc"),
    "newer keys": (lambda f: seal(f, format=2, shards=3), "newer version", "update depthc"),
    "unknown key": (lambda f: seal(f, shards=3), "unknown key 'shards'", "copy"),
    "missing key": (lambda f: (f / MANIFEST).write_text('{"format": 1}'), "lacks 'depthc'", "copy"),
    "key of another type": (lambda f: seal(f, frozen={}), "lacks 'frozen'", "copy"),
    "truth as a number": (lambda f: seal(f, add_losses=1), "lacks 'add_losses'", "copy"),
    "history": (lambda f: seal(f, history=[{"number": 1}]), "history cannot be read", "copy"),
    "history of numbers": (lambda f: seal(f, history=[1]), "history cannot be read", "copy"),
    "recipe": (lambda f: seal(f, recipe="tie(loops=2"), "recipe cannot be read: this is not a recipe", "import"),
    "unknown pass": (lambda f: seal(f, recipe="mine()"), "recipe cannot be read: there is no recipe", "import"),
    "parameters": (lambda f: seal(f, parameters=["a"]), "name different parameters", "copy"),
    "parameters as numbers": (lambda f: seal(f, parameters=[1, "a"]), "name different parameters", "copy"),
    "text": (lambda f: with_text(f, lambda t: t + "import os\n"), "program cannot be read: this cannot stand", "write"),
    "text of another version": (lambda f: with_text(f, lambda t: t.replace("1", "9", 1)), "another version", "print"),
    "text that breaks a rule": (
        lambda f: with_text(f, lambda t: t.replace("residual(h, w", "residual(y, w")),
        "program cannot",
        "correct",
    ),
    "no text": (lambda f: with_text(f, lambda t: ""), "program cannot be read: this is not a depth program", "pass"),
    "weights of no format": (lambda f: ((f / WEIGHTS).write_text("x"), seal(f)), f"{WEIGHTS} cannot be read", "copy"),
    "missing weight": (lambda f: with_weights(f, lambda t: t.pop(WEIGHT)), "lacks or adds tensors", "copy"),
    "another weight": (lambda f: with_weights(f, lambda t: t.update(x=t[WEIGHT] + 1)), "lacks or adds tensors", "copy"),
    "shape": (lambda f: with_weights(f, lambda t: t.update({WEIGHT: torch.ones(8)})), "of another type", "copy"),
    "dtype": (lambda f: with_weights(f, lambda t: t.update({WEIGHT: t[WEIGHT].half()})), "of another type", "copy"),
    **{f"no {name}": (lambda f, n=name: (f / n).unlink(), f"{name} is missing", "copy") for name in FILES},
    **{f"folder {n}": (lambda f, n=n: ((f / n).unlink(), (f / n).mkdir()), f"{n} is missing", "copy") for n in FILES},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_folder(folder: Path, damage: tuple[Callable[[Path], Any], str, str]) -> None:
    change, what, remedy = damage
    change(folder)
    error = refused(CheckpointError, lambda: load(folder))
    assert what in error.what
    assert error.remedy.startswith(remedy)
    assert str(folder) in error.where


@pytest.mark.parametrize("name", FILES)
def test_any_changed_byte(folder: Path, name: str) -> None:
    good = (folder / name).read_bytes()
    for at in {*range(0, len(good), 1 + len(good) // 200), len(good) - 1}:
        changed = bytearray(good)
        changed[at] ^= 1
        (folder / name).write_bytes(changed)
        with pytest.raises(CheckpointError):
            load(folder)
    (folder / name).write_bytes(good)
    load(folder)


def test_path_through_a_file(folder: Path) -> None:
    assert "no saved module" in refused(CheckpointError, lambda: load(folder / MANIFEST)).what
    assert "no saved module" in refused(CheckpointError, lambda: load(folder / MANIFEST / "a")).what


def test_folder_that_is_replaced_while_it_is_read(
    folder: Path, small: DepthModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_first(*args: Any) -> Any:
        save(small, folder)
        return safe_open(*args)

    monkeypatch.setattr(checkpoint, "safe_open", replace_first)
    assert "replaced while it was read" in refused(CheckpointError, lambda: load(folder)).what


# saving again, and being killed


def test_saving_again_replaces(
    small: DepthModule, small_tied: DepthModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    for module in (small, small_tied):
        save(module, "link")
        assert_equal(load(tmp_path / "real"), module, states())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == sorted(FILES)


def test_saving_a_loaded_module_over_itself(folder: Path, small_tied: DepthModule) -> None:
    save(load(folder), folder)
    assert_equal(load(folder), small_tied, states())


def test_rights_of_the_folder_are_the_usual_ones(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_full_disk(folder: Path, small: DepthModule, small_tied: DepthModule, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, *_: Any) -> None:
        path.write_bytes(b"x")
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save(small, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["a"], "what was written is removed"
    assert_equal(load(folder), small_tied, states())


def test_files_are_on_the_disk_before_they_are_in_place(
    folder: Path, small: DepthModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    sync, rename = os.fsync, os.rename

    def syncing(handle: int) -> None:
        seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        sync(handle)

    def renaming(source: Path, target: Path) -> None:
        seen.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    save(small, folder)
    made = seen[3][1]
    assert made.endswith(".depthc-new")
    assert sorted(seen[:3]) == sorted(("sync", name) for name in FILES)
    assert seen[3:] == [("sync", made), ("rename", ".a.depthc-old"), ("rename", "a"), ("sync", folder.parent.name)]


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def killed_before(operation: int) -> Iterator[None]:
    """Whatever changes files works `operation` times; the next one is cut off in its middle, and nothing runs after."""
    done = 0

    def dying(real: Callable, half: Callable | None) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done <= operation:
                return real(*args, **kwargs)
            if done == operation + 1 and half is not None:
                half(*args)
            raise Killed

        return run

    def half_of(tensors: dict, path: Path, *_: Any) -> None:
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    write = Path.write_bytes
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir"):
            patch.setattr(os, name, dying(getattr(os, name), None))
        patch.setattr(checkpoint, "save_file", dying(save_file, half_of))
        patch.setattr(Path, "write_bytes", dying(write, lambda path, data: write(path, data[: len(data) // 2])))
        yield


def state(module: DepthModule) -> tuple[str, dict[str, Any]]:
    return str(module.program), {name: tensor.tolist() for name, tensor in module.state_dict().items()}


def nothing(folder: Path, older: DepthModule) -> None:
    """No save has been here."""


def moved_aside(folder: Path, older: DepthModule) -> None:
    """A save was killed between its two renames."""
    save(older, folder)
    folder.rename(checkpoint._aside(folder))


def left_behind(folder: Path, older: DepthModule) -> None:
    """A save was killed while it removed the state before it."""
    moved_aside(folder, older)
    (checkpoint._aside(folder) / PROGRAM).unlink()
    save(older, folder.with_name("b"))
    folder.with_name("b").rename(folder)


BEFORE: list[Callable[[Path, DepthModule], Any]] = [nothing, lambda f, older: save(older, f), moved_aside, left_behind]


@pytest.mark.parametrize("before", BEFORE, ids=["nothing", "a save", "aside only", "aside left behind"])
def test_killed_at_every_operation(
    small: DepthModule, small_tied: DepthModule, before: Callable[[Path, DepthModule], Any], tmp_path: Path
) -> None:
    seen = []
    for operation in range(60):
        folder = tmp_path / str(operation) / "a"
        before(folder, small)
        try:
            with killed_before(operation):
                save(small_tied, folder)
            finished = True
        except Killed:
            finished = False
        try:
            found = "older" if state(load(folder)) == state(small) else "newer"
            assert found == "older" or state(load(folder)) == state(small_tied), "a mixture"
        except CheckpointError:
            found = "none"
        seen.append(found)
        save(small_tied, folder)
        assert state(load(folder)) == state(small_tied)
        left = [path.name for path in folder.parent.iterdir() if path != folder]
        assert all(name.endswith(".depthc-new") for name in left), "only what the killed save had begun is left"
        if finished:
            break
    assert finished
    assert operation > 8
    first = "none" if before is nothing else "older"
    turn = seen.index("newer")
    assert seen == [first] * turn + ["newer"] * (len(seen) - turn), "an older save is there until the new one is"


# names of other checkpoints


def test_renamed_keeps_moves_drops_and_reshapes() -> None:
    foreign = {"a.0.w": torch.ones(2), "a.1.w": torch.zeros(1, 3), "step": torch.ones(()), "other": torch.ones(1)}
    table = {r"a\.0\.(.*)": r"b.\1", r"a\.1\.(?P<leaf>.*)": (r"c.\g<leaf>", (3,)), "step": None}
    found = renamed(foreign, table)
    assert {name: tuple(t.shape) for name, t in found.items()} == {"b.w": (2,), "c.w": (3,), "other": (1,)}
    assert found["b.w"] is foreign["a.0.w"] or torch.equal(found["b.w"], foreign["a.0.w"])


def test_renamed_joins_equal_copies() -> None:
    foreign = {"a.0": torch.ones(2), "a.1": torch.ones(2), "a.2": torch.ones(2)}
    assert list(renamed(foreign, {r"a\.\d": "w"})) == ["w"]


@pytest.mark.parametrize(
    ("table", "what", "found"),
    [
        ({r"a\..*": "x", r".*\.0": "y"}, "'a.0' matches 2 patterns", r"a\..*, .*\.0"),
        ({r"a\.\d": "w"}, "two different tensors get the name 'w'", "a.0, a.1"),
        ({r"a\.0": "a.1"}, "two different tensors get the name 'a.1'", "a.0, a.1"),
        ({r"a\.0": ("w", (1, 2)), r"a\.1": "w"}, "two different tensors get the name 'w'", "a.0, a.1"),
        ({"a(": "x"}, "the table does not fit 'a.0': missing )", ""),
        ({"a.0": r"\1"}, "the table does not fit 'a.0': invalid group reference", ""),
        ({"a.0": ("x", (3,))}, "the table does not fit 'a.0': shape '[3]' is invalid", ""),
        ({"b": "a.0"}, "two different tensors get the name 'a.0'", "a.0, b"),
    ],
)
def test_renamed_refuses(table: dict[str, Any], what: str, found: str) -> None:
    foreign = {"a.0": torch.zeros(2), "a.1": torch.ones(2), "b": torch.zeros(2).double()}
    error = refused(depthc.StateDictError, lambda: renamed(foreign, table))
    assert what in error.what
    assert found in error.found


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a 5-layer model under `mor`, in the layout of the published code: a wrapper a recursion, which holds
    the tied layers once more, and routers of shape [1, width]."""
    found = {name: tensor for name, tensor in state.items() if not name.startswith(("depth.", "layers.1."))}
    for r in range(3):
        for router in ("mor_router", "mlp_router"):
            found[f"layers.{r + 1}.{router}.router.weight"] = state[f"depth.r.{r}.router.weight"][None]
        for name in state:
            if name.startswith("layers.1."):
                found[f"layers.{r + 1}.block.0.{name.removeprefix('layers.1.')}"] = state[name].clone()
    return found


def test_published_mixture_of_recursions(model: nn.Module, program: Program) -> None:
    module, trained = compiled(model, program, "mor"), compiled(model, program, "mor")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))
    foreign = published(trained.state_dict())
    table = {
        r"layers\.[123]\.block\.0\.(.*)": r"layers.1.\1",
        **{rf"layers\.{r + 1}\.mor_router\.router\.weight": (f"depth.r.{r}.router.weight", (WIDTH,)) for r in range(3)},
        r"layers\.\d+\.mlp_router\..*": None,
    }
    assert "layers.3.block.0.mlp.up.weight" in foreign
    module.load_state_dict(renamed(foreign, table))
    assert_same(dict(module.state_dict()), dict(trained.state_dict()))
    assert_same(outputs(module, ids(3, 7)), outputs(trained, ids(3, 7)))
    foreign["layers.2.block.0.mlp.up.weight"] += 1
    assert "two different tensors" in refused(depthc.StateDictError, lambda: renamed(foreign, table)).what
