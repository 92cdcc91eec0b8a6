"""Settling: a rewritten program with its parameters as weights of its own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from depthc.ir.params import Param, Ref, value_of
from depthc.ir.program import Program


def settle(program: Program, copies: bool = True) -> Program:
    """The program with every parameter expression evaluated; with `copies` it shares nothing with the captured model.

    Parameters that were one tensor stay one: the first keeps the tensor, the others refer to it. New tensors go where
    the model's are.

    Raises:
        StateDictError: a weight that an expression reads is missing.
    """
    device = next((t.device for t in program.weights.values()), torch.device("cpu"))
    weights: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    kept: list[Tensor] = []  # a tensor that is gone would lend its id to another one
    params: dict[str, Param] = {}
    for name, param in program.params.items():
        value = value_of(name, param, program.weights)
        kept.append(value)
        owner = owners.setdefault(id(value), name)
        if owner == name:
            weights[name] = value.detach().to(device).clone() if copies else value.to(device)
        params[name] = replace(param, expr=None if owner == name else Ref(owner))
    return replace(program, params=params, weights=weights)
