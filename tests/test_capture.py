"""What capture keeps: signatures, outputs, dynamic sizes, modes, dtypes, devices and every kind of parameter."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import depthc
from depthc.ir.body import Body
from depthc.ir.params import Ref
from depthc.ir.program import Program, Segment

from .models import (
    VOCAB,
    WIDTH,
    Chain,
    Spec,
    Stacked,
    assert_lowered,
    assert_same,
    captured,
    ids,
    outputs,
    seeded,
    states,
)


def bodies(program: Program) -> Iterator[Body]:
    yield from (block.body for block in program.blocks.values())
    yield from (item.body for item in program.body if isinstance(item, Segment))


# arguments


class Optional(Chain):
    def forward(self, x: Tensor, scale: float = 2.0, *, flag: bool = True, mask: Tensor | None = None) -> Tensor:
        h = super().forward(x if flag else -x) * scale
        return h if mask is None else h * mask


class Positional(Chain):
    def forward(self, *parts: Tensor) -> Tensor:
        return super().forward(parts[0] * 2 + parts[1])


class Open(Chain):
    def forward(self, x: Tensor, *rest: Tensor, scale: float = 1.0, **extra: Tensor) -> Tensor:
        return super().forward((x + rest[0] * 2 + extra["bias"] * 3) * scale)


class Nested(Chain):
    def forward(self, batch: dict[str, Any], order: OrderedDict[str, Tensor]) -> Tensor:
        left, (right, none) = batch["x"], batch["pair"]
        return super().forward(left + right * 2 + order["z"] * 3) if none is None else left


def arguments(length: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(states(2, length, seed=seed) for seed in range(3))  # type: ignore[return-value]


CALLS: dict[str, tuple[type[Chain], Callable[[Tensor, Tensor, Tensor], tuple[tuple, dict]]]] = {
    "optional": (Optional, lambda x, y, _: ((x,), {"mask": y, "flag": False})),
    "by name": (Optional, lambda x, _, __: ((), {"x": x})),
    "*args": (Positional, lambda x, y, _: ((x, y), {})),
    "**kwargs": (Open, lambda x, y, z: ((x, y), {"bias": z, "scale": 3.0})),
    "nested": (Nested, lambda x, y, z: (({"x": x, "pair": (y, None)}, OrderedDict(z=z)), {})),
}


@pytest.mark.parametrize(("kind", "call"), CALLS.values(), ids=CALLS.keys())
def test_arguments(kind: type[Chain], call: Callable[..., tuple[tuple, dict]]) -> None:
    model = seeded(kind)
    args, kwargs = call(*arguments(5))
    compiled = depthc.compile(model, args=args, kwargs=kwargs)
    for length in (5, 8, 1):
        args, kwargs = call(*arguments(length))
        for run in (compiled, compiled.program.run):
            assert_same(outputs(run, *args, **kwargs), outputs(model, *args, **kwargs))
    assert depthc.parse(str(compiled.program)) == compiled.program


def test_arguments_may_be_passed_in_any_legal_way() -> None:
    x, mask = states(), states(seed=1)
    model = seeded(Optional)
    program = depthc.capture(model, (x, 3.0), {"mask": mask})
    expected = outputs(model, x, 3.0, mask=mask)
    assert_same(outputs(program.run, x=x, mask=mask, scale=3.0), expected)
    assert_same(outputs(program.run, x, mask=mask), expected), "what holds no tensor need not be given again"


def test_one_tensor_given_twice_is_two_arguments() -> None:
    x, y, _ = arguments(5)
    model = seeded(Positional)
    assert_same(outputs(captured(model, x, x).run, x, y), outputs(model, x, y))


class Cached(Chain):
    """Returns its cache if it is asked to, as models with a `config` do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)

    def forward(self, x: Tensor, use_cache: bool | None = None) -> tuple[Tensor, ...]:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return (super().forward(x), *([x] if use_cache else []))


def test_caches_are_off_while_capturing_and_restored() -> None:
    model = seeded(Cached)
    program = depthc.capture(model, (states(),))
    assert model.config.use_cache is True
    assert len(outputs(program.run, states())) == 1
    assert_same(outputs(program.run, states()), outputs(model, states(), use_cache=False))


# outputs


class Pair(NamedTuple):
    left: Tensor
    right: Any


class Returns(Chain):
    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.make = make
        self.register_buffer("table", torch.ones(2))

    def forward(self, x: Tensor) -> Any:
        return self.make(super().forward(x), x)


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda h, x: (h, x),
    "named tuple": lambda h, x: Pair(h, None),
    "dict": lambda h, x: {"h": h, "rest": [h * 2, None]},
    "fixed values": lambda h, x: (h, None, 3, "text", True),
    "one value twice": lambda h, x: (h, h),
    "a size": lambda h, x: (h, h.shape[1]),
    "a number": lambda h, x: (h, h.mean()),
}


@pytest.mark.parametrize("make", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs(make: Callable[[Tensor, Tensor], Any]) -> None:
    model = seeded(lambda: Returns(make))
    compiled = depthc.compile(model, args=(states(),))
    for args in ((states(),), (states(3, 7),)):
        found = outputs(compiled, *args)
        assert type(found) is type(outputs(model, *args))
        assert_same(found, outputs(model, *args))
        assert_same(outputs(compiled.program.run, *args), outputs(model, *args))
    assert_lowered(compiled, model, states())


class ReturnsParameter(Chain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.layers[0].linear.weight


def test_parameter_that_is_returned_as_it_is() -> None:
    captured(seeded(ReturnsParameter), states())


def test_output_class_of_a_library() -> None:
    modeling_outputs = pytest.importorskip("transformers.modeling_outputs")

    class Wraps(Chain):
        def forward(self, x: Tensor) -> Any:
            return modeling_outputs.BaseModelOutput(last_hidden_state=super().forward(x), hidden_states=(x,))

    model = seeded(Wraps)
    compiled = depthc.compile(model, args=(states(),))
    found = outputs(compiled, states())
    assert type(found) is modeling_outputs.BaseModelOutput
    assert found.attentions is None
    assert_same(found, outputs(model, states()))


# sizes


class Grouped(Chain):
    """At most 12 positions, in groups of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(12, WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        h = (x + self.positions[:length]).view(batch, length // 4, 4, width).flip(2).view(batch, length, width)
        return super().forward(h * mask[..., None])


def test_sizes_are_dynamic_within_their_range() -> None:
    model = seeded(Grouped)
    program = captured(model, states(2, 8), torch.ones(2, 8))
    for batch, length in ((1, 8), (3, 12)):
        args = states(batch, length), torch.ones(batch, length)
        assert_same(outputs(program.run, *args), outputs(model, *args))
    for length, expected in ((16, "12"), (6, "s")):
        with pytest.raises(depthc.InputError) as caught:
            program.run(states(2, length), torch.ones(2, length))
        assert expected in caught.value.expected


def test_sizes_that_must_agree_have_one_name() -> None:
    program = captured(seeded(Grouped), states(2, 8), torch.ones(2, 8))
    x, mask = program.signature.inputs
    assert x.type
    assert mask.type
    assert x.type.shape == ("b", "s", WIDTH)


def test_only_conditions_on_dynamic_sizes_are_kept() -> None:
    program = captured(seeded(Chain), states())
    assert program.signature.guards == ()


# modes


class TwoModes(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if self.training else x)


class Normalised(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in self.layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x).transpose(1, 2)).transpose(1, 2)
        return x


def test_modes_that_agree_up_to_dropout() -> None:
    assert captured(seeded(lambda: Chain(rate=0.5)), states()).modes == (False, True)


@pytest.mark.parametrize("training", [False, True])
def test_modes_that_differ_keep_the_one_that_the_model_is_in(training: bool) -> None:
    model = seeded(TwoModes).train(training)
    compiled = depthc.compile(model, args=(states(),))
    assert compiled.program.modes == (training,)
    assert_same(outputs(compiled, states()), outputs(model, states()))
    with pytest.raises(depthc.InputError, match=f"captured in {'train' if training else 'eval'} mode only"):
        compiled.train(not training)(states())


def test_batch_norm_runs_in_eval_mode_and_is_refused_in_train_mode() -> None:
    model = seeded(Normalised)
    compiled = depthc.compile(model, args=(states(),))
    assert compiled.program.depths == (2,)
    assert_same(outputs(compiled, states(3, 4)), outputs(model, states(3, 4)))
    with pytest.raises(depthc.InputError, match="captured in eval mode only"):
        compiled.train()(states())
    with pytest.raises(depthc.CaptureError, match=r"changes 'norms.0"):
        depthc.capture(model.train(), (states(),))


def test_capture_leaves_the_model_as_it_was() -> None:
    model = seeded(lambda: Chain(4, rate=0.5)).train()
    model.layers[1].eval()
    model.layers[3].eval()
    before = {name: module.training for name, module in model.named_modules()}
    weights = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    depthc.capture(model, (states(),))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in model.named_parameters():
        assert id(parameter) == weights[name][0]
        assert torch.equal(parameter, weights[name][1])


def test_dropout_rates_are_kept() -> None:
    model = seeded(lambda: Chain(3, 0.5))
    model.layers[2].drop.p = 0.25
    compiled = depthc.compile(model, args=(states(),))
    assert compiled.program.depths == (3,)
    assert_lowered(compiled, model, states())
    assert not torch.equal(outputs(compiled.train(), states()), outputs(compiled.eval(), states()))


# masks


def test_masks_of_the_user_stay_inputs() -> None:
    class Masked(Stacked):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            h = self.embed(ids)
            for layer in self.layers:
                h = layer(h, mask)
            return h

    model = seeded(lambda: Masked(Spec(attention=("masked",))))
    program = captured(model, ids(), torch.ones(5, 5, dtype=torch.bool).tril())
    for mask in (torch.ones(7, 7, dtype=torch.bool), torch.rand(7, 7) > 0.3):
        mask = mask | torch.eye(7, dtype=torch.bool)
        assert_same(outputs(program.run, ids(3, 7), mask), outputs(model, ids(3, 7), mask))


# dtypes and devices


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = seeded(lambda: Stacked(Spec(norm="rms", sides=("rotary",), depth=2, dtype=dtype)))
    program = captured(model, ids())
    assert outputs(program.run, ids()).dtype is dtype
    assert {p.type.dtype for p in program.params.values()} == {dtype}


@pytest.mark.slow
def test_meta_device() -> None:
    with torch.device("meta"):
        model = Stacked(Spec(attention=("masked",), sides=("rotary", "window"), depth=4))
    program = depthc.capture(model, (ids().to("meta"),))
    assert program.depths == (4,)
    assert all(w.is_meta for w in program.weights.values())
    text = str(program)
    assert depthc.parse(text) == program
    same = seeded(lambda: Stacked(Spec(attention=("masked",), sides=("rotary", "window"), depth=4)))
    assert text == str(depthc.capture(same, (ids(),))), "a program does not depend on the device"
    restored = program.with_weights(same.state_dict())
    assert_same(outputs(restored.run, ids()), outputs(same, ids()))


class MakesTensors(Chain):
    def forward(self, x: Tensor) -> Tensor:
        row = torch.arange(x.shape[1], device=x.device)
        h = x + torch.zeros(x.shape[1], 1, device=x.device) + torch.ones_like(x) + row[:, None]
        h = h + torch.full((1,), 0.5, device=x.device, dtype=x.dtype).to(x.device)
        return super().forward(h * torch.tensor([1.0, 2.0] * (WIDTH // 2), device=x.device) + torch.tensor(1.5))


def test_no_device_is_in_a_program() -> None:
    program = captured(seeded(MakesTensors), states())
    for body in bodies(program):
        for node in body.nodes:
            values = [v for v in (*node.args, *node.kwargs.values()) if not isinstance(v, fx.Node)]
            assert not any(isinstance(v, torch.device) for v in values), node.format_node()
    assert "cpu" not in str(program)


def test_tensors_made_in_forward_are_constants() -> None:
    model = seeded(MakesTensors)
    compiled = depthc.compile(model, args=(states(),))
    made = [name for name in compiled.program.params if name not in dict(model.named_parameters())]
    assert made
    assert all(compiled.program.params[name].kind == "constant" for name in made)
    assert list(compiled.state_dict()) == list(model.state_dict())
    assert_lowered(compiled, model, states())


# parameters


class Parameters(nn.Module):
    """Tied, frozen and unused parameters, and buffers that are saved or not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.chain = Chain()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 3)
        self.chain.layers[1].norm.weight.requires_grad_(False)
        self.register_buffer("saved", torch.full((WIDTH,), 2.0))
        self.register_buffer("unsaved", torch.full((WIDTH,), 3.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.chain(self.embed(ids) * self.saved + self.unsaved))


def test_kinds_of_parameters() -> None:
    model = seeded(Parameters)
    compiled = depthc.compile(model, args=(ids(),))
    params = compiled.program.params
    assert {name: p.kind for name, p in params.items() if p.kind != "parameter"} == {
        "chain.layers.1.norm.weight": "frozen",
        "saved": "buffer",
        "unsaved": "constant",
    }
    assert params["head.weight"].expr == Ref("embed.weight")
    assert compiled.head.weight is compiled.embed.weight is model.embed.weight
    assert {"unused.weight", "unused.bias"} <= params.keys()
    assert [n for n, _ in compiled.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert_lowered(compiled, model, ids())


def test_parametrized_weights() -> None:
    def make() -> nn.Module:
        model = Chain()
        for layer in model.layers:
            nn.utils.parametrizations.weight_norm(layer.linear)
        return model

    model = seeded(make)
    compiled = depthc.compile(model, args=(states(),))
    assert compiled.program.depths == (2,)
    assert_lowered(compiled, model, states())


class StrangeNames(nn.Module):
    """Names that collide with each other, with Python and with what programs call their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.layer() for _ in range(3))

    def layer(self) -> nn.Module:
        layer = nn.Module()
        layer.a = nn.Module()
        for owner, name in [(layer, n) for n in ("h", "a_b", "lambda", "torch", "device", "training")] + [
            (layer.a, "b")
        ]:
            setattr(owner, name, nn.Parameter(torch.ones(WIDTH))) if name != "training" else None
        return layer

    def forward(self, torch_: Tensor, h: Tensor, w: Tensor, device: Tensor, training: Tensor) -> Tensor:
        x = torch_ + h * 2 + w * 3 + device * 4 + training * 5
        for layer in self.layers:
            scale, shift = layer.h * layer.a_b, layer.a.b * getattr(layer, "lambda")
            x = x + F.gelu(x * scale + shift) * layer.torch + layer.device
        return x


def test_strange_names() -> None:
    model = seeded(StrangeNames)
    args = tuple(states(seed=seed) for seed in range(5))
    compiled = depthc.compile(model, args=args)
    assert compiled.program.depths == (3,)
    assert depthc.parse(str(compiled.program)) == compiled.program
    assert_lowered(compiled, model, *args)
    assert_same(outputs(compiled.program.run, *args), outputs(model, *args))


# what models do inside


class Inside(Chain):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "in place":
            x = x.clone()
            x[:, 0] = 0
            x.mul_(2)
        if self.kind == "random":
            x = x + torch.rand_like(x)
        if self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)
        if self.kind == "checkpoint":
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return x
        return super().forward(x)


@pytest.mark.parametrize("kind", ["in place", "random", "autocast", "checkpoint"])
def test_inside(kind: str) -> None:
    model = seeded(lambda: Inside(kind))
    compiled = depthc.compile(model, args=(states(),))
    assert compiled.program.depths == (2,)
    assert_lowered(compiled, model, states())
