"""Wide ends of AltUp: a table and a head of M times the width, found by structure. For values see `test_widen.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from oracles import Wide
from torch import Tensor, nn
from torch.nn import functional as F

import depthc
from depthc.codegen.module import lower
from depthc.codegen.state_map import state_map
from depthc.ir.errors import RecipeError
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipe import Recipe

from .models import Spec, Stacked, ids, seeded
from .routed import captured, logits_of

WIDE = Recipe.parse('widen(embedding="wide", blocks=3)')
TIED = "depth.widen.embedding"


class Ended(nn.Module):
    """Three residual layers between a table and a head that tests choose."""

    def __init__(self, head: Callable[[Ended, Tensor], Any], **sizes: int) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(13, 8), nn.Embedding(sizes.get("positions", 16), 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3))
        self.norm, self.bias = nn.LayerNorm(8), nn.Parameter(torch.randn(13))
        self.other = nn.Linear(8, 13)
        self.finish = head

    def embed(self, ids: Tensor) -> Tensor:
        return self.table(ids)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.finish(self, x)


class Positioned(Ended):
    """Learned positions that an argument says, too."""

    def forward(self, ids: Tensor, places: Tensor) -> Any:  # type: ignore[override]
        x = (self.table(ids) + self.positions(places)) * 2
        for layer in self.layers:
            x = x + layer(x)
        return self.finish(self, x)


def made(model: nn.Module, *args: Tensor) -> tuple[nn.Module, Tensor]:
    """The widened model in fp64, and how far it is from the model before it is trained."""
    model = model.double().eval()
    compiled = depthc.compile(model, WIDE, args=args).eval()
    return compiled, (compiled(*args) - model(*args)).abs().max()


HEADS: dict[str, Callable[[Ended, Tensor], Tensor]] = {
    "own": lambda m, x: m.other(m.norm(x)),
    "tied": lambda m, x: F.linear(m.norm(x), m.table.weight, m.bias),
    "transposed": lambda m, x: torch.tanh(m.norm(x) @ m.table.weight.T + m.bias),
    "last": lambda m, x: F.linear(m.norm(x[:, -1]), m.table.weight),
    "deep": lambda m, x: m.other(torch.tanh(m.layers[0][1](m.norm(x)))),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    """A bias, and what comes behind it, is added once; a tied head is one wide weight with the table."""
    compiled, gap = made(seeded(lambda: Ended(HEADS[name])), ids())
    assert gap < 1e-12
    new = {n: tuple(p.shape) for n, p in compiled.new_parameters().items() if n.split(".")[-1] in ("embedding", "head")}
    tied = name in ("tied", "transposed", "last")
    assert new == ({TIED: (13, 24)} if tied else {TIED: (13, 24), "depth.widen.head": (13, 24)})
    left = {n for n, _ in compiled.named_parameters()}
    assert "table.weight" not in left
    assert tied or "other.weight" not in left


def test_the_blocks_of_a_table_are_its_columns() -> None:
    """And a tied head is divided by M: with one other block the logits are the mean over blocks."""
    model = seeded(lambda: Ended(HEADS["tied"])).double().eval()
    compiled = depthc.compile(model, WIDE, args=(ids(),)).eval()
    weight = compiled.new_parameters()[TIED]
    with torch.no_grad():
        for layer in range(3):  # layers correct no block: what begins is what ends
            compiled.new_parameters()[f"depth.widen.{layer}.correct"].zero_()
        weight[:, 8:16] = torch.randn(13, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found, tables = compiled(ids()), weight.chunk(3, 1)
        parts = [model.norm(table[ids()]) @ table.T for table in tables]
        torch.testing.assert_close(found, sum(parts) / 3 + model.bias)


def test_of_two_tables_that_arguments_index_it_is_that_with_a_row_a_logit() -> None:
    places = torch.arange(5).expand(2, 5)
    compiled, gap = made(seeded(lambda: Positioned(HEADS["own"])), ids(), places)
    assert gap < 1e-12
    assert "positions.weight" in dict(compiled.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "encoder_decoder"])
def test_state_map_and_weights_of_the_original(kind: str) -> None:
    """The map names the weights that the wide ones are made of, and takes another checkpoint of the same model."""
    _, program, inputs = captured(kind, "padded")
    other = oracles.build(kind, seed=5)
    with Wide():
        widened = run_recipe(program, WIDE)[0]
        found = state_map(widened, program)
        again = lower(widened.with_weights({**program.weights, **other.state_dict()})).eval()
        assert (logits_of(again(**inputs)) - logits_of(other(**inputs))).abs().max() < 1e-12
    names = ("shared.weight", "lm_head.weight") if kind == "encoder_decoder" else ("model.embed_tokens.weight",) * 2
    table, head = found["parameters"][TIED], found["parameters"].get("depth.widen.head")
    assert table["from"] == f'tile(ref("{names[0]}"), 3)'
    assert (head or {"from": 'tile(ref("lm_head.weight"), 3, over=3)'})["from"].endswith("3, over=3)")
    assert found["unread"] == []


@pytest.mark.slow
def test_printed_parsed_saved(tmp_path: Any) -> None:
    model: nn.Module = seeded(lambda: Stacked(Spec(depth=4)))
    compiled = depthc.compile(model, 'altup(embedding="wide")', args=(ids(),)).eval()
    text = str(run_recipe(depthc.capture(model, (ids(),)), Recipe.parse('widen(embedding="wide")'))[0])
    assert str(depthc.parse(text)) == text
    assert 'tile(ref("head.weight"), 2, over=2)' in text
    depthc.save(compiled, tmp_path / "saved")
    assert torch.equal(depthc.load(tmp_path / "saved").eval()(ids()), compiled(ids()))


# what cannot be made wide


class Looked(Ended):
    """Nothing is looked up."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.bias[:8] * ids[..., None]


class Doubled(Ended):
    """Two tables of as many rows."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.table(ids) + self.positions(ids)


class Kept(Ended):
    """The embedding is read again behind the layers."""

    def forward(self, ids: Tensor) -> Any:
        start = x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.other(x + start)


class Scaled(Ended):
    """The table is read twice."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.table(ids) / self.table.weight.std()


class Gated(Ended):
    """Something else is made of the embedding."""

    def forward(self, ids: Tensor) -> Any:
        start = self.table(ids)
        x, gate = start * 2, start.tanh()
        for layer in self.layers:
            x = x + layer(x)
        return self.other(x * gate)


def with_another_use(m: Ended, x: Tensor) -> Tensor:
    weight = m.table.weight.T
    return x @ weight + weight.sum(0)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no table": (lambda: Looked(HEADS["own"]), "no table can be the one"),
    "two tables": (lambda: Doubled(HEADS["own"], positions=13), "several tables can be the one"),
    "embedding read twice": (lambda: Kept(HEADS["own"]), "read besides by the first layer"),
    "nothing behind": (lambda: Ended(lambda m, x: x), "no part of the model is behind"),
    "a table read twice": (lambda: Scaled(HEADS["own"]), "more than the first layer"),
    "a gate of the embedding": (lambda: Gated(HEADS["own"]), "more than the first layer"),
    "a tied head with another use of its transposition": (lambda: Ended(with_another_use), "is no weight"),
    "no head": (lambda: Ended(lambda m, x: m.norm(x)), "no head by which all goes"),
    "states returned": (lambda: Ended(lambda m, x: (m.other(x), m.norm(x))), "no head by which all goes"),
    "a tied head made of the table": (
        lambda: Ended(lambda m, x: x @ F.normalize(m.table.weight, dim=-1).T),
        "the head, or what it is tied to, is no weight",
    ),
    "a tied head with another use of its weight": (
        lambda: Ended(lambda m, x: F.linear(x, m.table.weight) + m.table.weight.sum(1)),
        "the head, or what it is tied to, is no weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(RecipeError, match=message) as caught:
        depthc.compile(seeded(build), WIDE, args=(ids(),))
    assert 'embedding="replicated"' in caught.value.remedy
    assert caught.value.expected
    assert depthc.compile(seeded(build), "altup", args=(ids(),))  # as the remedy says


@pytest.mark.thorough
def test_an_encoder_has_no_head() -> None:
    with pytest.raises(RecipeError, match="no head by which all goes"):
        run_recipe(captured("relative_encoder", "padded")[1], WIDE)
