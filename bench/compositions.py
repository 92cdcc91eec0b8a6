"""Which passes follow each other: every ordered pair, on the layers of a model and on layers that tie made a loop of.

    python bench/compositions.py --out bench/results/compositions.json

A small Llama in fp64 on the CPU; some longer recipes too. A recipe is legal, or the row says why not. Of a legal one:
which shorter recipes it equals before it is trained; then, with noise on its new parameters, how many parameters it
reads, all of which must get finite gradients, and how far logits token by token are from those of the whole sequence.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from machine import provenance, write
from precision import widen_program
from torch import Tensor
from torch.nn import functional as F

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.ir.errors import IncrementalError, RecipeError
from depthc.ir.program import Program
from depthc.passes.layers import used_params
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipe import Recipe

LAYERS, VOCAB, LENGTH, PROMPT = 8, 32, 9, 4
CLOSE = 1e-9  # of logits in fp64 that are to be the same
TIED = 'tie(loops=3, sharing="middle_cycle")'
SHARES = (1.0, 0.5, 1.0, 0.5, *(1.0,) * 4)
PASSES = {
    "tie": TIED,
    "loop": "loop()",
    "route": "route()",
    "tokenchoice": "tokenchoice()",
    "mod": "mod(layers=(1, 3), capacity=0.5)",
    "keep": f"keep(capacities={SHARES}, threshold=3.0)",
    "stagger": "stagger()",
    "widen": "widen()",
    "stride": "stride(layers=(1, 2), every=2)",
}
"""The passes, with options that fit the eight layers, and those of the first stack of two."""
BASES = {"layers": "identity", "loop": TIED}
"""What the first pass of a pair is given: the model's layers, or a loop over some of them."""


@dataclass(frozen=True)
class Subject:
    """A captured model in fp64 and its tokens."""

    program: Program
    ids: Tensor

    def lowered(self, text: str) -> DepthModule:
        """What a recipe makes of the model, with the recipe's own initial values."""
        return lower(run_recipe(self.program, Recipe.parse(text))[0]).eval()

    @torch.no_grad()
    def logits(self, module: DepthModule) -> Tensor:
        return module(input_ids=self.ids).logits


@cache
def subject() -> Subject:
    """A Llama of eight layers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return Subject(widen_program(depthc.capture(model, kwargs={"input_ids": ids})), ids)


LONGER = (
    f"{TIED} | stagger(reinject=False)",
    f"{TIED} | stagger(shared=True)",
    f"{TIED} | stagger(reinject=False) | widen()",
    "stagger(shared=True) | widen()",
    'tie(loops=4, sharing="sequence") | stagger() | loop() | route(loop="r")',
    'tie(loops=4, sharing="sequence") | stagger() | loop() | route(loop="r_1")',
    'stagger() | tie(loops=2, sharing="middle_cycle", keep=(0, 4)) | route()',
    'stagger() | tie(loops=2, sharing="middle_cycle", keep=(0, 4)) | tokenchoice()',
    "stagger() | widen() | mod(layers=(1, 3), capacity=0.5)",
    "stagger() | mod(layers=(1, 5), capacity=0.5)",
    'stagger() | widen(embedding="wide")',
    f"{TIED} | widen() | loop() | route()",
    f"widen() | keep(capacities={SHARES})",
)
"""What no pair shows: loops and routes inside one of two stacks, three passes, other options."""


@dataclass(frozen=True)
class Composition:
    """A recipe, and the shorter ones that it may equal, by name.

    Attributes:
        given, first, second: of a pair, its names; else empty.
    """

    recipe: str
    shorter: dict[str, str]
    given: str = ""
    first: str = ""
    second: str = ""

    def judge(self) -> dict[str, Any]:
        """The row of the recipe."""
        row: dict[str, Any] = {k: getattr(self, k) for k in ("given", "first", "second", "recipe")}
        try:
            module = subject().lowered(self.recipe)
        except RecipeError as error:
            return row | {"legal": False, "reason": error.what, "found": error.found, "remedy": error.remedy}
        equals = self.equals()
        with_noise(module)
        return row | {"legal": True, "equals": equals, "gradients": gradients(module), **token_by_token(module)}

    def equals(self) -> list[str]:
        """The shorter recipes that compute the same at the initial values."""
        mine, others = initial(self.recipe), {name: initial(text) for name, text in self.shorter.items()}
        assert mine is not None
        return [name for name, other in others.items() if other is not None and (mine - other).abs().max() < CLOSE]


def pair(given: str, first: str, second: str) -> Composition:
    """Two passes by their names, with the options they have here."""

    def text(*names: str) -> str:
        return " | ".join([BASES[given], *(PASSES[name] for name in names)]).removeprefix("identity | ")

    shorter = {"given": text(), first: text(first), second: text(second)}
    return Composition(text(first, second), shorter, given, first, second)


def longer(text: str) -> Composition:
    """A recipe beside those from which its last passes are left out."""
    parts = text.split(" | ")
    return Composition(text, {" | ".join(parts[:n]): " | ".join(parts[:n]) for n in range(1, len(parts))})


def compositions() -> Iterator[Composition]:
    """All that are judged."""
    yield from (pair(given, first, second) for given in BASES for first in PASSES for second in PASSES)
    yield from map(longer, LONGER)


@cache
def initial(text: str) -> Tensor | None:
    """Logits under a recipe before it is trained; None where it is refused."""
    try:
        return subject().logits(subject().lowered(text))
    except RecipeError:
        return None


def with_noise(module: DepthModule, std: float = 0.3) -> DepthModule:
    """Noise on what a recipe adds: much of it is zero at first, which would hide what it does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.new_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * std)
    return module


def gradients(module: DepthModule) -> int:
    """How many parameters got a finite gradient in a step of training; all that the program reads must."""
    ids, read = subject().ids, used_params(module.program)
    out, aux = module.train().forward_with_aux(input_ids=ids)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (loss if aux.loss is None else loss + aux.loss).backward()
    trained = {name for name, param in module.program.params.items() if param.kind == "parameter" and name in read}
    grads = {name: module.parameter_of(name).grad for name in trained}
    bad = sorted(name for name, grad in grads.items() if grad is None or not grad.isfinite().all())
    if bad:
        raise AssertionError(f"no finite gradient of {', '.join(bad)}")
    return len(grads)


@torch.no_grad()
def token_by_token(module: DepthModule) -> dict[str, Any]:
    """The largest difference of logits, a prompt and then a token a step; or why there are no steps."""
    ids, program = subject().ids, module.eval().program
    try:
        out, past = program.start(input_ids=ids[:, :PROMPT])
    except IncrementalError as error:
        return {"steps": False, "reason": error.what}
    parts = [out["logits"]]
    for t in range(PROMPT, LENGTH):
        out, past = program.step(past, input_ids=ids[:, t : t + 1])
        parts.append(out["logits"])
    gap = (torch.cat(parts, 1) - subject().logits(module)).abs().max().item()
    return {"steps": True, "gap": gap}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = [one.judge() for one in compositions()]
    report = provenance("cpu") | {"options": PASSES, "given": BASES, "rows": rows}
    write(report, options.out)
    return int(any(row.get("gap", 0.0) > CLOSE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
