"""Text as bytes: what the demo reads, in windows."""

import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

NOT_PLAIN_SOURCE = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


def read_text(file: Path | None) -> tuple[bytes, bytes]:
    """(training, held-out) text: the source of the Python standard library, or a file.

    A twentieth of the modules, or the end of the file, is held out.
    """
    if file is not None:
        text = file.read_bytes()
        cut = len(text) * 19 // 20
        return text[:cut], text[cut:]
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(f for f in stdlib.rglob("*.py") if not NOT_PLAIN_SOURCE & set(f.relative_to(stdlib).parts))
    random.Random(0).shuffle(modules)
    cut = len(modules) * 19 // 20
    train, held_out = (b"".join(f.read_bytes() for f in part) for part in (modules[:cut], modules[cut:]))
    return train, held_out


def windows(text: bytes, length: int) -> Tensor:
    """The text as rows of `length` bytes: uint8[rows, length]."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return data[: len(data) // length * length].view(-1, length)


def batches(text: bytes, length: int, rows: int, seed: int = 0) -> Iterator[Tensor]:
    """Batches of windows without end, in a new order every epoch: int64[rows, length]."""
    every, order = windows(text, length), torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(every), generator=order).split(rows):
            if len(chosen) == rows or len(every) < rows:
                yield every[chosen].long()


def prompts(text: bytes, length: int, count: int, seed: int = 0) -> Tensor:
    """Stretches of text that end after the first word of a line, if it has such lines: int64[count, length]."""
    ends = [m.end() for m in re.finditer(rb"\n *\w+[ .(]", text) if m.end() >= length] or range(length, len(text))
    return torch.tensor([list(text[end - length : end]) for end in random.Random(seed).sample(ends, count)])


def decoded(tokens: Tensor) -> str:
    """A row of bytes as text."""
    return bytes(tokens.tolist()).decode("utf-8", "replace")
