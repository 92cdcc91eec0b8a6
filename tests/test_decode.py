"""Decoding with memory of a fixed size: every step gives the logits of the whole sequence evaluated at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ZOO
from architectures.base import perturb
from compare import without_cache
from compositions import with_noise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import depthc
from depthc.ir.errors import IncrementalError, InputError
from depthc.ir.program import Program
from depthc.ir.recurrent import Recurrent


def llama(layers: int) -> nn.Module:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False))


QUICK, SLOW = ("gpt2",), ("olmo2",)
THOROUGH = ("llama", "t5", "gpt_neox", "mixtral", "mistral", "bloom", "deepseek_v3", "bart")
EXACT = {"bloom": 1e-5, "deepseek_v3": 1e-5}  # parts are fp32, in the models themselves


def captured(name: str, **more: Tensor) -> tuple[Program, Tensor, dict[str, Any], str]:
    """A model, its tokens, its other arguments, and the argument of the tokens."""
    entry = ZOO[name]
    model = perturb(entry.build()).double().eval()
    _, kwargs = entry.example()
    kwargs = {key: value for key, value in without_cache(model, kwargs).items() if isinstance(value, Tensor)} | more
    argument = "decoder_input_ids" if "decoder_input_ids" in kwargs else "input_ids"
    return depthc.capture(model, kwargs=kwargs), kwargs.pop(argument), kwargs, argument


def whole(program: Program, **arguments: Any) -> Tensor:
    """The logits at every token."""
    outputs = torch.utils._pytree.tree_leaves(program.run(**arguments))
    return next(t for t in outputs if isinstance(t, Tensor) and t.is_floating_point())


@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
        *(pytest.param(name, marks=pytest.mark.thorough) for name in THOROUGH),
    ],
)
def test_a_step_is_the_whole_sequence_at_once(name: str) -> None:
    program, tokens, others, argument = captured(name)
    count = tokens.shape[1]
    decoder = depthc.Decoder(program, tokens[:, :3], count, argument=argument, arguments=others)
    expected = whole(program, **{argument: tokens}, **others)
    torch.testing.assert_close(decoder.logits, expected[:, 2], rtol=0, atol=EXACT.get(name, 1e-10))
    for at in range(3, count):
        found = decoder.step(tokens[:, at : at + 1])
        torch.testing.assert_close(found, expected[:, at], rtol=0, atol=EXACT.get(name, 1e-10))
    assert decoder.place == count


@pytest.mark.slow
def test_prompts_that_are_padded() -> None:
    mask = torch.ones(3, 17, dtype=torch.int64)
    mask[0, :3] = 0
    program, tokens, others, _ = captured("llama", attention_mask=mask)
    shorter = {"attention_mask": mask[:, :6]}
    decoder = depthc.Decoder(program, tokens[:, :6], 17, arguments=shorter)
    expected = whole(program, input_ids=tokens, **others)
    for at in range(6, 17):
        torch.testing.assert_close(decoder.step(tokens[:, at : at + 1]), expected[:, at], rtol=0, atol=1e-10)


@pytest.mark.slow
def test_applications_of_a_shared_block() -> None:
    """Each has a cache of its own."""
    model = perturb(ZOO["llama"].build()).double().eval()
    tokens = ZOO["llama"].example()[1]["input_ids"]
    tied = depthc.compile(model, "tie", kwargs={"input_ids": tokens}, loops=2).eval()
    decoder = depthc.Decoder(tied, tokens[:, :4], tokens.shape[1])
    expected = whole(tied.program, input_ids=tokens)
    for at in range(4, tokens.shape[1]):
        torch.testing.assert_close(decoder.step(tokens[:, at : at + 1]), expected[:, at], rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "sections"),
    [
        ("stagger(window=2)", (3, 3)),
        pytest.param("stagger(stacks=3, lag=2)", (2, 2, 2), marks=pytest.mark.thorough),
        pytest.param("stagger(shared=True)", (6, 6), marks=pytest.mark.thorough),
        pytest.param("stagger(reinject=False)", (), marks=pytest.mark.thorough),
        pytest.param("stagger(lag=0)", (), marks=pytest.mark.thorough),
    ],
)
def test_staggered_stacks_are_sections_of_a_step(recipe: str, sections: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = perturb(llama(6)).double().eval()
    tokens = torch.randint(97, (2, 11))
    staggered = depthc.compile(model, recipe, kwargs={"input_ids": tokens}).eval()
    with torch.no_grad():  # cross-attention starts at zero
        for param in staggered.parameters():
            param.add_(0.05 * torch.randn_like(param))
    expected = whole(staggered.program, input_ids=tokens)
    decoder = depthc.Decoder(staggered, tokens[:, :2], 11)
    assert decoder.sections == sections
    for at in range(2, 11):
        torch.testing.assert_close(decoder.step(tokens[:, at : at + 1]), expected[:, at], rtol=0, atol=1e-10)


WINDOWED = {
    "window": "stagger(window=3)",
    "lag": "stagger(window=2, lag=2)",
    "shared": "stagger(shared=True, window=9)",
}


def staggered(recipe: str, tokens: Tensor) -> Program:
    """A staggered model, all of whose parameters count."""
    module = depthc.compile(llama(4).double().eval(), recipe, kwargs={"input_ids": tokens}).eval()
    return with_noise(module).program


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window", "lag", pytest.param("shared", marks=pytest.mark.thorough)])
def test_windows_are_rings(name: str) -> None:
    """Through the whole ring; with a prompt that fills it, and one that does not."""
    torch.manual_seed(0)
    tokens = torch.randint(97, (2, 24))
    program = staggered(WINDOWED[name], tokens)
    expected, sizes = whole(program, input_ids=tokens), set()
    for prompt in (2, 18):
        decoder = depthc.Decoder(program, tokens[:, :prompt], 24)
        for at in range(prompt, 24):
            found = decoder.step(tokens[:, at : at + 1])
            torch.testing.assert_close(found, expected[:, at], rtol=0, atol=1e-10)
        sizes.add(decoder.cache_bytes)
    rows = {"window": 8, "lag": 8, "shared": 16}[name]
    own, crossing = (8, 4) if name == "shared" else (4, 2)
    assert sizes == {(own * 24 + crossing * rows) * 2 * 2 * 16 * 8}  # of two rows of the batch; keys and values of fp64


class Ops(TorchDispatchMode):
    """The names of all ops, and of how many elements the result is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.seen.append((func.overloadpacket.__name__, made.numel() if isinstance(made, Tensor) else 0))
        return made


@pytest.mark.slow
def test_what_a_token_does_not_change_is_made_once() -> None:
    """No step makes a rotary table or a mask of all pairs, or copies a cache."""
    torch.manual_seed(0)
    tokens = torch.randint(97, (2, 64))
    decoder = depthc.Decoder(staggered("stagger(window=3)", tokens), tokens[:, :9], 64)
    decoder.step(tokens[:, 9:10])
    with Ops() as ops:
        decoder.step(tokens[:, 10:11])
    names = {name for name, _ in ops.seen}
    assert "embedding" in names
    assert not names & {"cos", "sin", "scatter", "tril"}
    assert max(size for name, size in ops.seen if name in ("ge", "lt", "bitwise_and", "cat")) < 64 * 64


@pytest.mark.slow
def test_the_last_stack_alone() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(97, (2, 24))
    program = staggered("stagger(shared=True, window=5)", tokens)
    decoding, decoder = Recurrent(program), depthc.Decoder(program, tokens[:, :7], 24, recurrent=True)
    out, past = decoding.start(input_ids=tokens[:, :7])
    torch.testing.assert_close(decoder.logits, out.logits[:, -1], rtol=0, atol=1e-10)
    for at in range(7, 24):
        out, past = decoding.step(past, input_ids=tokens[:, at : at + 1])
        found = decoder.step(tokens[:, at : at + 1])
        torch.testing.assert_close(found, out.logits[:, -1], rtol=0, atol=1e-10)
    everything = depthc.Decoder(program, tokens[:, :7], 24)
    assert (decoder.sections, everything.sections) == ((4,), (4, 4))
    assert decoder.cache_bytes * 2 < everything.cache_bytes * 1.2


class Counted(nn.Module):
    """Scales its embeddings by the length of the sequence."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds = self.inner.get_input_embeddings()(input_ids)
        return self.inner(inputs_embeds=embeds * input_ids.shape[1], use_cache=False).logits


class Lengthy(nn.Module):
    """Layers that read a table which changes where the sequence is longer than eight tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(13, 8), nn.Linear(8, 13)
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        scale = 1.0 + (torch.full((), length) > 8)
        table, h = (torch.arange(length)[:, None] * scale * torch.arange(8)).cos(), self.embed(input_ids)
        for layer in self.layers:
            q, k, v = layer(h * table)[:, None].chunk(3, -1)
            h = h + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return self.out(h)


def test_tables_that_depend_on_the_length() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(13, (2, 7))
    program = depthc.capture(Lengthy(), (tokens,))
    decoder = depthc.Decoder(program, tokens[:, :4], 8)
    expected = whole(program, input_ids=tokens)
    torch.testing.assert_close(decoder.step(tokens[:, 4:5]), expected[:, 4])
    with pytest.raises(IncrementalError, match="depend on the length"):
        depthc.Decoder(program, tokens[:, :4], 9)


@pytest.mark.slow
def test_what_cannot_be_decoded_so() -> None:
    model = ZOO["llama"].build().eval()
    tokens = ZOO["llama"].example()[1]["input_ids"]
    program = depthc.capture(model, kwargs={"input_ids": tokens, "use_cache": False})
    with pytest.raises(InputError, match="a prompt of 4 tokens does not fit into 3"):
        depthc.Decoder(program, tokens[:, :4], 3)
    full = depthc.Decoder(program, tokens[:, :4], 4)
    with pytest.raises(InputError, match="has 4 tokens already"):
        full.step(tokens[:, 4:5])
    with pytest.raises(InputError, match="one token a row"):
        full.step(tokens[:, 4])
    with pytest.raises(InputError, match="a CUDA graph needs CUDA"):
        depthc.Decoder(program, tokens[:, :4], 9, graph=True)
    counted = depthc.capture(Counted(model).eval(), (tokens,))
    with pytest.raises(IncrementalError, match="later tokens changed"):
        depthc.Decoder(counted, tokens[:, :4], 9)
    routed = depthc.compile(model, "mor", kwargs={"input_ids": tokens}, loops=2).eval()
    with pytest.raises(IncrementalError, match="how many tokens come to a layer"):
        depthc.Decoder(routed, tokens[:, :4], 9)


@pytest.mark.thorough
def test_the_bench_in_small(tmp_path: Path) -> None:
    import decode

    out = tmp_path / "decode.json"
    assert decode.main(["--tiny", "--device", "cpu", "--out", str(out), "--only", "D=960, B=1"]) == 0
    (row,) = json.loads(out.read_text())["rows"].values()
    assert row["times"].keys() == decode.VARIANTS.keys()
    assert row["sections"]["separate"] == [2, 2]
    assert row["asked"][0]["ratio"]
