"""Balance without a loss: a bias that moves towards the depths which few tokens chose (recipes: section 4)."""

from __future__ import annotations

import torch
from torch import distributed

from depthc.codegen.aux import Aux
from depthc.codegen.module import DepthModule
from depthc.ir.errors import InputError
from depthc.runtime.telemetry import report


@torch.no_grad()
def update(compiled: DepthModule, aux: Aux, rate: float = 1e-3, loop: str | None = None) -> None:
    """Move the bias of token choice after an optimizer step: bias_i += rate sign(mean load - load_i).

    The load of a depth is the number of real tokens that chose it, on all ranks where processes train together. While
    a warm-up imposes the depth, nothing moves.

    Args:
        compiled: a module of `tokenchoice(bias=True)`.
        aux: what its forward gave beside the output.
        rate: how far the bias moves.
        loop: the loop's index; needed if several loops route.

    Raises:
        InputError: the module has no such bias, or no loop routes.

    Example:
        >>> update(compiled, aux)  # after optimizer.step()  # doctest: +SKIP
    """
    found = report(aux, loop)
    name = f"depth.{found.loop}.bias"
    if name not in compiled.program.params:
        raise InputError(
            f"loop {found.loop!r} has no bias that balances",
            expected=f"a buffer {name}",
            found="none",
            remedy='compile the model with "mor_token" and bias=True',
        )
    if bool(aux.taps.get(f"balance.{found.loop}.imposed", False)):
        return
    bias = compiled.parameter_of(name)
    load = torch.tensor(found.tokens_per_depth[1:], device=bias.device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(load)
    bias += rate * torch.sign(load.sum() - len(load) * load).to(bias.dtype)  # whole numbers: at the mean nothing moves
