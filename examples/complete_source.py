"""Train a small Llama on Python source for a minute, capture it, and complete held-out source.

    python examples/complete_source.py [--text FILE] [--seconds 60]

The text is the source of the Python standard library, read as bytes. The captured program completes prompts token by
token through incremental evaluation. Beside it the original model completes the same prompts with its own cache: the
bytes must be equal and the logits within 1e-4, or the exit status is 1.
"""

import argparse
import math
import random
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import cross_entropy

import depthc
from depthc.ir.axes.ports import ports_of

CONTEXT, PROMPT, COMPLETION = 256, 160, 80
BATCH, PEAK_RATE, WARMUP_STEPS = 2, 5e-3, 50
TOLERANCE = 1e-4
NOT_PLAIN_SOURCE = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


def build_model() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def read_text(file: Path | None) -> tuple[bytes, bytes]:
    """(training, held-out) text: a twentieth of the modules, or the end of the file, is held out."""
    if file is not None:
        text = file.read_bytes()
        cut = len(text) * 19 // 20
        return text[:cut], text[cut:]
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(f for f in stdlib.rglob("*.py") if not NOT_PLAIN_SOURCE & set(f.relative_to(stdlib).parts))
    random.shuffle(modules)
    cut = len(modules) * 19 // 20
    train, held_out = (b"".join(f.read_bytes() for f in part) for part in (modules[:cut], modules[cut:]))
    return train, held_out


def batches(text: bytes) -> Iterator[Tensor]:
    """Batches of windows in a new random order every epoch."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    windows = data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    while True:
        for rows in torch.randperm(len(windows)).split(BATCH):
            yield windows[rows].long()


def train(model: torch.nn.Module, text: bytes, seconds: float, console: Console) -> None:
    """AdamW with a cosine schedule over the given time, so that training ends annealed on a machine of any speed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn())
    model.train()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=seconds, status="")
        start = time.perf_counter()
        average = math.log(256)
        for step, batch in enumerate(batches(text), 1):
            spent = time.perf_counter() - start
            if spent >= seconds:
                break
            cosine = 0.5 * (1 + math.cos(math.pi * spent / seconds))
            optimizer.param_groups[0]["lr"] = PEAK_RATE * cosine * min(1.0, step / WARMUP_STEPS)
            logits = model(input_ids=batch, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average += 0.05 * (loss.item() - average)
            bits = average / math.log(2)
            progress.update(task, completed=spent, status=f"step {step}, {bits:.2f} bits a byte")
        progress.update(task, completed=seconds)
    model.eval()


def pick_prompts(text: bytes, count: int) -> Tensor:
    """Stretches of the text that end after the first word of a line, if it has such lines."""
    ends = [m.end() for m in re.finditer(rb"\n *\w+[ .(]", text) if m.end() >= PROMPT] or range(PROMPT, len(text))
    return torch.tensor([list(text[end - PROMPT : end]) for end in random.sample(ends, count)])


class Completion(NamedTuple):
    tokens: Tensor
    logits: Tensor
    tokens_per_second: float


def complete(start: Callable[[Tensor], Any], step: Callable[[Any, Tensor], Any], prompts: Tensor) -> Completion:
    """Greedy completion: the prompts at once, then token by token. Both engines go through this one loop."""
    began = time.perf_counter()
    out, past = start(prompts)
    logits = [out.logits[:, -1:]]
    while len(logits) < COMPLETION:
        out, past = step(past, logits[-1].argmax(-1))
        logits.append(out.logits)
    scores = torch.cat(logits, 1)
    return Completion(scores.argmax(-1), scores, len(prompts) * COMPLETION / (time.perf_counter() - began))


def complete_with_program(program: depthc.Program, prompts: Tensor) -> Completion:
    return complete(
        lambda ids: program.start(input_ids=ids),
        lambda past, token: program.step(past, input_ids=token),
        prompts,
    )


def complete_with_model(model: torch.nn.Module, prompts: Tensor) -> Completion:
    def step(past: Any, token: Tensor) -> Any:
        out = model(input_ids=token, past_key_values=past, use_cache=True)
        return out, out.past_key_values

    return complete(lambda ids: step(None, ids), step, prompts)


def side_by_side(prompts: Tensor, ours: Completion, theirs: Completion) -> Table:
    """The prompts, dim, and what each engine makes of them."""
    table = Table(show_lines=True)
    for title in ("depthc, token by token", "original model, its own cache"):
        table.add_column(title, ratio=1)
    for rows in zip(prompts, ours.tokens, theirs.tokens, strict=True):
        prompt, *completions = (bytes(row.tolist()).decode("utf-8", "replace") for row in rows)
        table.add_row(*(Text.assemble((prompt, "dim"), (text, "bold green")) for text in completions))
    return table


def compare(model: torch.nn.Module, program: depthc.Program, prompts: Tensor, console: Console) -> bool:
    """Complete the prompts with both, show the results, and say whether they agree."""
    ours, theirs = complete_with_program(program, prompts), complete_with_model(model, prompts)
    console.print(side_by_side(prompts, ours, theirs))
    same = torch.equal(ours.tokens, theirs.tokens)
    difference = (ours.logits - theirs.logits).abs().max().item()
    console.print(f"same bytes: {'yes' if same else 'NO'}; largest difference of logits: {difference:.1e}")
    console.print(f"tokens/s: depthc {ours.tokens_per_second:.0f}, original {theirs.tokens_per_second:.0f}")
    return same and difference <= TOLERANCE


def describe(program: depthc.Program, console: Console) -> None:
    """The program's text, its depths and its attention ports."""
    console.print(str(program), markup=False)
    console.print(f"depths: {program.depths}")
    for name, block in program.blocks.items():
        for port in ports_of(block):
            console.print(f"attention of {name}: {port}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, capture and complete: see the head of this file.")
    parser.add_argument("--text", type=Path, help="train on this file instead of the standard library")
    parser.add_argument("--seconds", type=float, default=60, help="time to train for (default: 60)")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    random.seed(0)
    torch.manual_seed(0)

    model = build_model()
    training_text, held_out = read_text(options.text)
    size = sum(p.numel() for p in model.parameters())
    console.print(f"a Llama of {size:,} parameters, {len(training_text):,} bytes of text")
    train(model, training_text, options.seconds, console)

    prompts = pick_prompts(held_out, 3)
    began = time.perf_counter()
    program = depthc.capture(model, kwargs={"input_ids": prompts})
    console.print(f"captured in {time.perf_counter() - began:.1f} s")
    describe(program, console)
    with torch.no_grad():
        return 0 if compare(model, program, prompts, console) else 1


if __name__ == "__main__":
    sys.exit(main())
