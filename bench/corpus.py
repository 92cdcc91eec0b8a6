"""The corpus of the training experiment: the source text of installed distributions, as one file.

    python bench/corpus.py build/corpus.bin [--megabytes 36] [--record]

Files are taken in the order of the hash of their path until the size is reached, and written in the order of their
paths, each as NUL, path, newline, text. With --record its sha256 and what it is made of go to
`bench/results/corpus.json`; training refuses a file with another sha256.

Whole folders are held out, by the hash of their path: sources repeat each other, those of one folder most of all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from machine import save

from depthc.ir.errors import DepthError

DISTRIBUTIONS = ("torch", "transformers")
RECORD = Path(__file__).parent / "results" / "corpus.json"
BUCKETS = 25  # of the hashes of folders; one is for choosing rates, one for what is reported
HELD_OUT = {0: "choice", 1: "report"}


class CorpusError(DepthError):
    """A corpus that is not there, or not the one that was asked for."""


@dataclass(frozen=True)
class Corpus:
    """Text in three parts.

    Attributes:
        sha256: of the file.
        train: what models are trained on.
        choice: what learning rates are chosen by.
        report: what results are of.
    """

    sha256: str
    train: bytes
    choice: bytes
    report: bytes


def sources(name: str) -> dict[str, bytes]:
    """The Python files of an installed distribution, by path."""
    files = distribution(name).files or ()
    return {file.as_posix(): file.read_binary() for file in files if file.suffix == ".py" and file.parts[0] != ".."}


def chosen(files: Mapping[str, bytes], size: int) -> dict[str, bytes]:
    """Files whose texts are all different, by path, as many as `size` bytes hold."""
    first = {text: path for path, text in sorted(files.items(), reverse=True) if text and b"\0" not in text}
    kept, total = {}, 0
    for text, path in sorted(first.items(), key=lambda item: _hash(item[1])):
        total += len(text) + len(path.encode()) + 2
        if total > size:
            break
        kept[path] = text
    return dict(sorted(kept.items()))


def packed(files: Mapping[str, bytes]) -> bytes:
    """The files as one."""
    return b"".join(b"\0" + path.encode() + b"\n" + text for path, text in files.items())


def part_of(path: str) -> str:
    """Which part of the corpus a file belongs to: "train", "choice" or "report"."""
    return HELD_OUT.get(_hash(path.rpartition("/")[0]) % BUCKETS, "train")


def _hash(text: str) -> int:
    return int(sha256(text.encode()).hexdigest(), 16)


def split(data: bytes) -> Corpus:
    """The parts of a corpus file."""
    parts: dict[str, list[bytes]] = {"train": [], "choice": [], "report": []}
    for file in data.split(b"\0")[1:]:
        parts[part_of(file.partition(b"\n")[0].decode())].append(b"\0" + file)
    return Corpus(sha256(data).hexdigest(), *(b"".join(parts[name]) for name in ("train", "choice", "report")))


def recorded() -> str:
    """The sha256 of the corpus that results are of."""
    return str(json.loads(RECORD.read_text())["sha256"])


def read(path: Path, expected: str) -> Corpus:
    """The corpus of a file.

    Raises:
        CorpusError: there is none, or its sha256 is another one.
    """
    remedy = f"make it: python bench/corpus.py {path}"
    if not path.exists():
        raise CorpusError("there is no corpus", where=str(path), expected="a file", found="none", remedy=remedy)
    corpus = split(path.read_bytes())
    if corpus.sha256 != expected:
        remedy += f", with the versions in {RECORD.name}; or name this one: --sha256 {corpus.sha256}"
        found = f"sha256 {corpus.sha256}"
        what = "the corpus is another one than results are of"
        raise CorpusError(what, where=str(path), expected=f"sha256 {expected}", found=found, remedy=remedy)
    return corpus


def described(data: bytes, versions: Mapping[str, str]) -> dict[str, Any]:
    """What is recorded of a corpus."""
    corpus = split(data)
    parts = {name: len(getattr(corpus, name)) for name in ("train", "choice", "report")}
    return {
        "sha256": corpus.sha256,
        "bytes": len(data),
        "files": data.count(b"\0"),
        "distributions": dict(versions),
        "parts": parts,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--megabytes", type=float, default=36, help="at most (default: 36)")
    parser.add_argument("--record", action="store_true", help="make it the corpus that results are of")
    options = parser.parse_args()
    files = {path: text for name in DISTRIBUTIONS for path, text in sources(name).items()}
    data = packed(chosen(files, int(options.megabytes * 1e6)))
    options.path.parent.mkdir(parents=True, exist_ok=True)
    options.path.write_bytes(data)
    about = described(data, {name: distribution(name).version for name in DISTRIBUTIONS})
    save(about, RECORD if options.record else None)
    if about["sha256"] == recorded():
        return 0
    print(f"this is not the corpus of {RECORD}: that is made of {json.loads(RECORD.read_text())['distributions']}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
