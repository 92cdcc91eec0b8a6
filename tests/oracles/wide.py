"""Hugging Face models hold islands of fp32; here everything is fp64.

The islands are norms, the softmax of eager attention, expert gates, rotary tables. Called plainly, both sides keep
them, and agree as long as each island sums in the same order: a softmax over fewer keys, or a weight's gradient summed
inside an island, does not. `with Wide():` around whatever is compared (the model, its capture, the oracle) makes every
island fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Wide(TorchFunctionMode):
    """Everything that asks for fp32 gets fp64, and a grouped product, which has no fp64, its own fallback."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        if func is torch._grouped_mm:
            return torch.ops.transformers.grouped_mm_fallback(*args[:2], kwargs["offs"])
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)
