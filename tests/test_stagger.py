"""stagger: stacks side by side, judged by an oracle that goes token by token in fp64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import oracles
import pytest
import torch
from compositions import with_noise
from oracles import QK_NORM, Wide, staggered
from oracles.rows import named
from torch import Tensor, nn

import depthc
from depthc.codegen.module import DepthModule, lower
from depthc.ir.errors import RecipeError
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of
from depthc.passes.stagger import Stagger

from .models import Spec, Stacked, ids, seeded, stack_program
from .routed import BACKWARD, FORWARD, ROWS, captured, changed_last, documents_of, logits_of, weighted

EVERY = (*oracles.KINDS, QK_NORM)
OTHERS = [pytest.param(k, marks=pytest.mark.thorough if k == QK_NORM else pytest.mark.slow) for k in EVERY[1:]]
ALL = ["llama", *OTHERS]
CHEAP = ("post_norm", "parallel")  # the kinds that CI takes where others show the same
SOME = ["llama", *(pytest.param(k, marks=pytest.mark.slow if k in CHEAP else pytest.mark.thorough) for k in EVERY[1:])]
SETTINGS: dict[str, dict[str, Any]] = {
    "separate": {},
    "four": {"stacks": 4, "window": 3},
    "shared": {"shared": True, "lag": 2, "window": 2},
    "sequential": {"reinject": False, "lag": 0},
    "behind": {"stacks": 4, "reinject": False, "lag": 3},
}
IDENTITIES: dict[str, dict[str, Any]] = {
    "separate": {"reinject": False},
    "lag 0": {"stacks": 4, "reinject": False, "lag": 0},
    "lag 2": {"stacks": 4, "reinject": False, "lag": 2, "window": 1},
    "shared": {"shared": True},
    "three": {"shared": True, "stacks": 3},
}


def compiled(kind: str, rows: str = "full", noise: float = 0.3, **options: Any) -> DepthModule:
    """A staggered model, and some noise on its new parameters: `o` is zero, and one stack alone counts."""
    with Wide():
        module = lower(run_recipe(captured(kind, rows)[1], recipe_of(Stagger(**options), {}))[0]).eval()
    return with_noise(module, noise)


def for_oracle(math: oracles.CrossMath, module: DepthModule, settings: staggered.Settings) -> dict[str, Tensor]:
    """The new parameters as the oracle names them; parts of a fused projection are views of it."""
    fresh = module.new_parameters()
    found = {"combine": fresh["depth.stagger.combine"]}
    for q, depths in enumerate(settings.depths(len(math.layers))):
        for at, depth in enumerate(depths if q else ()):
            layer, prefix = copy.deepcopy(math.layers[depth]), f"depth.stagger.{q}.{at}."
            for name in (n for n in fresh if n.startswith(prefix)):
                path, _, leaf = name.removeprefix(prefix).rpartition(".")
                setattr(layer.get_submodule(path), leaf, fresh[name])
            parts = math.projections(layer) | named(**math.norms(layer))
            found |= {f"cross.{q}.{at}.{part}": p for part, p in parts.items()}
    return found


def agree(kind: str, rows: str = "full", **options: Any) -> None:
    """Logits, and the gradients of all parameters."""
    model, _, inputs = captured(kind, rows)
    module, real, settings = compiled(kind, rows, **options), ROWS[rows], staggered.Settings(**options)
    with Wide():
        math = oracles.math_of(kind, model)
        given = settings, for_oracle(math, module, settings), inputs, real, documents_of(rows)
        expected = staggered.stagger(math, *given)
        found = logits_of(module(**inputs))
        assert found.isfinite().all()
        assert (found - expected)[real].abs().max() < FORWARD
        shared = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert_same_gradients(weighted(found, real), weighted(expected, real), module, shared)


def assert_same_gradients(found: Tensor, expected: Tensor, module: DepthModule, shared: Mapping[str, Tensor]) -> None:
    ours, fresh = dict(module.named_parameters()), module.new_parameters()
    names = [*shared, *fresh]
    own = torch.autograd.grad(found, [ours[name] for name in names], allow_unused=True)
    theirs = torch.autograd.grad(expected, [*shared.values(), *fresh.values()], allow_unused=True)
    for name, one, other in zip(names, own, theirs, strict=True):
        assert (one is None) == (other is None) or (one if one is not None else other).abs().max() == 0, name
        if one is not None and other is not None:
            assert one.isfinite().all(), name
            assert (one - other).abs().max() < BACKWARD, name


# against the oracle


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n != "four" else []) for n in SETTINGS])
def test_options(name: str) -> None:
    agree("llama", **SETTINGS[name])


@pytest.mark.parametrize(
    "name", ["separate", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("four", "shared"))]
)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind: str, name: str) -> None:
    agree(kind, "padded", **SETTINGS[name])


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["padded", "packed"])
@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(k, marks=pytest.mark.thorough) for k in ("parallel", "hybrid"))]
)
def test_padding_and_documents(kind: str, rows: str) -> None:
    agree(kind, rows, **SETTINGS["four"])


# identities


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("kind", SOME)
def test_untrained_it_is_the_model(kind: str, name: str) -> None:
    model, program, inputs = captured(kind, "padded")
    with Wide(), torch.no_grad():
        module = lower(run_recipe(program, recipe_of(Stagger(**IDENTITIES[name]), {}))[0]).eval()
        pair = logits_of(module(**inputs)), logits_of(model(**inputs))
    assert torch.equal(*(logits[ROWS["padded"]] for logits in pair))


def test_what_trains_first_is_what_closes_it() -> None:
    """At the start, gradients of new parameters are those of every o and of the combination."""
    module, inputs = compiled("llama", noise=0, shared=True), captured("llama", "full")[2]
    weighted(logits_of(module(**inputs)), ROWS["full"]).backward()
    for name, parameter in module.new_parameters().items():
        assert bool(parameter.grad.abs().sum() > 0) == (name.endswith("combine") or "o_proj" in name), name


def test_new_parameters_are_copies() -> None:
    module = compiled("llama", noise=0)
    ours = dict(module.named_parameters())
    own, fresh = (ours[f"{at}.self_attn.q_proj.weight"] for at in ("model.layers.4", "depth.stagger.1.0"))
    assert torch.equal(own, fresh)
    assert own.data_ptr() != fresh.data_ptr()


# who sees what


@pytest.mark.parametrize("kind", SOME)
def test_later_tokens_change_nothing(kind: str) -> None:
    module, inputs = compiled(kind, **SETTINGS["four"]), captured(kind, "full")[2]
    with Wide(), torch.no_grad():
        found, other = (logits_of(module(**given)) for given in (inputs, changed_last(kind, inputs)))
    assert (found - other)[:, :-1].abs().max() < 1e-12
    assert (found - other)[:, -1].abs().max() > 1e-6


@pytest.mark.parametrize("kind", SOME)
def test_a_lag_beyond_the_row_adds_nothing_and_no_nan(kind: str) -> None:
    """No token sees memory: cross-attentions get no gradient, not even by the bias of o."""
    module, inputs = compiled(kind, lag=9), captured(kind, "full")[2]
    with Wide():
        out = logits_of(module(**inputs))
        weighted(out, ROWS["full"]).backward()
    assert out.isfinite().all()
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
        if name.startswith("depth.stagger.1."):
            assert parameter.grad is None or not parameter.grad.any(), name


# other models


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        Spec(depth=4, attention=("causal",)),
        pytest.param(Spec(depth=4, attention=("plain",)), marks=pytest.mark.thorough),
        Spec(depth=4, attention=("grouped", "masked"), residual="sandwich", mlp="swiglu", norm="rms"),
        pytest.param(Spec(depth=4, attention=("plain",), residual="post", sides=("rotary",)), marks=pytest.mark.slow),
        Spec(depth=4, attention=("masked",), sides=("rotary", "window"), scaled=True),
        Spec(depth=4, attention=("causal",), residual="parallel"),
    ],
    ids=lambda spec: f"{spec.attention[0]} {spec.residual}",
)
def test_generated_models(spec: Spec, tmp_path: Any) -> None:
    """The identity; printed, parsed and saved; later tokens change nothing, and memory counts, with noise."""
    model: nn.Module = seeded(lambda: Stacked(spec))
    module = depthc.compile(model, "stagformer", args=(ids(),), reinject=False).eval()
    torch.testing.assert_close(module(ids()), model(ids()), rtol=1e-5, atol=1e-5)
    plain = module(ids())
    with torch.no_grad():
        for parameter in module.new_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = ids(length=7)
    found, other = module(tokens), module(torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % 13], 1))
    torch.testing.assert_close(found[:, :-1], other[:, :-1])
    assert (module(ids()) - plain).abs().max() > 1e-4
    depthc.save(module, tmp_path / "saved")
    again = depthc.load(tmp_path / "saved").eval()
    assert str(again.program) == str(module.program)
    assert torch.equal(again(ids()), module(ids()))


def test_windows_of_the_layers_are_their_own() -> None:
    """A layer that sees three tokens itself sees all of the memory."""
    model: nn.Module = seeded(lambda: Stacked(Spec(depth=2, attention=("masked",), sides=("window",))))
    module = depthc.compile(model, "stagformer", args=(ids(),)).eval()
    with torch.no_grad():
        for parameter in module.new_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = ids(length=9)
    first = tokens.clone()
    first[:, 0] = (first[:, 0] + 1) % 13
    assert (module(tokens) - module(first))[:, -1].abs().max() > 1e-5


@pytest.mark.slow
def test_tied_layers() -> None:
    model: nn.Module = seeded(lambda: Stacked(Spec(depth=6)))
    tied = depthc.compile(model, 'tie(loops=3, sharing="cycle")', args=(ids(),)).eval()
    both = depthc.compile(model, 'tie(loops=3, sharing="cycle") | stagger(stacks=3, reinject=False)', args=(ids(),))
    torch.testing.assert_close(both.eval()(ids()), tied(ids()), rtol=1e-5, atol=1e-5)


# what is refused


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("stacks", 1), ("stacks", 2.0), ("lag", -1), ("lag", True), ("window", 0), ("window", "all"),
        ("shared", "yes"), ("reinject", None),
    ],
)  # fmt: skip
def test_options_out_of_range(option: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"option '{option}'"):
        Stagger(**{option: value})


def refused(model: nn.Module, match: str, recipe: str = "stagger()") -> None:
    with pytest.raises(RecipeError, match=match):
        depthc.compile(seeded(lambda: model), recipe, args=(ids(),))


@pytest.mark.slow
def test_stacks_that_do_not_divide() -> None:
    for stacks, message in ((2, "stacks among 3, 9, or shared=True"), (4, "give stacks=3")):
        with pytest.raises(RecipeError, match=message):
            depthc.compile(stack_program(9), "stagger", stacks=stacks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", pytest.param("relative_encoder", marks=pytest.mark.thorough)])
def test_encoders_are_refused(kind: str) -> None:
    with pytest.raises(RecipeError, match="as in an encoder"):
        run_recipe(captured(kind, "full")[1], recipe_of(Stagger(), {}))


@pytest.mark.slow
def test_masks_that_may_not_be_causal_are_refused() -> None:
    with pytest.raises(RecipeError, match="the mask tensor"):
        run_recipe(captured("post_norm", "packed")[1], recipe_of(Stagger(), {}))


class Odd(nn.Module):
    """Layers of one attention, each with something that the usual ones have not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed = kind, nn.Embedding(13, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(8, 16 if n == "wide" else 8) for n in ("q", "k", "v", "gate", "wide", "up")})
            for _ in range(4)
        )
        self.out = nn.ModuleList(nn.Linear(16 if kind == "beside" else 8, 8) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer, out in zip(self.layers, self.out, strict=True):
            h = h + self.change(layer, out, h)
        return h

    def change(self, layer: Any, out: nn.Module, h: Tensor) -> Tensor:
        q, k, v = (layer[name](h)[:, None] for name in "qkv")
        match self.kind:
            case "shared":  # queries are keys
                return out(mixed(k, k, v))
            case "gated":
                return out(mixed(q, k, v) * torch.sigmoid(layer["gate"](h)))
            case "alone":
                return out(mixed(q, k, v))
            case "biased":  # by distance; what is closed is minus infinity
                at = torch.arange(h.shape[1])
                scores = q @ k.transpose(-1, -2) / 8**0.5 - 0.1 * (at[:, None] - at)
                return out((scores.masked_fill(at > at[:, None], -torch.inf).softmax(-1) @ v)[:, 0])
            case "beside":  # one projection behind attention and MLP
                return out(torch.cat([mixed(q, k, v), torch.relu(layer["up"](h))], -1))
            case "bare":
                return layer["up"](torch.relu(h)) + mixed(q, k, v)
            case "unprojected":
                x = h[:, None]
                return out(mixed(x, x, x))
            case "twice":
                return out(mixed(q, k, v) + mixed(v, q, k))
            case "linear":
                later = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1)
                scores = (q @ k.transpose(-1, -2)).relu().masked_fill(later, 0.0)
                return out((scores @ v)[:, 0])
        raise ValueError(self.kind)


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shared", "gated", "alone", "biased"])
def test_odd_attention(kind: str) -> None:
    """The identity; and with o as it is in the layer, the cross-attention is what the layer's own would add."""
    model = seeded(lambda: Odd(kind)).double()
    module = depthc.compile(model, "stagger(reinject=False)", args=(ids(),)).eval()
    assert torch.equal(module(ids()), model(ids()))
    memory = model.embed(ids())
    with torch.no_grad():
        for at in (0, 1):
            memory = memory + model.change(model.layers[at], model.out[at], memory)
            zeros = [p for n, p in module.new_parameters().items() if f"stagger.1.{at}." in n and not p.any()]
            for fresh, own in zip(zeros, model.out[2 + at].parameters(), strict=True):
                fresh.copy_(own)
        expected = memory
        for at in (2, 3):
            expected = expected + model.change(model.layers[at], model.out[at], expected)
            expected = expected + lagging(model, at, expected, memory)
        torch.testing.assert_close(module(ids()), expected, rtol=1e-10, atol=1e-10)


def lagging(model: Odd, at: int, x: Tensor, memory: Tensor) -> Tensor:
    """The attention of a layer to the memory of the tokens before, token by token."""
    layer, rows = model.layers[at], []
    for t in range(x.shape[1]):
        if not t:
            rows.append(torch.zeros_like(x[:, 0]))
            continue
        q = layer["k" if model.kind == "shared" else "q"](x[:, t])
        k, v = layer["k"](memory[:, :t]), layer["v"](memory[:, :t])
        bias = -0.1 * (t - torch.arange(t)) if model.kind == "biased" else 0
        found = torch.einsum("bt,btd->bd", (torch.einsum("bd,btd->bt", q, k) / 8**0.5 + bias).softmax(-1), v)
        found = found * torch.sigmoid(layer["gate"](x[:, t])) if model.kind == "gated" else found
        rows.append(model.out[at](found))
    return torch.stack(rows, 1)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("beside", "no projection of it alone follows"),
        ("bare", "no projection of it alone follows"),
        ("unprojected", "without a projection"),
        ("twice", "it has 2 self-attentions"),
        ("linear", "not one softmax"),
    ],
)
def test_attention_that_cannot_be_copied_is_refused(kind: str, match: str) -> None:
    refused(Odd(kind), match)


def test_stacks_without_attention_are_refused() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers = nn.Embedding(13, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.embed(tokens)
            for layer in self.layers:
                h = h + layer(h).cumsum(1)
            return h

    refused(Linear(), "without attention")


@pytest.mark.slow
def test_layers_that_pass_on_more_are_refused() -> None:
    refused(Stacked(Spec(depth=4)), "rewritten before", "mod() | stagger()")
    refused(Stacked(Spec(depth=4, returns="states")), "more than pass one stream on")
