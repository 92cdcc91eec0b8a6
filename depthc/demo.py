"""The tour of `depthc demo`: a small transformer becomes a Mixture-of-Recursions, learns a little, and is drawn."""

from __future__ import annotations

import sysconfig
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

import depthc
from depthc.codegen.module import DepthModule
from depthc.runtime.picture import picture
from depthc.runtime.telemetry import depth_of

WIDTH, HEADS, LAYERS, LOOPS = 96, 4, 8, 3
CONTEXT, BATCH = 128, 8
RATE, ROUTER_LOSS = 3e-3, 0.1


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        gate, up = self.up(self.norm2(h)).chunk(2, -1)
        return h + self.down(silu(gate) * up)


class ByteModel(nn.Module):
    """Predicts the next byte of a text: int64[batch, tokens] to f32[batch, tokens, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h))


def source_text() -> Tensor:
    """Source text of the Python standard library, as bytes: uint8[n]."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def train(model: DepthModule, text: Tensor, seconds: float, progress: Progress) -> float:
    """Train on random windows of a text for some time; the last losses' mean, in nats a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    task = progress.add_task("training", total=seconds)
    began, average = time.perf_counter(), 0.0
    while (spent := time.perf_counter() - began) < seconds or not average:
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1))
        rows = text[starts + torch.arange(CONTEXT + 1)].long()
        out, aux = model.forward_with_aux(rows[:, :-1])
        loss = cross_entropy(out.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        (loss if aux.loss is None else loss + aux.loss).backward()
        optimizer.step()
        average = 0.95 * average + 0.05 * loss.item() if average else loss.item()
        progress.update(task, completed=spent)
    return average


def run(out: Path, seconds: float) -> None:
    """Explain, compile, train and draw; what is drawn goes into the folder `out`."""
    console = Console(highlight=False)
    torch.manual_seed(0)
    model, example = ByteModel(), torch.zeros(2, CONTEXT, dtype=torch.int64)
    console.print(depthc.explain(model, "mor", (example,), loops=LOOPS).table(b=BATCH, s=CONTEXT), markup=False)
    compiled = depthc.compile(model, "mor", (example,), loops=LOOPS, loss=ROUTER_LOSS)
    report = compiled.dump(out) / "report.html"
    text = source_text()
    with Progress(console=console) as progress:
        loss = train(compiled.train(), text, seconds, progress)
    console.print(f"after {seconds:.0f} s: {loss:.2f} nats a byte")
    start = len(text) // 2
    sample = text[start : start + CONTEXT].long()[None]
    compiled.eval()
    with torch.no_grad():
        depths = depth_of(compiled.forward_with_aux(sample)[1])[0]
    tokens = [bytes([byte]) for byte in sample[0].tolist()]
    page = picture(tokens, depths, out / "depth.html", deepest=LOOPS, title="How deep each byte went")
    console.print(f"what the recipe did: {report}\nhow deep each byte went: {page}")
