"""The outside of a program: how a model's arguments become values, and values its outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from depthc.ir import sizes
from depthc.ir.errors import InputError
from depthc.ir.types import Type


@dataclass(frozen=True)
class Leaf:
    """One leaf of the argument tree: a tensor (`type`), or a fixed value (`value`: None, bool, int, float, str)."""

    name: str
    type: Type | None = None
    value: Any = None


@dataclass(frozen=True)
class Signature:
    """Arguments and outputs of the captured model.

    Attributes:
        parameters: names of `forward`'s parameters in order; "*x" and "**x" for the variadic ones, "x=" for
            keyword-only ones.
        inputs: the leaves of the argument tree, in the order of `in_spec`.
        in_spec: the tree of a dict from parameter name to argument, as captured.
        outputs: one a leaf of `out_spec`: the name of a value, or a fixed value in a `Leaf`.
        out_spec: the tree of the model's output (a ModelOutput, dict, tuple or tensor).
        ranges: smallest and largest legal value of every size name; None is unbounded.
        guards: further conditions on the size names, as size expressions ("s % 4 == 0").
    """

    parameters: tuple[str, ...]
    inputs: tuple[Leaf, ...]
    in_spec: pytree.TreeSpec
    outputs: tuple[str | Leaf, ...]
    out_spec: pytree.TreeSpec
    ranges: Mapping[str, tuple[int, int | None]]
    guards: tuple[str, ...] = ()

    def __deepcopy__(self, memo: object) -> Signature:
        return self

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensor arguments by leaf name, checked against the captured ones.

        Raises:
            InputError: another argument structure, value, dtype, rank or size than was captured.
        """
        bound = bind(self.parameters, args, kwargs)
        captured = set(self.in_spec.context)
        bound = self._fixed_arguments() | {k: v for k, v in bound.items() if v is not None or k in captured}
        for name in set(bound) - captured:
            raise InputError(
                f"argument {name!r} was not among the captured arguments",
                expected=", ".join(self.in_spec.context),
                found=name,
                remedy=f"capture again with an example of {name!r}",
            )
        for name in captured - set(bound):
            raise InputError(
                f"argument {name!r} is missing",
                expected=", ".join(self.in_spec.context),
                found=", ".join(bound) or "no arguments",
                remedy=f"pass {name!r}, or capture again without it",
            )
        leaves, spec = pytree.tree_flatten({k: bound[k] for k in self.in_spec.context})
        if spec != self.in_spec:
            raise InputError(
                "the arguments have another structure than the captured ones",
                expected=str(self.in_spec),
                found=str(spec),
                remedy="pass arguments nested as in the example, or capture again",
            )
        self._check(leaves)
        return {leaf.name: v for leaf, v in zip(self.inputs, leaves, strict=True) if leaf.type is not None}

    def _fixed_arguments(self) -> dict[str, Any]:
        """Arguments without a tensor in them, as captured: they need not be given again."""
        fixed, leaves = {}, iter(self.inputs)
        for name, spec in zip(self.in_spec.context, self.in_spec.children(), strict=True):
            own = [next(leaves) for _ in range(spec.num_leaves)]
            if all(leaf.type is None for leaf in own):
                fixed[name] = pytree.tree_unflatten([leaf.value for leaf in own], spec)
        return fixed

    def unflatten(self, values: Mapping[str, Any]) -> Any:
        """The model's output, in its own type, from the values of the program."""
        leaves = [values[o] if isinstance(o, str) else o.value for o in self.outputs]
        return pytree.tree_unflatten(leaves, self.out_spec)

    def size_values(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """The value of every size name that stands alone as a dimension of an input."""
        values: dict[str, int] = {}
        for leaf in self.inputs:
            for size, actual in zip(leaf.type.shape, tensors[leaf.name].shape, strict=True) if leaf.type else ():
                if isinstance(size, str) and size.isidentifier():
                    values.setdefault(size, actual)
        return values

    def _check(self, leaves: Sequence[Any]) -> None:
        for leaf, value in zip(self.inputs, leaves, strict=True):
            _check_leaf(leaf, value)
        tensors = {leaf.name: v for leaf, v in zip(self.inputs, leaves, strict=True) if leaf.type is not None}
        if len({t.device for t in tensors.values()}) > 1:
            raise InputError(
                "the arguments are on several devices",
                found=", ".join(f"{n} on {t.device}" for n, t in tensors.items()),
                remedy="move them to one device",
            )
        values = self.size_values(tensors)
        for leaf in self.inputs:
            if leaf.type is not None:
                self._check_shape(leaf.name, leaf.type, tensors[leaf.name], values)
        for guard in self.guards:
            if not sizes.met(guard, values):
                raise InputError(
                    "the sizes break a condition of the captured graph",
                    expected=guard,
                    found=", ".join(f"{n}={v}" for n, v in values.items()),
                    remedy="capture again with an example of these sizes",
                )

    def _check_shape(self, name: str, type: Type, tensor: Tensor, values: Mapping[str, int]) -> None:
        for dim, (size, actual) in enumerate(zip(type.shape, tensor.shape, strict=True)):
            low, high = self.ranges.get(size, (0, None)) if isinstance(size, str) else (0, None)
            fits = actual == sizes.evaluate(size, values) and low <= actual and (high is None or actual <= high)
            if not fits:
                span = f", from {low} to {'any' if high is None else high}" if isinstance(size, str) else ""
                raise InputError(
                    f"dimension {dim} of argument {name!r} does not fit the captured shape {type}",
                    expected=f"{size}{span}",
                    found=f"{actual} (shape {tuple(tensor.shape)})",
                    remedy="capture again with an example whose sizes are above 1 and may vary in this dimension",
                )


def _check_leaf(leaf: Leaf, value: Any) -> None:
    if leaf.type is None:
        if value is not leaf.value and (type(value) is not type(leaf.value) or value != leaf.value):
            raise InputError(
                f"argument {leaf.name!r} was captured with another value",
                expected=repr(leaf.value),
                found=repr(value),
                remedy="capture again with this value",
            )
        return
    if not isinstance(value, Tensor):
        raise InputError(
            f"argument {leaf.name!r} is not a tensor",
            expected=str(leaf.type),
            found=repr(value),
            remedy="pass a tensor",
        )
    if value.dtype != leaf.type.dtype or value.dim() != len(leaf.type.shape):
        raise InputError(
            f"argument {leaf.name!r} has another dtype or rank than the captured example",
            expected=str(leaf.type),
            found=f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}",
            remedy="convert the argument, or capture again with it",
        )


def bind(parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name, as Python would bind them.

    Raises:
        InputError: arguments that `forward` would not take.
    """
    positional, named = list(args), dict(kwargs)
    bound: dict[str, Any] = {}
    for parameter in parameters:
        name = parameter.strip("*=")
        if parameter.startswith("**"):
            bound, named = bound | ({name: named} if named else {}), {}
        elif parameter.startswith("*"):
            bound, positional = bound | ({name: tuple(positional)} if positional else {}), []
        elif positional and not parameter.endswith("="):
            if name in named:
                raise _misfit(f"got two values for {name!r}", parameters)
            bound[name] = positional.pop(0)
        elif name in named:
            bound[name] = named.pop(name)
    if positional:
        raise _misfit(f"{len(positional)} too many positional arguments", parameters)
    if named:
        raise _misfit(f"got an unexpected argument {next(iter(named))!r}", parameters)
    return bound


def _misfit(what: str, parameters: Sequence[str]) -> InputError:
    return InputError(
        f"the arguments do not fit the model's forward: {what}",
        expected=f"({', '.join(parameters)})",
        remedy="call it as the model is called",
    )


def unbind(parameters: Sequence[str], bound: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from arguments by parameter name: keywords wherever Python allows it."""
    arguments = inspect.BoundArguments(inspect_signature(tuple(parameters)), dict(bound))  # type: ignore[arg-type]
    if any(p.startswith("*") and not p.startswith("**") for p in parameters):
        return arguments.args, arguments.kwargs
    variadic = next((p[2:] for p in parameters if p.startswith("**")), None)
    kwargs = {k: v for k, v in bound.items() if k != variadic}
    return (), kwargs | dict(bound.get(variadic, {}) if variadic else {})


def parameter_names(signature: inspect.Signature) -> tuple[str, ...]:
    """The parameters of a signature in the notation of `Signature.parameters`."""
    marks: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*{}", inspect.Parameter.VAR_KEYWORD: "**{}"}
    marks[inspect.Parameter.KEYWORD_ONLY] = "{}="
    return tuple(marks.get(p.kind, "{}").format(p.name) for p in signature.parameters.values())


def inspect_signature(parameters: tuple[str, ...]) -> inspect.Signature:
    def parameter(text: str) -> inspect.Parameter:
        if text.startswith("**"):
            return inspect.Parameter(text[2:], inspect.Parameter.VAR_KEYWORD)
        if text.startswith("*"):
            return inspect.Parameter(text[1:], inspect.Parameter.VAR_POSITIONAL)
        keyword_only = text.endswith("=")
        kind = inspect.Parameter.KEYWORD_ONLY if keyword_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Parameter(text.rstrip("="), kind, default=None)

    return inspect.Signature([parameter(p) for p in parameters])


def device_of(tensors: Mapping[str, Tensor]) -> torch.device:
    """The device that a program runs on: that of its arguments."""
    return next((t.device for t in tensors.values()), torch.device("cpu"))
