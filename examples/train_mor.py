"""Compile a small Llama to a Mixture-of-Recursions, and train it beside the original and the tied form.

    python examples/train_mor.py [--text FILE] [--seconds 40] [--out build/demo]

The three models start from the same weights, read the same text in the same order, and train for the same number of
floating-point operations: a mixture of recursions spends less on a token, so it reads more of them. Printed are the
programs before and after, the loss on held-out text (with the causal selection, and with that of training beside it),
and what the mixture writes. A text coloured by depth is written to --out.

A minute of training shows how the parts are used, not which architecture is better.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import reading
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import cross_entropy

import depthc
from depthc.codegen.aux import Aux
from depthc.codegen.module import DepthModule
from depthc.ir.cost.flops import flops
from depthc.runtime.picture import picture
from depthc.runtime.telemetry import combine, depth_of, report

LAYERS, LOOPS, WIDTH = 8, 3, 96
CONTEXT, BATCH = 128, 4
PEAK_RATE, WARMUP = 4e-3, 0.1  # warm-up as a share of the steps
ROUTER_LOSS = 0.1  # a short training needs more of it than the published 0.001
HELD_OUT, PROMPT, COMPLETION = 64, 64, 64  # batches, bytes, bytes


def build_model() -> transformers.LlamaForCausalLM:
    """A Llama of bytes."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


@dataclass
class Run:
    """One model and how its training went.

    Attributes:
        cost: floating-point operations of a training step.
        bits: bits a byte on held-out text; `bits_topk` with the selection of training, where tokens are selected.
    """

    name: str
    module: DepthModule
    cost: float
    steps: int = 0
    seconds: float = 0.0
    bits: float = math.nan
    bits_topk: float | None = None


def compile_all(model: torch.nn.Module) -> list[Run]:
    """The model itself, with tied layers, and as a mixture of recursions."""
    kwargs = {"input_ids": torch.zeros((2, CONTEXT), dtype=torch.int64)}
    shared = {"loops": LOOPS, "sharing": "middle_cycle"}
    modules = {
        "original": depthc.compile(copy.deepcopy(model), kwargs=kwargs),
        "tied": depthc.compile(model, "tie", kwargs=kwargs, **shared),
        "mor": depthc.compile(model, "mor", kwargs=kwargs, loops=LOOPS, loss=ROUTER_LOSS),
    }
    sizes = {"b": BATCH, "s": CONTEXT}
    return [Run(name, m, 3 * float(flops(m.program).subs(sizes))) for name, m in modules.items()]


def show_programs(before: DepthModule, after: DepthModule, console: Console) -> None:
    """The original program, what the passes did, and the functions that are new or another."""
    console.rule("before")
    console.print(str(before.program), markup=False)
    console.rule("after: what is new")
    known = set(str(before.program).split("\n\n"))
    parts = [part for part in str(after.program).split("\n\n") if part not in known]
    console.print(*map(str, after.history), "\n\n".join(parts), sep="\n", markup=False)


# training


class Trainer:
    """AdamW with warm-up and a cosine schedule over the steps of a run."""

    def __init__(self, run: Run, text: bytes) -> None:
        self.run, self.batches = run, reading.batches(text, CONTEXT, BATCH)
        self.optimizer = torch.optim.AdamW(run.module.parameters(), PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)

    def step(self, number: int) -> float:
        """One step; returns the loss of the text."""
        share = (number + 1) / (self.run.steps + 1)
        rate = 0.5 * (1 + math.cos(math.pi * share)) * min(1.0, share / WARMUP)
        self.optimizer.param_groups[0]["lr"] = PEAK_RATE * rate
        loss, aux = loss_of(self.run.module, next(self.batches))
        self.optimizer.zero_grad()
        (loss if aux.loss is None else loss + aux.loss).backward()
        torch.nn.utils.clip_grad_norm_(self.run.module.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def train(self, progress: Progress) -> None:
        """All steps, with a bar."""
        task = progress.add_task(self.run.name, total=self.run.steps, status="")
        self.run.module.train()
        began, average = time.perf_counter(), math.log(256)
        for number in range(self.run.steps):
            average += 0.05 * (self.step(number) - average)
            status = f"step {number + 1} of {self.run.steps}, {average / math.log(2):.2f} bits a byte"
            progress.update(task, advance=1, status=status)
        self.run.seconds = time.perf_counter() - began
        self.run.module.eval()


def loss_of(module: DepthModule, batch: Tensor) -> tuple[Tensor, Aux]:
    """The cross-entropy of every next byte in nats, and what the program taps."""
    out, aux = module.forward_with_aux(input_ids=batch)
    return cross_entropy(out.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()), aux


def set_steps(runs: list[Run], text: bytes, seconds: float) -> None:
    """As many operations for every run as the original takes in the given time on this machine."""
    trial = copy.deepcopy(runs[0])
    trial.module.train()
    trainer, times = Trainer(trial, text), []
    for number in range(8):
        began = time.perf_counter()
        trainer.step(number)
        times.append(time.perf_counter() - began)
    budget = seconds / sorted(times)[len(times) // 2] * trial.cost
    for run in runs:
        run.steps = max(1, round(budget / run.cost))


# what came out


@torch.no_grad()
def evaluate(module: DepthModule, batches: Sequence[Tensor], selection: str = "inference") -> tuple[float, list[Aux]]:
    """Bits a byte on held-out text, and what the program taps."""
    module.selection = selection
    losses, taps = zip(*(loss_of(module, batch) for batch in batches), strict=True)
    module.selection = "inference"
    return float(torch.stack(losses).mean()) / math.log(2), list(taps)


def evaluate_all(runs: list[Run], batches: Sequence[Tensor], console: Console) -> None:
    """Every run; of the mixture, which is the last, also with top-k, and what its routers do."""
    for run in runs:
        run.bits, taps = evaluate(run.module, batches)
    runs[-1].bits_topk, foretold = evaluate(runs[-1].module, batches, "training")
    console.print(results(runs))
    console.print(f"causal selection on held-out text: {combine(map(report, taps))}")
    console.print(f"routers foretell {combine(map(report, foretold)).overall_accuracy:.1%} of the choices of top-k")


def results(runs: list[Run]) -> Table:
    """One row a model."""
    table = Table(title="equal training FLOPs")
    columns = ("model", "parameters", "FLOPs a byte", "steps", "bytes read", "seconds", "bits a byte, causal", "top-k")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for run in runs:
        parameters = sum(p.numel() for p in run.module.parameters())
        topk = "" if run.bits_topk is None else f"{run.bits_topk:.3f}"
        read = BATCH * CONTEXT
        table.add_row(
            run.name,
            f"{parameters:,}",
            f"{run.cost / 3 / read:,.0f}",
            str(run.steps),
            f"{run.steps * read:,}",
            f"{run.seconds:.0f}",
            f"{run.bits:.3f}",
            topk,
        )
    return table


def write(module: DepthModule, prompts: Tensor, console: Console) -> bool:
    """Continue the prompts by draws; whether greedy continuations are those that whole sequences lead to."""
    for row in depthc.generate(module, prompts, COMPLETION, temperature=0.7):
        before, after = reading.decoded(row[:PROMPT]), reading.decoded(row[PROMPT:])
        console.print(Text.assemble((before, "dim"), (after, "bold green")))
        console.rule()
    greedy = depthc.generate(module, prompts, COMPLETION)
    with torch.no_grad():
        whole = module(input_ids=greedy).logits[:, PROMPT - 1 : -1].argmax(-1)
    same = torch.equal(whole, greedy[:, PROMPT:])
    console.print(f"token by token as all at once: {'yes' if same else 'NO'}")
    return same


def draw(module: DepthModule, tokens: Tensor, folder: Path) -> list[Path]:
    """Pictures of a text by depth."""
    with torch.no_grad():
        depths = depth_of(module.forward_with_aux(input_ids=tokens[None])[1])[0]
    folder.mkdir(parents=True, exist_ok=True)
    texts = [bytes([token]) for token in tokens.tolist()]
    names = ("depth.html", "depth.png")
    return [picture(texts, depths, folder / name, deepest=LOOPS, title="Held-out text by depth") for name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a mixture of recursions: see the head of this file.")
    parser.add_argument("--text", type=Path, help="train on this file instead of the standard library")
    parser.add_argument("--seconds", type=float, default=40, help="time to train the original for (default: 40)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where pictures go")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    torch.manual_seed(0)

    text, held_out = reading.read_text(options.text)
    runs = compile_all(build_model())
    original, _, mor = runs
    show_programs(original.module, mor.module, console)
    set_steps(runs, text, options.seconds)
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for run in runs:
            Trainer(run, text).train(progress)
    batches = reading.windows(held_out, CONTEXT)[: HELD_OUT * BATCH].long().split(BATCH)
    evaluate_all(runs, batches, console)
    agreed = write(mor.module, reading.prompts(held_out, PROMPT, 3), console)
    for file in draw(mor.module, torch.tensor(list(held_out[:CONTEXT])), options.out):
        console.print(f"picture: {file}")
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
