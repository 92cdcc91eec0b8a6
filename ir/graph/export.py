"""torch.export with the settings under which any transformer exports, and errors that name the user's line."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from depthc.ir.errors import CaptureError
from depthc.ir.signature import unbind

log = logging.getLogger(__name__)
WHOLE = "whole_arguments"  # the argument of `_Adapter`
_TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep


def export(
    model: nn.Module, parameters: tuple[str, ...], bound: Mapping[str, Any], *, training: bool
) -> ExportedProgram:
    """`model` as a graph of ATen ops under one value of `training`, as dynamic as the model allows.

    Caches are off. The graph may hold in-place ops; see `functional`.

    Raises:
        CaptureError: no way of exporting worked; names the line of the user's model.
    """
    args, kwargs = unbind(parameters, bound)
    exported, names = model, parameters
    if any(p.startswith("**") and p[2:] in bound for p in parameters):
        exported, names, args, kwargs = _Adapter(model, parameters), (WHOLE,), (dict(bound),), {}
    errors: list[Exception] = []
    with _mode(model, training), _without_caches(model), torch.no_grad(), _quiet():
        for strict, dims in ((False, None), (False, 2), (True, 2), (False, 0)):
            shapes = _dynamic_shapes(names, args, kwargs, dims)
            try:
                return torch.export.export(exported, args, kwargs, dynamic_shapes=shapes, strict=strict)
            except Exception as error:  # the exporter raises nearly every type there is
                log.debug("export(strict=%s, dims=%s) failed: %s", strict, dims, error)
                errors.append(error)
                if _is_data_dependent(error):
                    break
    raise _capture_error(errors[0], model, training) from errors[0]


class _Adapter(nn.Module):
    """A model whose arguments are one dict: torch.export has no dynamic sizes for open keyword arguments.

    Its parameters and modules are those of the model, under their own names.
    """

    def __init__(self, model: nn.Module, parameters: tuple[str, ...]) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self._non_persistent_buffers_set, self.training = model._non_persistent_buffers_set, model.training

        def call(bound: Mapping[str, Any]) -> Any:
            args, kwargs = unbind(parameters, bound)
            return model(*args, **kwargs)

        self._call = call

    def forward(self, whole_arguments: Mapping[str, Any]) -> Any:
        return self._call(whole_arguments)


def functional(program: ExportedProgram) -> ExportedProgram:
    """The same program without in-place ops; as it is if it has none, for rewriting takes longer than exporting."""
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    if any(isinstance(t, torch._ops.HigherOrderOperator) or mutates(t) for t in targets):
        with torch.no_grad(), _quiet():
            return program.run_decompositions({})
    return program


def mutates(target: Any) -> bool:
    """Whether an op writes to its arguments."""
    return bool(getattr(getattr(target, "_schema", None), "is_mutable", False)) and "detach_" not in str(target)


@contextlib.contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Key/value caches off, wherever a module's configuration has the switch."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    on = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    for config in on:
        config.use_cache = False
    try:
        yield
    finally:
        for config in on:
            config.use_cache = True


def _dynamic_shapes(
    parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], dims: int | None
) -> dict[str, Any]:
    """`Dim.AUTO` for the first `dims` dimensions of every tensor, by parameter name."""

    def leaf(value: Any) -> Any:
        return dict.fromkeys(range(value.dim())[:dims], Dim.AUTO) if isinstance(value, Tensor) else None

    positional = [p for p in parameters if not p.startswith("*") and not p.endswith("=")]
    bound: dict[str, Any] = dict(zip(positional, args, strict=False))
    if len(args) > len(positional):
        bound[next(p[1:] for p in parameters if p.startswith("*"))] = args[len(positional) :]
    return {name: pytree.tree_map(leaf, value) for name, value in (bound | dict(kwargs)).items()}


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    if model.training != training:  # else the modes of single modules stay as they are
        model.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _is_data_dependent(error: Exception) -> bool:
    text = f"{type(error).__name__} {error}"
    return "DataDependent" in text or "data-dependent" in text.lower()


def user_line(error: BaseException) -> str:
    """The innermost source line outside torch in an exception's traceback, as "file.py:12 (code)"."""
    rooms = (sys.modules[name].__file__ for name in ("depthc", "depthc.ir"))
    ours = tuple(os.path.dirname(os.path.abspath(str(file))) + os.sep for file in rooms)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_TORCH_FOLDER, *ours))]
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


def forward_line(model: nn.Module) -> str:
    """Where the forward of a model is defined, as "Model, file.py:12"."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return type(model).__name__ + (f", {code.co_filename}:{code.co_firstlineno}" if code else "")


def _capture_error(error: Exception, model: nn.Module, training: bool) -> CaptureError:
    mode = "train" if training else "eval"
    first_line = str(error).strip().split("\n", 1)[0]
    if _is_data_dependent(error):
        return CaptureError(
            f"control flow depends on the values of a tensor ({mode} mode): {first_line}",
            where=user_line(error) or forward_line(model),
            expected="control flow on sizes, flags and constants only",
            remedy="compute both branches and choose with torch.where, or pass the choice as a Python argument",
        )
    return CaptureError(
        f"the model does not export ({mode} mode): {type(error).__name__}: {first_line}",
        where=user_line(error) or forward_line(model),
        expected="a forward that torch.export can trace",
        remedy="run torch.export.draft_export(model, args, kwargs) for a full report",
    )
