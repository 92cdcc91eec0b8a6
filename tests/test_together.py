"""Stacks whose layers are alike, one batch: every step is that of the whole sequence, and weights are read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import oracles
import pytest
import torch
from oracles import Wide
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import depthc
from depthc.codegen.few_rows import FEW_ROWS
from depthc.codegen.kernels.few_rows import FEW
from depthc.codegen.module import DepthModule
from depthc.ir.pieces import pieces_of
from depthc.ir.program import calls
from depthc.runtime.decode import Decoder

from .routed import FORWARD, ROWS, captured
from .test_stagger import EVERY, compiled
from .test_stagger_steps import LENGTH, PROMPT, full, split

SHARED: dict[str, dict[str, Any]] = {
    "two": {"shared": True},
    "window": {"shared": True, "window": 2, "lag": 2},
    "three": {"shared": True, "stacks": 3, "window": 3},
}
OWN: dict[str, dict[str, Any]] = {"apart": {}, "four apart": {"stacks": 4, "window": 3}}
OPTIONS = SHARED | OWN
APART = {"window": 2, "lag": 2}  # layers of their own
KINDS = ["llama", *(pytest.param(kind, marks=pytest.mark.thorough) for kind in EVERY[1:])]


def begun(kind: str, rows: str) -> dict[str, Tensor]:
    """The arguments of the sequences that have begun within the prompt."""
    return {name: value[ROWS[rows][:, :PROMPT].any(1)] for name, value in captured(kind, rows)[2].items()}


def decoder_of(kind: str, rows: str, module: DepthModule, **options: Any) -> tuple[Decoder, str]:
    """A decoder of the first tokens, and the argument that takes them."""
    (tokens, fixed), name = split(kind, begun(kind, rows)), oracles.token_input(kind)
    masks = {n: v[:, :PROMPT] for n, v in tokens.items() if n != name}
    prompt = tokens[name][:, :PROMPT]
    return Decoder(module.program, prompt, LENGTH, argument=name, arguments=fixed | masks, **options), name


def steps_of(kind: str, rows: str, module: DepthModule, **options: Any) -> tuple[Tensor, Decoder]:
    """Logits behind the prompt, and at further tokens."""
    with Wide():
        decoder, name = decoder_of(kind, rows, module, **options)
        tokens, found = begun(kind, rows)[name], [decoder.logits]
        for t in range(PROMPT, LENGTH):
            found.append(decoder.step(tokens[:, t : t + 1]))
    return torch.stack(found, 1), decoder


def assert_as_the_whole(kind: str, rows: str, **options: Any) -> None:
    module, inputs = compiled(kind, rows, **options), begun(kind, rows)
    found, decoder = steps_of(kind, rows, module, together=True)
    assert decoder.together
    real = ROWS[rows][ROWS[rows][:, :PROMPT].any(1), PROMPT - 1 :]
    assert (found - full(module, inputs)[:, PROMPT - 1 :])[real].abs().max() < FORWARD
    branches, other = steps_of(kind, rows, module, together=False)
    assert not other.together
    assert (found - branches).abs().max() < FORWARD
    assert decoder.cache_bytes == other.cache_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHARED, *(pytest.param(name, marks=pytest.mark.thorough) for name in OWN)])
def test_as_the_whole(name: str) -> None:
    assert_as_the_whole("llama", "full", **OPTIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("two", 3), ("three", 1), ("three", 5)])
def test_cross_attentions_in_several_batches(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of several depths, the last one smaller; and of fewer than a depth has, where each is by itself."""
    monkeypatch.setattr("depthc.runtime.together.SECTIONS", most)
    assert_as_the_whole("llama", "full", **OPTIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_as_the_whole_with_padding(kind: str) -> None:
    """Masks with a row a batch row; a cross-attention in front of the layer, and behind one to an encoder."""
    assert_as_the_whole(kind, "padded", **OPTIONS["window"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_their_own_with_padding(kind: str) -> None:
    """Norms and biases of each stack too. Experts are many maps, of which each token has its own: such are branches."""
    if kind == "moe":
        assert not steps_of(kind, "padded", compiled(kind, "padded", **APART), together=True)[1].together
    else:
        assert_as_the_whole(kind, "padded", **APART)


class Reads(TorchDispatchMode):
    """How many rows each weight meets, one entry a product, by its address; and the sections of every launch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[int]] = {}
        self.sections: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            base = args[-1] if args[-1]._base is None else args[-1]._base
            self.seen.setdefault(base.data_ptr(), []).append(len(args[-2]))
        if func is FEW_ROWS:
            rows, matrices, *_, sections = args
            self.sections.append(sections)
            for matrix in matrices:
                self.seen.setdefault(matrix.data_ptr(), []).append(rows.shape[:-1].numel() // sections)
        return func(*args, **(kwargs or {}))


def reads_of(module: DepthModule, **options: Any) -> tuple[Mapping[str, list[int]], list[int]]:
    """How many rows met each weight in a step, one entry a product; and the sections of every launch."""
    with Wide():
        decoder, name = decoder_of("llama", "full", module, **options)
        token = captured("llama", "full")[2][name][:, PROMPT : PROMPT + 1]
        with Reads() as reads:
            decoder.step(token)
    weights = module.program.weights
    return {n: reads.seen[w.data_ptr()] for n, w in weights.items() if w.data_ptr() in reads.seen}, reads.sections


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "three"])
def test_every_weight_is_read_once(name: str) -> None:
    """A product with the rows of all stacks for the layers, with one row a sequence for each cross-attention."""
    module, batch = compiled("llama", **OPTIONS[name]), len(ROWS["full"])
    stacks = OPTIONS[name].get("stacks", 2)
    (together, launched), (apart, _) = reads_of(module), reads_of(module, together=False)
    layers = [n for n in together if "model.layers" in n and "stagger" not in n]
    assert len(layers) == 8 * 7
    assert all(together[n] == [batch * stacks] for n in layers)
    assert all(apart[n] == [batch] * stacks for n in layers)
    crossings = [n for n in together if "stagger" in n and "combine" not in n]
    assert len(crossings) == 8 * 4 * (stacks - 1)
    assert all(together[n] == [batch] for n in crossings)
    assert len(launched) == (2 if stacks == 2 else 8 * 2 + 2 * 2)  # of cross-attentions, and of what they are shown


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stacks"), [("apart", 2), ("four apart", 4)])
def test_layers_of_their_own_are_one_sequence_of_launches(name: str, stacks: int) -> None:
    """Seven maps a depth, each with the matrices of all stacks; two of the cross-attentions between them, and two for
    what all of these are shown. Each matrix is read once."""
    module, batch = compiled("llama", **OPTIONS[name]), len(ROWS["full"])
    reads, launched = reads_of(module, together=True)
    depths, others = 8 // stacks, stacks - 1
    crossing = [others] * 2 if others > 1 else []  # of one alone, its maps are as everywhere
    assert launched == [*[stacks] * 4, *crossing, *[stacks] * 3] * depths + [depths * others] * 2
    assert all(reads[n] == [batch] for n in module.program.weights if "proj" in n)


def test_stacks_with_layers_of_their_own_as_branches() -> None:
    """By default; of many sequences, whose products are the library's; and where autocast chooses dtypes."""
    module, prompt = compiled("llama"), captured("llama", "full")[2]["input_ids"][:1, :PROMPT]

    def together(rows: int = 1, cast: bool = False, **options: bool) -> bool:
        with Wide(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            decoder = Decoder(module, prompt.expand(rows, -1), LENGTH, **options)
        assert decoder.sections == (4, 4)
        return decoder.together

    assert together(FEW, together=True)
    others = ({"rows": FEW + 1}, {"cast": True}, {"kernels": False})
    assert not any((together(), together(together=False), *(together(**one, together=True) for one in others)))


def test_pieces_of_other_layers() -> None:
    """A layer and one with a cross-attention have pieces only where they agree in all else."""
    llama, parallel = (compiled(kind, shared=True).program for kind in ("llama", "parallel"))
    layer, crossed, other = (
        next(p.blocks[c.block] for c, _ in calls(p.stacks[-1].ops) if p.blocks[c.block].carries == n)
        for p, n in ((llama, 1), (llama, 2), (parallel, 2))
    )
    pieces = pieces_of(layer, crossed)
    assert pieces is not None
    assert pieces.front is not None
    assert [len(piece.ports) for piece in (pieces.front, pieces.crossing, pieces.rest)] == [1, 1, 0]
    assert pieces_of(layer, other) is None


def test_generated_tokens_are_those_of_generate() -> None:
    module = compiled("llama", shared=True)
    prompt = captured("llama", "full")[2]["input_ids"][:, :PROMPT]
    expected = depthc.generate(module, prompt, 5)
    with Wide():
        decoder = Decoder(module, prompt, PROMPT + 5)
        tokens = [prompt]
        for _ in range(5):
            tokens.append(decoder.logits.argmax(-1, keepdim=True))
            decoder.step(tokens[-1])
    assert torch.equal(torch.cat(tokens, 1), expected)
