"""One training of the experiment: batches, the schedule over operations spent, checkpoints, and what came out."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_model import Cost, loss_of, wait
from training_plan import Run, Settings

from depthc.codegen.module import DepthModule

WARMUP = 0.05  # the share of the budget over which the rate rises


class Batches:
    """Windows of a text on the device, drawn by a seed: the same ones for every variant."""

    def __init__(self, text: Tensor, settings: Settings, seed: int) -> None:
        self.text, self.rows, self.generator = text, settings.batch, torch.Generator().manual_seed(seed)
        self._places = torch.arange(settings.context, device=text.device)

    def next(self) -> Tensor:
        """int64[rows, context]"""
        starts = torch.randint(len(self.text) - len(self._places) + 1, (self.rows, 1), generator=self.generator)
        return self.text[starts.to(self.text.device, non_blocking=True) + self._places].long()


@dataclass
class State:
    """How far a training is.

    Attributes:
        spent: operations, of what tokens chose.
        seconds: of training, until the device was done.
        curve: [tokens read, mean loss of the steps since the last entry, in bits a byte].
        speeds: tokens a second between two looks at the loss.
    """

    step: int = 0
    spent: float = 0.0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)


class Trainer:
    """AdamW, warm-up and a cosine to zero over the operations spent, gradients clipped to 1.

    The operations of a step may depend on the data. They are summed on the device and looked at every few steps; in
    between a step is taken to cost what steps took on average until then.
    """

    def __init__(
        self, run: Run, module: DepthModule, text: Tensor, settings: Settings, budget: float, checkpoint: Path
    ) -> None:
        self.run, self.module, self.settings, self.device = run, module, settings, text.device.type
        self.budget, self.checkpoint = run.share * budget, checkpoint
        self.cost, self.batches, self.state = Cost(module.program, settings), Batches(text, settings, run.seed), State()
        self._most = torch.tensor(self.cost.most, dtype=torch.float64, device=text.device)
        self.optimizer = optimizer_of(module, run.rate)
        if checkpoint.exists():
            self._load()

    def train(self, stop: Callable[[], bool], show: Callable[[State, float], None]) -> bool:
        """Train until the budget is spent: True; or until `stop` says so: False, and the checkpoint is written."""
        while not self._over(self.state.spent):
            self._stretch()
            show(self.state, self.state.spent / self.budget)
            if stop() and not self._over(self.state.spent):
                self._save()
                return False
        return True

    @property
    def _step_cost(self) -> float:
        """Operations that a step takes, or took on average until now."""
        return self.state.spent / self.state.step if self.state.step else self.cost.most

    def _over(self, spent: float) -> bool:
        """Whether another step would be further from the budget than none."""
        return spent + self._step_cost / 2 > self.budget

    def _stretch(self) -> None:
        """A few steps, and a look at what they cost and at the loss."""
        began, state, each = time.perf_counter(), self.state, self._step_cost
        first, estimate = state.step, state.spent
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, spent
        while state.step < first + self.settings.every and not estimate + each / 2 > self.budget:
            totals += self._step(estimate / self.budget)
            state.step += 1
            estimate += each
        loss, spent = totals.tolist()
        wait(self.device)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is not a number at step {state.step}")
        seconds, steps = time.perf_counter() - began, state.step - first
        state.spent, state.seconds = state.spent + spent, state.seconds + seconds
        state.curve.append((state.step * self.settings.read, loss / steps / math.log(2)))
        state.speeds.append(steps * self.settings.read / seconds)

    def _step(self, share: float) -> Tensor:
        """One step at a share of the budget: the loss of the text in nats, and the operations."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.rate * schedule(share)
        loss, rows, aux = loss_of(self.module, self.batches.next(), self.device)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        return torch.stack([rows.double().mean(), self._most if self.cost.fixed else self.cost.spent(aux)])

    @property
    def _identity(self) -> str:
        """What a checkpoint belongs to."""
        return repr((self.run, self.settings, self.budget, len(self.batches.text)))

    def _save(self) -> None:
        """Write the checkpoint; to a neighbour first, so that it is whole or not there."""
        content = {
            "of": self._identity,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.batches.generator.get_state(),
            "state": asdict(self.state),
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.checkpoint.with_suffix(".new")
        torch.save(content, fresh)
        fresh.replace(self.checkpoint)

    def _load(self) -> None:
        """Go on where the checkpoint was written, if it is one of this very run."""
        content = torch.load(self.checkpoint, map_location=self.device)
        if content["of"] != self._identity:
            return
        self.module.load_state_dict(content["module"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.batches.generator.set_state(content["generator"].cpu())
        self.state = State(**content["state"])

    def result(self) -> dict[str, Any]:
        """What came out, as it is kept."""
        state = self.state
        return {
            "budget": self.budget,
            "flops": state.spent,
            "steps": state.step,
            "tokens": state.step * self.settings.read,
            "seconds": state.seconds,
            "tokens_per_second": statistics.median(state.speeds),
            "curve": [(tokens, round(bits, 4)) for tokens, bits in thinned(state.curve)],
        }


def thinned(curve: list[Any], most: int = 20) -> list[Any]:
    """Some entries of a list, spread evenly, the last one among them."""
    step = -(-len(curve) // most)
    return curve[::-1][::step][::-1]


def optimizer_of(module: DepthModule, rate: float) -> torch.optim.Optimizer:
    """AdamW; matrices and routers, which are matrices of one row, decay, norms do not."""
    routers = {id(p) for p in module.new_parameters().values()}
    decayed, others = [], []
    for parameter in module.parameters():
        (decayed if parameter.dim() > 1 or id(parameter) in routers else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, rate, betas=(0.9, 0.95), fused=decayed[0].is_cuda)


def schedule(share: float) -> float:
    """The learning rate at a share of the budget, as a part of the greatest one."""
    return min(1.0, (share + 1e-3) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
