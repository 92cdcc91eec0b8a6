"""Programs that run layers on some tokens, beside the oracles: captured, compared, counted, stepped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import oracles
import torch
from oracles import Wide
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import depthc
from depthc.codegen.module import DepthModule
from depthc.ir.program import Program

ROWS = {
    "full": torch.ones(2, 9, dtype=torch.bool),
    "padded": torch.tensor(
        [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1]]
    ).bool(),
}
ROWS["packed"] = ROWS["full"]
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 2, 2, 2, 2]])
FORWARD, BACKWARD = 1e-10, 1e-8


@cache
def captured(kind: str, rows: str) -> tuple[nn.Module, Program, dict[str, Tensor]]:
    """A model, its program and the inputs that both take. All processes of a run read what one has captured."""
    model = oracles.build(kind)
    inputs = oracles.inputs_of(kind, ROWS[rows], documents=documents_of(rows))
    file = Path(os.environ["DEPTHC_CAPTURED"]) / f"{kind}-{rows}.pt"
    if not file.exists():
        with Wide():
            program = depthc.capture(model, kwargs=inputs)
        unfinished = file.with_suffix(f".{os.getpid()}")
        torch.save((str(program), {name: value.detach() for name, value in program.weights.items()}), unfinished)
        unfinished.rename(file)
    text, weights = torch.load(file)
    own = tensors_of(model)
    return model, depthc.parse(text).with_weights({n: own.get(n, value) for n, value in weights.items()}), inputs


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, by every name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def documents_of(rows: str) -> Tensor | None:
    """The number of every token's document, of packed rows."""
    return DOCUMENTS if rows == "packed" else None


def logits_of(out: Any) -> Tensor:
    """Logits, or the last states of a model without."""
    return out if isinstance(out, Tensor) else out["logits" if "logits" in out else "last_hidden_state"]


def weighted(logits: Tensor, real: Tensor) -> Tensor:
    """A scalar of the real tokens' logits whose gradient is different everywhere."""
    rows = logits[real]
    return (rows * torch.linspace(-1, 1, rows.numel(), dtype=rows.dtype).view_as(rows)).sum()


def assert_same_gradients(found: Tensor, ours: Mapping[str, Tensor], wanted: Tensor, theirs: Sequence[Tensor]) -> None:
    """Gradients of two scalars by parameters that are the same, by name."""
    got = torch.autograd.grad(found, list(ours.values()), allow_unused=True)
    want = torch.autograd.grad(wanted, theirs, allow_unused=True)
    for name, a, b in zip(ours, got, want, strict=True):
        assert (a is None) == (b is None) or (a if a is not None else b).abs().max() == 0, name
        assert a is None or b is None or (a.flatten() - b.flatten()).abs().max() < BACKWARD, name


def changed_last(kind: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with another last token in every row."""
    name = oracles.token_input(kind)
    tokens = inputs[name].clone()
    tokens[:, -1] = tokens[:, -1] % (oracles.VOCAB - 1) + 1
    return dict(inputs) | {name: tokens}


def stepped(kind: str, program: Program, inputs: Mapping[str, Tensor], prompt: int = 5) -> tuple[Tensor, Any]:
    """The logits of a prompt and of further tokens one by one, and the past behind the last."""
    growing = ("decoder_input_ids", "decoder_attention_mask")
    growing = growing if kind == "encoder_decoder" else ("input_ids", "ids", "attention_mask")
    tokens = {n: v for n, v in inputs.items() if n in growing}
    fixed = {n: v for n, v in inputs.items() if n not in growing}
    with Wide(), torch.no_grad():
        out, past = program.start(**fixed, **{n: v[:, :prompt] for n, v in tokens.items()})
        parts = [logits_of(out)]
        for t in range(prompt, inputs[oracles.token_input(kind)].shape[1]):
            out, past = program.step(past, **{n: v[:, t : t + 1] for n, v in tokens.items()})
            parts.append(logits_of(out))
    return torch.cat(parts, 1), past


def counted(call: Callable[[], Any], model: nn.Module) -> dict[str, list[int]]:
    """How many token rows every product with a parameter of the layers got, in order, by the name of its module."""
    names = {p.data_ptr(): n.split(".")[-2] for n, p in model.named_parameters() if ".layers." in n}
    seen: dict[str, list[int]] = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default):
                weight = args[-1]
                if isinstance(weight, Tensor) and weight.data_ptr() in names:
                    rows = args[-2].numel() // args[-2].shape[-1]
                    seen.setdefault(names[weight.data_ptr()], []).append(rows)
            return func(*args, **(kwargs or {}))

    with Count(), torch.no_grad():
        call()
    return seen


def forward(compiled: DepthModule, inputs: Mapping[str, Tensor], causal: bool) -> tuple[Tensor, Any]:
    """Logits and aux without dropout, by the rule of inference or that of training."""
    compiled.eval().selection = "inference" if causal else "training"
    with Wide():
        out, aux = compiled.forward_with_aux(**inputs)
    return logits_of(out), aux
