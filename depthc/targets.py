"""Targets: the models that the command line is given, by a file, a folder, a Python function or a model type."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthc.checkpoint import MANIFEST, load
from depthc.ir.errors import TargetError
from depthc.ir.names import closest
from depthc.ir.types import DTYPES

FORMS = "config.json, a saved folder, package.module:factory, file.py:factory, or a model type of transformers"


@dataclass(frozen=True)
class Target:
    """A model and example arguments of its forward."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def resolve(text: str, inputs: Sequence[str] = (), *, weights: bool = False) -> Target:
    """The model that a text names.

    Args:
        text: a Hugging Face config file, a folder that `save_pretrained` or `depthc.save` wrote, `module:factory` or
            `file.py:factory` (a function without arguments that returns a module, alone or with a tuple of arguments
            and a dict of keyword arguments), or a model type that transformers knows ("llama").
        inputs: examples of arguments as "name=i64[2,16]", where the model does not say what it takes.
        weights: whether the model is to have weights; else one from a config is on the meta device.

    Raises:
        TargetError: there is no such model, it cannot be built, or its arguments are not known.

    Example:
        >>> resolve("torch.nn:Identity", ["input=f32[2,3]"]).kwargs["input"].shape
        torch.Size([2, 3])
    """
    examples = dict(map(_example, inputs))
    path = Path(text)
    if re.fullmatch(r"[\w./\\-]+:\w+", text):
        found = _made(text)
    elif (path / MANIFEST).is_file():
        found = Target(_loaded(path))
    elif path.is_dir() or path.suffix == ".json":
        found = _of_config(path, weights)
    elif text.replace("-", "_").isidentifier() and not path.exists():
        found = _of_type(text, weights)
    else:
        raise TargetError(f"there is no model {text!r}", expected=FORMS, found=text, remedy="check the path")
    return Target(found.model, found.args, found.kwargs | examples)


def _example(text: str) -> tuple[str, Tensor]:
    """A name and a tensor, from "name=i64[2,16]"."""
    match = re.fullmatch(r"(\w+)=(\w+)\[([\d, ]*)\]", text)
    if match is None or match[2] not in DTYPES:
        known = ", ".join(DTYPES)
        raise TargetError(
            f"this is not an example argument: {text!r}",
            expected=f"name=dtype[sizes], with a dtype of {known}",
            found=text,
            remedy='write it like "input_ids=i64[2,16]"',
        )
    return match[1], filled([int(size) for size in match[3].split(",") if size.strip()], DTYPES[match[2]])


def filled(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of small values, equal in every run: ids from 1 to 7, or normal numbers."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(list(shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 7 + 1).reshape(list(shape)).to(dtype)


def _loaded(folder: Path) -> nn.Module:
    with suppress(ImportError):  # a model of transformers returns a class that must be known
        importlib.import_module("transformers.modeling_outputs")
    return load(folder)


# a Python function


def _made(text: str) -> Target:
    module_name, _, name = text.rpartition(":")
    module = _imported(module_name)
    if not callable(factory := getattr(module, name, None)):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        near = closest(name, known)
        remedy = f"use {near!r}" if near else "name a function of the module"
        raise TargetError(f"{module_name} has no function {name!r}", expected=", ".join(known[:8]), remedy=remedy)
    made = _called(factory, text)
    parts = made if isinstance(made, tuple) else (made,)
    match parts:
        case (nn.Module() as model,):
            return Target(model)
        case (nn.Module() as model, tuple() | list() as args):
            return Target(model, tuple(args))
        case (nn.Module() as model, dict() as kwargs):
            return Target(model, (), kwargs)
        case (nn.Module() as model, tuple() | list() as args, dict() as kwargs):
            return Target(model, tuple(args), kwargs)
    raise TargetError(
        f"{text} returned no model",
        expected="a module, or (module, args), or (module, args, kwargs)",
        found=", ".join(type(part).__name__ for part in parts),
        remedy="return one of these",
    )


def _imported(name: str) -> Any:
    """A module by its name, or by its file."""
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None  # the name ends in .py
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickling look there
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's module raises
        raise TargetError(
            f"the module {name!r} cannot be imported: {type(error).__name__}: {error}",
            where=_line_of(error),
            remedy="import it in Python to see the whole error",
        ) from error
    return module


def _called(factory: Callable[[], Any], text: str) -> Any:
    try:
        return factory()
    except Exception as error:  # whatever the user's function raises
        raise TargetError(
            f"the factory {text} raised {type(error).__name__}: {error}",
            where=_line_of(error),
            remedy="call it in Python without arguments to see the whole error",
        ) from error


def _line_of(error: BaseException) -> str:
    """The innermost line of an error's traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""


# transformers


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        remedy = "pip install 'depthc[hf]', or give module:factory"
        raise TargetError("this target needs the transformers library", found=str(error), remedy=remedy) from error
    transformers.logging.set_verbosity_error()
    return transformers


def _of_type(name: str, weights: bool) -> Target:
    transformers = _library()
    known = transformers.CONFIG_MAPPING
    if name not in known:
        near = closest(name, list(known))
        raise TargetError(f"there is no model {name!r}", expected=FORMS, found=name, remedy=f"use {near!r}")
    return _built(transformers.AutoConfig.for_model(name), weights)


def _of_config(path: Path, weights: bool) -> Target:
    transformers = _library()
    folder = path if path.is_dir() else path.parent
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        expected, remedy = "a config.json of transformers, with its model_type", "check the file"
        what = f"the config cannot be read: {str(error).splitlines()[0]}"
        raise TargetError(what, where=str(path), expected=expected, remedy=remedy) from error
    saved = path.is_dir() and any(folder.glob("*.safetensors"))
    if not (saved and weights):
        return _built(config, weights)
    kind = _class_of(config)
    return _with_inputs(kind.from_pretrained(folder).eval())


def _built(config: Any, weights: bool) -> Target:
    kind = _class_of(config)
    build = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
    with torch.device("cpu" if weights else "meta"):
        model = _called(lambda: build(config), f"{kind.__name__} of {type(config).__name__}")
    return _with_inputs(model.eval())


def _class_of(config: Any) -> Any:
    """The class that the config names, or the one that writes text, or the plain model."""
    transformers = _library()
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    written = (
        transformers.AutoModelForSeq2SeqLM
        if getattr(config, "is_encoder_decoder", False)
        else transformers.AutoModelForMaskedLM
        if masked
        else transformers.AutoModelForCausalLM
    )
    return written if type(config) in written._model_mapping else transformers.AutoModel


def _with_inputs(model: Any) -> Target:
    """A model of transformers with examples of what its main input is."""
    config, name = model.config, model.main_input_name
    kwargs = {name: filled(_shape_of(name, config), _DTYPES.get(name, torch.int64))}
    if getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = filled((2, 12), torch.int64)
    device = next(model.parameters()).device
    return Target(model, (), {key: value.to(device) for key, value in kwargs.items()})


_DTYPES = {"pixel_values": torch.float32, "input_values": torch.float32, "input_features": torch.float32}


def _shape_of(name: str, config: Any) -> Sequence[int]:
    match name:
        case "pixel_values":
            size = config.image_size
            height, width = size if isinstance(size, list | tuple) else (size, size)
            return 2, config.num_channels, height, width
        case "input_values":
            return 2, 16000
        case "input_features":
            return 2, config.num_mel_bins, 2 * config.max_source_positions
    return 2, 16
