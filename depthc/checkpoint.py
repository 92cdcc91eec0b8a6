"""Save and load: a compiled module as a folder of data; and foreign weights under our names.

The folder holds `weights.safetensors` (every tensor once), `program.txt` (the text of the program) and `depthc.json`
(the recipe, what its passes did, and the size and SHA-256 of the other two; it is sealed by a SHA-256 of its own).
Nothing in it is code. The text is read as data, and a class that it names must be known to this process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from depthc.codegen.module import DepthModule, lower
from depthc.ir.errors import CheckpointError, DepthError, InputError, RecipeError, StateDictError
from depthc.ir.params import Ref
from depthc.ir.program import Program
from depthc.ir.signature import inspect_signature
from depthc.ir.text.parser import parse
from depthc.ir.types import Type
from depthc.passes.pipeline import Step
from depthc.passes.recipe import Recipe

FORMAT = 1
WEIGHTS, PROGRAM, MANIFEST = "weights.safetensors", "program.txt", "depthc.json"
_FIELDS: Mapping[str, type] = {
    **dict.fromkeys(("depthc", "recipe", "recipe_name", "selection", "sha256"), str),
    **dict.fromkeys(("history", "parameters", "frozen"), list),
    **dict.fromkeys(("training", "add_losses"), bool),
    **{"format": int, "files": dict},
}

log = logging.getLogger("depthc.checkpoint")


def save(compiled: DepthModule, directory: str | Path) -> None:
    """Write a compiled module into a folder; `load` needs nothing else.

    The values are those that the module has now. A tensor with several names is written once. A save that is killed
    leaves what was there before, or the new state, never a part of it; one process may save to a folder at a time.

    Args:
        compiled: what `compile` returned, on any device.
        directory: a folder that does not exist, is empty, or holds an earlier save, which is replaced.

    Raises:
        InputError: not a compiled module.
        StateDictError: the module's tensors are not those of its program: added, removed, of another type, on meta.
        CheckpointError: the folder holds something else than a save, or the recipe cannot be written as text.

    Example:
        >>> import tempfile, torch, depthc
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> compiled = depthc.compile(model, recipe="tie", args=(torch.ones(2, 5, 4),), loops=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     depthc.save(compiled, folder)
        ...     loaded = depthc.load(folder)
        >>> bool((loaded(torch.ones(1, 3, 4)) == compiled(torch.ones(1, 3, 4))).all())
        True
    """
    if not isinstance(compiled, DepthModule):
        remedy = "pass the module that depthc.compile returned, taken out of any wrapper (.module, ._orig_mod)"
        raise InputError("this is not a compiled module", found=type(compiled).__name__, remedy=remedy)
    target = Path(directory).resolve()
    _check_replaceable(target)
    program = _settled(compiled)
    content, text = _content(compiled, program), str(program)
    if _described(content, text, target) != (compiled.recipe, compiled.history, program):
        remedy = "give the passes options that are numbers, strings, true values or tuples"
        raise CheckpointError("the recipe or the program does not read back from its text", remedy=remedy)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_name(f".{target.name}.{uuid4().hex[:12]}.depthc-new")
    try:
        _write(made, content, text, program.weights)
        _put(made, target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def load(directory: str | Path, device: str | torch.device = "cpu") -> DepthModule:
    """The module that `save` wrote: the same outputs, names, ties, recipe, history and program; in the same mode.

    Nothing in the folder is executed or imported, and pickle is not used. An output class, such as those of
    transformers, is found if the module that defines it has been imported.

    Args:
        directory: a folder that `save` wrote.
        device: where the parameters go.

    Raises:
        CheckpointError: no save, a damaged or incomplete one, one of a newer version; a class or pass that is unknown.

    Example:
        >>> load("nowhere")
        Traceback (most recent call last):
        ...
        depthc.ir.errors.CheckpointError: there is no saved module
          where: ...nowhere
          expected: a folder that depthc.save wrote
          remedy: check the path
    """
    folder = _existing(Path(directory).resolve())
    content = _manifest(folder)
    with _opened(folder, PROGRAM, content) as file:
        text = file.read().decode("utf-8", errors="replace")
    recipe, history, program = _described(content, text, folder)
    program = program.with_weights(_weights(folder, content, program, device))
    compiled = lower(program, inspect_signature(program.signature.parameters), recipe, history)
    compiled.add_losses, compiled.selection = content["add_losses"], content["selection"]
    for name, parameter in compiled.named_parameters():
        parameter.requires_grad_(name not in content["frozen"])
    return compiled.train(content["training"])


def renamed(
    state_dict: Mapping[str, Tensor], table: Mapping[str, str | tuple[str, Sequence[int]] | None]
) -> dict[str, Tensor]:
    """A foreign state dict under our names, for `compiled.load_state_dict`.

    Args:
        state_dict: tensors by foreign names.
        table: regular expressions over whole foreign names; for each a name of ours, in which `\\1` is what the first
            group matched, or such a name and a shape, or None to leave the entry out. A name that none matches stays.

    Raises:
        StateDictError: a name matches two patterns, or two different tensors get one name (equal ones may: they are
            copies of a tied parameter); a pattern, name or shape that cannot be used.

    Example:
        >>> foreign = {"layers.0.block.w": torch.ones(2), "layers.0.router.w": torch.ones(1, 2), "step": torch.ones(1)}
        >>> table = {r"layers\\.(\\d+)\\.block\\.(.*)": r"\\1.\\2", r".*router\\.w": ("router", (2,)), "step": None}
        >>> {name: tuple(tensor.shape) for name, tensor in renamed(foreign, table).items()}
        {'0.w': (2,), 'router': (2,)}
    """
    found, origin = dict[str, Tensor](), dict[str, str]()
    for foreign, tensor in state_dict.items():
        name, value = _renamed(foreign, tensor, table)
        if name is None:
            continue
        first, other = origin.setdefault(name, foreign), found.setdefault(name, value)
        if _type(other) != _type(value) or not torch.equal(other, value):
            expected, remedy = "one, or equal copies of a tied parameter", "map them to two names, or one to None"
            what, both = f"two different tensors get the name {name!r}", f"{first}, {foreign}"
            raise StateDictError(what, expected=expected, found=both, remedy=remedy)
    return found


def _renamed(foreign: str, tensor: Tensor, table: Mapping[str, Any]) -> tuple[str | None, Tensor]:
    """Our name and shape of an entry."""
    try:
        matches = {pattern: match for pattern in table if (match := re.fullmatch(pattern, foreign))}
        if len(matches) > 1:
            what, remedy = f"{foreign!r} matches {len(matches)} patterns", "make the patterns exclude each other"
            raise StateDictError(what, expected="one pattern or none", found=", ".join(matches), remedy=remedy)
        if not matches:
            return foreign, tensor
        ((pattern, match),) = matches.items()
        template, shape = ours if isinstance(ours := table[pattern], tuple) else (ours, tensor.shape)
        return (None, tensor) if template is None else (match.expand(template), tensor.reshape(tuple(shape)))
    except (re.error, RuntimeError) as error:
        raise StateDictError(f"the table does not fit {foreign!r}: {error}", remedy="correct its row") from None


# what is written


def _settled(compiled: DepthModule) -> Program:
    """The program over the tensors that the module has now: a parameter is one of them, or refers to one.

    Names of the same memory are one tensor. So are buffers that were one before the module was moved: that copies each.
    """
    program = compiled.program
    named = (*compiled.named_parameters(remove_duplicate=False), *compiled.named_buffers(remove_duplicate=False))
    if differ := sorted({name for name, _ in named} ^ program.params.keys()):
        found, remedy = ", ".join(differ[:3]), "save the module without what was added to it or taken out"
        raise StateDictError("the module has other tensors than its program", found=found, remedy=remedy)
    params, tensors, owners = dict(program.params), dict[str, Tensor](), dict[Any, str]()
    for name in sorted(params, key=lambda n: params[n].expr is not None):  # what others refer to comes first
        param, value = params[name], compiled.parameter_of(name).detach()
        if value.is_meta or type(value) is not Tensor or _type(value) != param.type:
            found = f"{_type(value)}, {type(value).__name__} on {value.device}"
            what, remedy = f"{name!r} has no values of its type", "load or gather its values in the captured dtype"
            raise StateDictError(what, expected=str(param.type), found=found, remedy=remedy)
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else name
        moved = param.expr.name if isinstance(param.expr, Ref) and param.kind in ("buffer", "constant") else ""
        same = moved in tensors and torch.equal(tensors[moved], value)
        owner = moved if same else owners.setdefault(place, name)
        if owner == name:
            tensors[name] = value
        params[name] = replace(param, expr=None if owner == name else Ref(owner))
    return replace(program, params=params, weights=tensors)


def _type(tensor: Tensor) -> Type:
    return Type(tensor.dtype, tuple(tensor.shape))


def _content(compiled: DepthModule, program: Program) -> dict[str, Any]:
    """What `depthc.json` says, but for the other files."""
    from depthc import __version__

    return {
        "format": FORMAT,
        "depthc": __version__,
        "recipe": str(compiled.recipe),
        "recipe_name": compiled.recipe.name,
        "history": [_recorded(step) for step in compiled.history],
        "training": compiled.training,
        "add_losses": compiled.add_losses,
        "selection": compiled.selection,
        "parameters": list(program.params),
        "frozen": [name for name, parameter in compiled.named_parameters() if not parameter.requires_grad],
    }


def _recorded(step: Step) -> dict[str, Any]:
    """What a folder says of a pass: all but the programs before and after it."""
    found = asdict(replace(step, source=None, result=None))
    return {key: value for key, value in found.items() if key not in ("source", "result")}


def _sealed(content: Mapping[str, Any]) -> bytes:
    """The bytes of `depthc.json`: its own SHA-256 is that of everything else in it."""
    plain = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    return json.dumps(plain | {"sha256": digest}, indent=1).encode() + b"\n"


def _digest(file: BinaryIO) -> dict[str, Any]:
    size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
    return {"bytes": size, "sha256": digest.hexdigest()}


def _write(folder: Path, content: dict[str, Any], text: str, tensors: Mapping[str, Tensor]) -> None:
    """All files of a save, and that they are on the disk."""
    folder.mkdir()
    save_file({name: _packed(t) for name, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / PROGRAM).write_bytes(text.encode())
    content["files"] = {}
    for name in (WEIGHTS, PROGRAM):
        with (folder / name).open("rb") as file:
            content["files"][name] = _digest(file)
    (folder / MANIFEST).write_bytes(_sealed(content))
    for path in (folder / WEIGHTS, folder / PROGRAM, folder / MANIFEST, folder):
        _sync(path)


def _packed(tensor: Tensor) -> Tensor:
    """A tensor as the file has it: complex numbers as pairs."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).cpu().contiguous()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# folders


def _aside(target: Path) -> Path:
    """Where an earlier save is while a new one takes its place."""
    return target.with_name(f".{target.name}.depthc-old")


def _put(made: Path, target: Path) -> None:
    """A finished folder in the place of `target`. Whenever this is cut off, `target` is whole, or its copy aside is."""
    aside = _aside(target)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier save that was cut off at its end
        os.rename(target, aside)
    os.rename(made, target)
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    names = {path.name for path in target.iterdir()} if target.is_dir() else {target.name} if target.exists() else set()
    others = names - {WEIGHTS, PROGRAM, MANIFEST}
    if names and (others or MANIFEST not in names):
        what, expected = "there is something else than a saved module", "no folder, an empty one, or one of depthc.save"
        raise _refused(what, target, expected, ", ".join(sorted(others or names)[:3]), "save into another folder")


def _existing(target: Path) -> Path:
    """The folder to read: where there is none, what a save that was cut off has moved aside."""
    if target.is_dir():
        return target
    if target.exists() or not _aside(target).is_dir():
        raise _refused("there is no saved module", target, "a folder that depthc.save wrote", remedy="check the path")
    log.warning("%s: a save was cut off; this is the state before it", target)
    return _aside(target)


def _refused(what: str, where: object, expected: object = "", found: object = "", remedy: str = "") -> CheckpointError:
    remedy = remedy or "copy the folder again from where it came from, or save again"
    return CheckpointError(what, where=str(where), expected=str(expected), found=str(found)[:200], remedy=remedy)


# what is read


@contextmanager
def _opened(folder: Path, name: str, content: Mapping[str, Any] | None = None) -> Iterator[BinaryIO]:
    """A file of the folder; its bytes are those that `content` says."""
    path = folder / name
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise _refused(f"{name} is missing", path, f"{WEIGHTS}, {PROGRAM} and {MANIFEST}") from None
    with file:
        if content is not None and (found := _digest(file)) != (expected := content["files"].get(name)):
            raise _refused(f"{name} has changed since it was saved", path, expected, found)
        file.seek(0)
        yield file


def _manifest(folder: Path) -> dict[str, Any]:
    """What `depthc.json` says."""
    path = folder / MANIFEST
    with _opened(folder, MANIFEST) as file:
        data = file.read()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _refused(f"{MANIFEST} is not JSON: {error}", path) from None
    if not isinstance(content, dict):
        raise _refused(f"{MANIFEST} is not a JSON object", path, found=type(content).__name__)
    version = content.get("format")
    if type(version) is int and version > FORMAT:
        what, found = "the module was saved by a newer version of depthc", f"format {version}"
        raise _refused(what, path, f"format {FORMAT}", found, "update depthc, or save again with this version")
    if unknown := sorted(content.keys() - _FIELDS.keys()):
        raise _refused(f"{MANIFEST} has the unknown key {unknown[0]!r}", path, ", ".join(sorted(_FIELDS)))
    for key, kind in _FIELDS.items():
        if type(content.get(key)) is not kind:
            raise _refused(f"{MANIFEST} lacks {key!r}", path, kind.__name__, repr(content.get(key)))
    if _sealed(content) != data:
        raise _refused(f"{MANIFEST} has changed since it was saved", path)
    return content


def _described(content: Mapping[str, Any], text: str, folder: Path) -> tuple[Recipe, tuple[Step, ...], Program]:
    """The recipe, its history and the program without weights, of what a folder says."""
    try:
        recipe = replace(Recipe.parse(content["recipe"]), name=content["recipe_name"])
        history = tuple(
            Step(**{**entry, "made": tuple(map(tuple, entry["made"])), "dropped": tuple(entry["dropped"])})
            for entry in content["history"]
        )
        program = parse(text)
    except RecipeError as error:
        what, remedy = f"the recipe cannot be read: {error.what}", "import the module that defines its passes first"
        raise _refused(what, folder / MANIFEST, error.expected, error.found, remedy) from error
    except DepthError as error:
        what, where = f"the program cannot be read: {error.what}", f"{folder / PROGRAM}, {error.where}"
        raise _refused(what, where, error.expected, error.found, error.remedy) from error
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(f"the history cannot be read: {error!r}", folder / MANIFEST) from None
    names = content["parameters"]
    if sorted(names, key=str) != sorted(program.params):
        raise _refused(f"{MANIFEST} and {PROGRAM} name different parameters", folder)
    return recipe, history, replace(program, params={name: program.params[name] for name in names})


def _weights(folder: Path, content: Mapping[str, Any], program: Program, device: Any) -> dict[str, Tensor]:
    """The tensors of the parameters that refer to no other, each in memory of its own."""
    wanted = {name: param.type for name, param in program.params.items() if param.expr is None}
    path, tensors = folder / WEIGHTS, dict[str, Tensor]()
    with _opened(folder, WEIGHTS, content) as file:
        try:
            stored = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise _refused(f"{WEIGHTS} cannot be read: {error}", path) from None
        with stored:
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise _refused("the folder was replaced while it was read", folder)
            if differ := sorted(wanted.keys() ^ set(stored.keys())):
                raise _refused(f"{WEIGHTS} lacks or adds tensors", path, f"those of {PROGRAM}", ", ".join(differ[:3]))
            for name, type in wanted.items():
                tensor = stored.get_tensor(name).to(device, copy=True)  # out of the mapped file, which is not aligned
                if type.dtype.is_complex and tensor.shape[-1:] == (2,) and tensor.dtype == type.dtype.to_real():
                    tensor = torch.view_as_complex(tensor)
                if _type(tensor) != type:
                    raise _refused(f"the weight {name!r} is of another type", path, type, _type(tensor))
                tensors[name] = tensor
    return tensors
