"""Comparing what a program returns with what the model returns, whatever the structure of the outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


def without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with caches off, for models that have the switch: a captured program has no cache output."""
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    config = getattr(model, "config", None)
    configured = hasattr(getattr(config, "text_config", config), "use_cache")
    if "use_cache" in parameters or (open_ended and configured):
        return kwargs | {"use_cache": False}
    return kwargs


def tensors(tree: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a nested output, by its path."""
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference, 0.0 only for bitwise equal values; infinite where one side is not a number."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise AssertionError(f"{found.dtype}{list(found.shape)} against {expected.dtype}{list(expected.shape)}")
    if torch.equal(found, expected) or found.numel() == 0:
        return 0.0
    gap = (found.detach().double() - expected.detach().double()).abs()
    gap = torch.where(found == expected, torch.zeros_like(gap), gap)  # equal infinities
    return gap.nan_to_num(nan=torch.inf).max().item()


def difference(found: Any, expected: Any) -> float:
    """The largest difference over all tensors of two outputs, which must have the same structure and type."""
    if type(found) is not type(expected):
        raise AssertionError(f"returned {type(found).__name__}, not {type(expected).__name__}")
    ours, theirs = tensors(found), tensors(expected)
    if ours.keys() != theirs.keys():
        raise AssertionError(f"outputs {sorted(ours)}, not {sorted(theirs)}")
    return max((distance(ours[path], theirs[path]) for path in theirs), default=0.0)


def rows_difference(found: Any, whole: Any, start: int, stop: int, length: int) -> float:
    """The largest difference between an incremental output and the rows start:stop of the full one.

    Only outputs with one row a token can be compared: an encoder's states and pooled vectors are left out.
    """
    ours, compared = tensors(found), []
    for path, full in tensors(whole).items():
        part = ours.get(path)
        if full.dim() > 1 and full.shape[1] == length and part is not None and part.shape[1] == stop - start:
            compared.append(distance(part, full[:, start:stop]))
    if not compared:
        raise AssertionError("no output has one row a token")
    return max(compared)


def cut(inputs: Mapping[str | int, Any], stream: Mapping[str | int, str], start: int, stop: int) -> tuple[tuple, dict]:
    """The inputs of one incremental call that feeds the tokens start:stop; a prompt starts at 0 and takes the rest."""
    chosen: dict[str | int, Any] = {}
    for name, value in inputs.items():
        if name in stream:
            for dim, letter in enumerate(stream[name]):
                if letter == "t":
                    value = value.narrow(dim, start, stop - start)
                elif letter == "k":
                    value = value.narrow(dim, 0, stop)
        elif start > 0 and isinstance(value, torch.Tensor):
            continue
        chosen[name] = value
    args = tuple(value for name, value in chosen.items() if isinstance(name, int))
    return args, {name: value for name, value in chosen.items() if isinstance(name, str)}


def gradients(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A forward with a fixed seed, and the gradient of a fixed random projection of its outputs for every parameter.

    A parameter that no output depends on has gradient zero, whether or not autograd says so.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = module(*args, **kwargs)
    floats = [value for value in tensors(out).values() if value.requires_grad]
    generator = torch.Generator().manual_seed(1)
    loss = torch.stack([(value * torch.randn(value.shape, generator=generator)).sum() for value in floats]).sum()
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    named = zip(parameters.items(), found, strict=True)
    return out, {name: torch.zeros_like(value) if grad is None else grad for (name, value), grad in named}
