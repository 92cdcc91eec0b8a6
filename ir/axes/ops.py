"""Facts about ATen ops and their arguments that analyses share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

Slot = tuple[int | str, int]
"""Where an operand stands: its argument's position or keyword, and its index if the argument is a list, else -1."""

# One computation under several names: the name on the left is judged as the one on the right.
_ALIASES = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "concat": "cat",
    "concatenate": "cat",
    "special_softmax": "softmax",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "special_log_softmax": "log_softmax",
    "special_logsumexp": "logsumexp",
    "special_expit": "sigmoid",
    "_unsafe_view": "view",
    "reshape": "view",
    "unsafe_split": "split",
    "unsafe_chunk": "chunk",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "_to_copy": "to",
    "transformers::grouped_mm_fallback": "grouped_mm",
    "_grouped_mm": "grouped_mm",
}

# Elementwise ops that do not have PyTorch's tag for it.
_POINTWISE = frozenset(
    """_conj absolute add mul div sub sigmoid zeros_like ones_like full_like empty_like
    alias alpha_dropout arccos arcsin arctan2 bernoulli clone complex
    contiguous copy detach dropout
    feature_alpha_dropout feature_dropout detach_ float_power floor_divide greater greater_equal
    hardswish imag lift_fresh_copy
    less less_equal log_sigmoid masked_fill native_dropout negative not_equal polar rand_like randn_like real relu_
    resolve_conj resolve_neg rrelu_with_noise rsub selu softplus to type_as where isclose is_nonzero""".split()
)
# Ops that make a tensor of any shape in which all rows are alike.
FILLS = frozenset({"full", "zeros", "ones", "empty"})
_NO_TAGS = {"rms_norm", "layer_norm"}


@cache
def _name_of(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return f"python::{getattr(target, '__name__', target)}"
    name = schema.name.removeprefix("aten::")
    return _ALIASES.get(name, name)


def op_name(node: fx.Node) -> str:
    """The name that rules go by: `softmax`, `view`, `python::getitem`; overloads and aliases are one."""
    return _name_of(node.target)


@cache
def _pointwise(target: Any) -> bool:
    name = _name_of(target)
    return (name in _POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ())) and name not in _NO_TAGS


def is_pointwise(node: fx.Node) -> bool:
    """Whether every element of the result depends on the elements at the same place of the broadcast operands."""
    return _pointwise(node.target)


def operands(node: fx.Node) -> Iterator[tuple[Slot, fx.Node]]:
    """Every node among the arguments, with its slot."""
    arguments: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
    for key, value in arguments:
        if isinstance(value, fx.Node):
            yield (key, -1), value
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                if isinstance(item, fx.Node):
                    yield (key, index), item


def map_operands(node: fx.Node, fn: Callable[[Slot, fx.Node], Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a node with every operand replaced by `fn(slot, operand)`."""

    def one(key: int | str, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return fn((key, -1), value)
        if isinstance(value, list | tuple):
            return [fn((key, i), v) if isinstance(v, fx.Node) else v for i, v in enumerate(value)]
        return value

    return [one(i, a) for i, a in enumerate(node.args)], {k: one(k, v) for k, v in node.kwargs.items()}


def is_tensor(value: Any) -> bool:
    """Whether a probed value is a tensor or a sequence that holds one."""
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value))


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or keyword; canonical graphs leave out schema defaults."""
    if index < len(node.args):
        return node.args[index]
    return node.kwargs.get(name, default)


def dim_argument(node: fx.Node, index: int, rank: int, default: int | None = None) -> int:
    """A `dim` argument as a non-negative dimension."""
    dim: Any = argument(node, index, "dim", default)
    return dim % max(rank, 1)


def dims_of(value: Any, rank: int) -> list[int]:
    """A `dim` argument as non-negative dimensions; none given means all."""
    if value is None or value == []:
        return list(range(rank))
    dims = value if isinstance(value, list | tuple) else [value]
    return [d % max(rank, 1) for d in dims]
