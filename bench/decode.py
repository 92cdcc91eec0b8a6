"""Steps of decoding: a decoder, and what staggering its stacks makes of it, each step as one CUDA graph.

Other rows have two and four stacks, and the models of the training study (`bench/training.py --study staggered`).

    python bench/decode.py --out build/decode.json                          on an H200
    python bench/decode.py --out build/decode.json --tiny --device cpu      a rehearsal

A row is a process of its own: a width and a batch; its variants take turns, in another order every round, twice over.
A row that is done is not run again. Floors are the bytes of all weights and keys that a step reads, each once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import training_plan
from routing import Results, in_time, in_turn, side_by_side
from routing_plan import Asked, Sizes
from routing_race import BYTES, Race
from routing_time import Clock, Place, Ready
from torch import nn

import depthc
from depthc.ir.program import Program


@dataclass(frozen=True)
class Variant:
    """A model to decode with.

    Attributes:
        options: of the decoder.
        depth: the share of the row's layers that it has.
    """

    recipe: str
    options: Mapping[str, bool] = field(default_factory=dict)
    depth: float = 1.0


BATCH, BRANCHES = {"together": True}, {"together": False}
VARIANTS = {
    "original": Variant("identity"),
    "original, without kernels": Variant("identity", {"kernels": False}),
    "separate, window 128": Variant("stagger(window=128)", BATCH),
    "separate, window 128, branches": Variant("stagger(window=128)", BRANCHES),
    "separate": Variant("stagger()", BATCH),
    "shared, window 128": Variant("stagger(shared=True, window=128)", BATCH),
    "shared": Variant("stagger(shared=True)", BATCH),
    "shared, window 128, branches": Variant("stagger(shared=True, window=128)", BRANCHES),
    "recurrent, window 128": Variant("stagger(shared=True, window=128)", {"recurrent": True}),
}
STACKS = {
    "original": Variant("identity"),
    "two": Variant("stagger(window=128)", BATCH),
    "two, branches": Variant("stagger(window=128)", BRANCHES),
    "four": Variant("stagger(stacks=4, window=128)", BATCH),
    "four, branches": Variant("stagger(stacks=4, window=128)", BRANCHES),
}
FASTEST = ("separate, window 128", "separate, window 128, branches")
WIDTHS = {960: Sizes(960, 15, 5, 2560), 2048: Sizes(2048, 16, 8, 5632)}
GAIN = {960: 1.45, 2048: 1.3}  # at a batch of one
VOCABULARY, LIMIT = 512, 150
BACKEND = "inductor"


@dataclass(frozen=True)
class Row:
    """A model and its batch.

    Attributes:
        context: tokens so far.
        variants: the first one is what others are compared with.
        asked: what is asked of the variants.
    """

    name: str
    sizes: Sizes
    batch: int
    layers: int = 16
    context: int = 1024
    vocabulary: int = VOCABULARY
    variants: Mapping[str, Variant] = field(default_factory=lambda: VARIANTS)
    asked: tuple[Asked, ...] = ()


def _rows() -> dict[str, Row]:
    found = {}
    for batch in (1, 8, 32):
        for width, sizes in WIDTHS.items():
            asked = (Asked(FASTEST, "original", 1 / GAIN[width]),) if batch == 1 else ()
            found[f"D={width}, B={batch}"] = Row(f"D={width}, B={batch}", sizes, batch, asked=asked)
    for width, batch in ((960, 1), (2048, 1), (960, 4)):
        name = f"stacks, D={width}, B={batch}"
        found[name] = Row(name, WIDTHS[width], batch, variants=STACKS)
    return {**found, "study": _study()}


def _study() -> Row:
    """The models of the training study."""
    study, s = training_plan.STUDIES["staggered"], training_plan.Settings()
    trained = {name: training_plan.VARIANTS[name] for name in study.variants}
    variants = {name: Variant(one.recipe, BATCH, one.depth) for name, one in trained.items()}
    return Row("study", Sizes(s.width, s.heads, s.heads, s.inner), 1, study.layers, s.context - 1, 256, variants)


ROWS = _rows()


def llama(row: Row, depth: float) -> nn.Module:
    """A Llama with a share of the row's layers and a small vocabulary: its head is no part of what is compared."""
    import transformers

    s = row.sizes
    config = transformers.LlamaConfig(
        vocab_size=row.vocabulary,
        hidden_size=s.width,
        intermediate_size=s.inner,
        num_hidden_layers=round(row.layers * depth),
        num_attention_heads=s.heads,
        num_key_value_heads=s.key_heads,
        max_position_embeddings=row.context + 1,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def measure(row: Row, place: Place) -> dict[str, Any]:
    """Seconds of a step of every variant, the same token at the same place again and again."""
    torch.manual_seed(0)
    with torch.device(place.device):
        prompt, example = (torch.randint(row.vocabulary, shape) for shape in ((row.batch, row.context), (2, 9)))
    programs: dict[float, Program] = {}
    sections: dict[str, tuple[int, ...]] = {}
    floors: dict[str, float] = {}

    def program(depth: float) -> Program:
        if depth not in programs:
            with torch.device(place.device):
                model = llama(row, depth).to(torch.bfloat16).eval()
            programs[depth] = depthc.capture(model, kwargs={"input_ids": example})
        return programs[depth]

    def made(name: str) -> Ready:
        own = row.variants[name]
        module = depthc.compile(program(own.depth), own.recipe).eval()
        decoder = depthc.Decoder(module, prompt, row.context + 1, compile=place.cuda, **own.options)
        sections[name] = decoder.sections
        moved = sum(p.numel() * p.element_size() for p in module.parameters()) + decoder.cache_bytes
        floors[name] = moved / BYTES
        token = prompt[:, :1]

        def run() -> torch.Tensor:
            decoder.place = row.context
            return decoder.step(token)

        return Ready(run)

    rounds, least = (12, 0.02) if place.cuda else (2, 0.0)
    clock = Clock(place, rounds, least, until=time.perf_counter() + LIMIT * 0.8)
    race = Race(clock).run({name: partial(made, name) for name in row.variants})
    first, times = next(iter(row.variants)), {name: race.median(name) for name in race.times}
    return {
        "times": race.times,
        "failures": race.failed,
        "skipped": race.skipped,
        "gain": {name: times[first] / own for name, own in times.items()} if first in times else {},
        "floors": floors,
        "sections": sections,
        "asked": [one.answer(times) for one in row.asked],
    }


def parse_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/decode.json"), help="where results go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=tuple(ROWS), metavar="ROW", help="rows, if not all")
    parser.add_argument("--limit", type=float, default=560, help="seconds for this call (default: 560)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: a tiny model, few calls")
    parser.add_argument("--retry", action="store_true", help="run what failed once more")
    parser.add_argument("--jobs", type=int, default=1, help="rows that get ready at once (default: 1)")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.backend = BACKEND
    return options


def main(given: Sequence[str] | None = None) -> int:
    options = parse_arguments(given)
    if options.row:
        row = ROWS[options.row]
        if options.tiny:
            row = replace(row, sizes=Sizes(32, 4, 2, 64), layers=4, context=24)
        in_turn(partial(measure, row), options)
        return 0
    results, began = Results(options), time.perf_counter()
    again = results.failed() if options.retry else []

    def one(name: str, turns: list[str]) -> bool:
        """Whether a row is done."""
        left = int(options.limit - (time.perf_counter() - began))
        if left < LIMIT / 2:
            print(f"{name}: {left} s are left: run this again", flush=True)
            return False
        found = in_time(__file__, ["--row", name, *turns], options, LIMIT * options.jobs, left)
        if found is not None:
            results.keep(name, found)
        said = "not done, run this again" if found is None else found.get("gain") or found.get("failed")
        print(f"{name}: {said}", flush=True)
        return found is not None

    remaining = [name for name in options.only if name not in results.rows or name in again]
    return int(bool(results.failed())) if side_by_side(one, remaining, options.jobs) else 3


if __name__ == "__main__":
    sys.exit(main())
