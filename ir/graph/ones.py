"""Sizes of 1: whether a model does the same with them as with larger ones.

torch.export decides every question whether a size is 1 once and for all, without a guard, and claims nothing below 2.
Here the model itself is run, on tensors without data, at sizes 1, 2 and 3.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from depthc.ir import sizes
from depthc.ir.signature import Leaf, unbind

# Attributes, and what returns the same numbers: to expand 1 to 1 is to do nothing, and is often left out.
_WITHOUT_EFFECT = {"__get__", "size", "dim", "expand", "expand_as", "broadcast_to", "contiguous", "is_contiguous"}


def takes_ones(
    model: nn.Module, parameters: tuple[str, ...], bound: Mapping[str, Any], inputs: tuple[Leaf, ...], size: str
) -> bool:
    """Whether the model calls the same functions where a size is 1, and with the same numbers.

    A number that follows the size must do so evenly: its steps from 1 to 2 and from 2 to 3 are equal.
    """
    dims = {dim for leaf in inputs if leaf.type for dim in leaf.type.shape if isinstance(dim, str)} - {size}
    if any(size in sizes.names(sizes.read(dim)) for dim in dims):
        return False  # part of an expression: there may be no example with 1
    one, two, three = (_calls(model, parameters, bound, inputs, size, value) for value in (1, 2, 3))
    if one is None or two is None or three is None or not len(one) == len(two) == len(three):
        return False
    return all(map(_even, one, two, three))


def _even(one: Any, two: Any, three: Any) -> bool:
    numbers = all(type(v) in (int, float) for v in (one, two, three))
    return bool(three - two == two - one) if numbers else type(one) is type(two) is type(three) and one == two == three


def _calls(
    model: nn.Module,
    parameters: tuple[str, ...],
    bound: Mapping[str, Any],
    inputs: tuple[Leaf, ...],
    size: str,
    value: int,
) -> list[Any] | None:
    """The functions that a forward calls and their arguments that are not tensors; None if it fails."""
    leaves, tree = pytree.tree_flatten(dict(bound))
    without_data = FakeTensorMode(allow_non_fake_inputs=True)
    with _silent(), _unchanged(model), torch.no_grad(), without_data, _Recorder() as recorder:
        try:
            sized = [_sized(v, leaf, size, value) for v, leaf in zip(leaves, inputs, strict=True)]
            args, kwargs = unbind(parameters, pytree.tree_unflatten(sized, tree))
            recorder.calls.clear()
            model(*args, **kwargs)
        except Exception:  # whatever the reason, nothing is known then
            return None
    return recorder.calls


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """What modules keep for later calls (tables, say) has no data here, and must not stay."""
    before = [(vars(module), dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    buffers = [module._buffers for module in model.modules()]
    try:
        yield
    finally:
        for (attributes, saved, saved_buffers), own in zip(before, buffers, strict=True):
            attributes.clear()
            attributes.update(saved)
            own.clear()
            own.update(saved_buffers)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Ops that have no form without data are written to torch's log as errors; here they are an answer."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def _sized(value: Any, leaf: Leaf, size: str, number: int) -> Any:
    if leaf.type is None:
        return value
    shape = [number if s == size else actual for s, actual in zip(leaf.type.shape, value.shape, strict=True)]
    return torch.empty(shape, dtype=value.dtype, device=value.device)


class _Recorder(TorchFunctionMode):
    """Writes down every call of a torch function that has an effect: its name, then its arguments but for tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in _WITHOUT_EFFECT:
            leaves = pytree.tree_leaves((args, kwargs or {}))
            self.calls += [name, len(leaves), *(leaf for leaf in leaves if not isinstance(leaf, Tensor))]
        return func(*args, **(kwargs or {}))
