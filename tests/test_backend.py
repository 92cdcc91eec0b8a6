"""The backend of torch.compile: the same numbers and gradients, each body compiled once, and readable errors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ZOO
from architectures.base import perturb
from compare import difference, gradients, without_cache
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend

import depthc
from depthc.backend import backend, require_gpus
from depthc.codegen.module import DepthModule

from .models import VOCAB, WIDTH, Chain, Spec, Stacked, ids, seeded, states

# Dynamo looks at `.grad` of what it is given, and torch warns where that is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

SAME = 2e-6  # relative, fp32: sums of gradients may run in another order


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """What Dynamo gives up on is an error; else it would run uncompiled, and every test here would pass."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """Every graph that is handed to the compiler behind the backend."""
    graphs: list[fx.GraphModule] = []
    found = depthc.backend._compiler

    def compiler(inner: str, mode: str | None) -> Callable[..., Any]:
        compile = found(inner, mode)

        def noted(graph: fx.GraphModule, examples: Any) -> Any:
            graphs.append(graph)
            return compile(graph, examples)

        return noted

    monkeypatch.setattr(depthc.backend, "_compiler", compiler)
    return graphs


def through(model: nn.Module, inner: str = "aot_eager", dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(model, backend="depthc", options={"inner": inner, **options}, dynamic=dynamic)


class Called(nn.Module):
    """A compiled function with the parameters of the module that it is of."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.named = function, dict(module.named_parameters())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.named.items())


def assert_same(model: nn.Module, function: Any, *args: Any, tolerance: float = SAME, **kwargs: Any) -> None:
    """Outputs and all gradients are those of the model, under one seed."""
    found, grads = gradients(Called(model, function), args, kwargs)
    expected, wanted = gradients(model, args, kwargs)
    assert difference(found, expected) <= tolerance
    assert grads.keys() == wanted.keys()
    assert any(grad.abs().max() > 1e-3 for grad in wanted.values())
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def refused(model: nn.Module, *args: Any, dynamic: bool | None = None, **options: Any) -> depthc.DepthError:
    """The error of a call; all of its text reaches the user through Dynamo's."""
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(model, backend="depthc", options=options, dynamic=dynamic)(*args)
    error = caught.value.inner_exception
    assert isinstance(error, depthc.DepthError)
    assert f"{type(error).__name__}: {error}" in str(caught.value)
    assert "remedy: " in str(error)
    return error


# the same numbers and gradients


def test_it_is_found_by_its_name() -> None:
    assert "depthc" in torch._dynamo.list_backends()
    model = seeded(Chain)
    for found in ("depthc", backend):
        torch.compiler.reset()
        assert_same(model, torch.compile(model, backend=found, options={"inner": "eager"}), states(), tolerance=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["llama", "bert", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("gpt2", "vit"))]
)
def test_models(name: str, compiled: list[fx.GraphModule]) -> None:
    """In training, dropout and tied embeddings included, at two sizes."""
    entry = ZOO[name]
    model = perturb(entry.build()).train()
    function = through(model)
    for args, kwargs in filter(None, (entry.example(), entry.elsewhere())):
        assert_same(model, function, *args, **without_cache(model, kwargs))
    assert len(compiled) == 2 * 3  # prologue, layer and epilogue, for one size and for any


@pytest.mark.slow
def test_inductor() -> None:
    """With a frozen embedding the first layer alone needs no gradient of its input."""
    model = seeded(lambda: Stacked(Spec(depth=4, dropout=0.0, sides=("rotary",)))).train()
    model.embed.weight.requires_grad_(False)
    function = through(model, inner="inductor", dynamic=True)
    for size in ((2, 9), (3, 6)):
        assert_same(model, function, ids(*size), tolerance=1e-5)  # other sums: fused and vectorised


@pytest.mark.parametrize("frozen", ["embed", "all but one layer"])
def test_frozen_parameters(frozen: str) -> None:
    model = seeded(lambda: Around(lambda _, x: x))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("embed") if frozen == "embed" else name.startswith("layers.1"))
    assert_same(model, through(model), ids())


@pytest.mark.parametrize("recipe", ["identity", "roll"])
def test_a_looped_model(recipe: str, compiled: list[fx.GraphModule]) -> None:
    """One layer applied four times: its gradient is the sum over all."""
    model = seeded(lambda: Stacked(Spec(attention=("none",), depth=4, shared="all")))
    assert_same(model, through(model, recipe=recipe), ids())
    assert len(compiled) == 3


def test_inference() -> None:
    model = seeded(Chain)
    for context in (torch.no_grad, torch.inference_mode):
        torch.compiler.reset()
        with context():
            assert torch.equal(through(model)(states()), model(states()))


def test_gradient_of_the_input() -> None:
    model, x = seeded(Chain), states().requires_grad_()
    for function in (through(model), model):
        function(x).square().sum().backward()
    grad, x.grad = x.grad, None
    model(x).square().sum().backward()
    torch.testing.assert_close(grad, 2 * x.grad)


@pytest.mark.slow
def test_autocast_around() -> None:
    model = seeded(lambda: Stacked(Spec()))
    function = through(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(model, function, ids(), tolerance=1e-5)


class Around(Chain):
    """A chain with something between its embedding and its layers."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], depth: int = 3) -> None:
        super().__init__(depth)
        self.embed, self.norm, self.between = nn.Embedding(VOCAB, WIDTH), nn.BatchNorm1d(5), between

    def forward(self, ids: Tensor, scale: float = 1.0) -> Any:
        return super().forward(self.between(self, self.embed(ids)) * scale)


def without_gradient(_: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.exp()
    return x * y


def by_length(_: Any, x: Tensor) -> Tensor:
    return x / x.shape[1] ** 0.5 + torch.tensor([0.5] * WIDTH)


def in_place(_: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:].mul_(2)
    y[:, :1] = 0.5
    return y.add_(x)


@pytest.mark.parametrize("between", [without_gradient, by_length, in_place])
def test_around_the_layers(between: Callable[..., Tensor], compiled: list[fx.GraphModule]) -> None:
    model = seeded(lambda: Around(between))
    function = through(model)
    for length in (5, 7):
        assert_same(model, function, ids(2, length))
    assert len(compiled) == 2 * 2


def test_dropout_draws_anew() -> None:
    """In every layer and at every call; under one seed, as eager does where the inner compiler leaves that to eager."""
    model = Chain(3, 0.5).train()
    for layer in model.layers:
        nn.init.zeros_(layer.norm.weight), nn.init.ones_(layer.norm.bias)
        nn.init.zeros_(layer.linear.weight), nn.init.ones_(layer.linear.bias)
    function, x = through(model), torch.zeros(1, 64, WIDTH)
    torch.manual_seed(1)
    first, second = function(x), function(x)
    assert first.unique().tolist() == [0, 2, 4, 6]  # sums of three draws, each 0 or 2
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    assert torch.equal(function(x), second)


def test_layers_that_are_in_no_module_list() -> None:
    """Their parameters have one path in Dynamo's sources, and are told apart."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.foo = [seeded(lambda: nn.Linear(4, 4), seed) for seed in range(4)]

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.foo:
                x = layer(x)
            return x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = Hidden()

        def forward(self, x: Tensor) -> Tensor:
            return self.m(x)

    model, x = Outer(), torch.ones(2, 3, 4)
    assert difference(through(model)(x), model(x)) <= SAME


# each body once


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "bodies"),
    [
        (lambda: Around(by_length), 2),
        (lambda: Stacked(Spec(depth=3, sides=("rotary",))), 3),
        pytest.param(lambda: Around(by_length, 9), 2, marks=pytest.mark.slow),
    ],
    ids=["linear", "attention", "deep"],
)
def test_bodies_are_compiled_once_and_serve_every_length(
    build: Callable[[], nn.Module], bodies: int, compiled: list[fx.GraphModule]
) -> None:
    """Dynamo asks for a graph of the first length, and one for all lengths; it asks no more often than of others."""
    model = seeded(build)
    ours, plain = CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")
    ours.backend = partial(backend, options={"inner": "eager"})
    for counter in (ours, plain):
        torch.compiler.reset()
        function = torch.compile(model, backend=counter)
        for size, times in (((2, 5), 1), ((2, 7), 2), ((2, 11), 2), ((3, 7), 3), ((4, 9), 3)):
            assert torch.equal(function(ids(*size)), model(ids(*size)))
            assert counter.frame_count == times
    assert len(compiled) == 3 * bodies


def test_numbers_that_differ_between_layers(compiled: list[fx.GraphModule]) -> None:
    """A factor is passed as a tensor, so that one body serves all layers; a rate of dropout has to be a number."""
    model = seeded(lambda: Stacked(Spec(attention=("none",), depth=4, scaled=True)))
    assert_same(model, through(model), ids())
    assert len(compiled) == 3
    compiled.clear()
    model = Chain(3)
    for number, layer in enumerate(model.layers, 1):
        layer.drop.p = number / 4
    assert_same(model.train(), through(model), states())
    assert len(compiled) == 3


# what is compiled as it is


def in_place_without_gradient(_: Any, x: Tensor) -> Tensor:
    y = x * 1
    with torch.no_grad():
        y.mul_(2)
    return y


def batched(_: Any, x: Tensor) -> Tensor:
    return torch.vmap(torch.sin)(x)


def cast_within(_: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (x @ x.transpose(1, 2) @ x).float()


def running(model: Any, x: Tensor) -> Tensor:
    return model.norm(x)


def checkpointed(_: Any, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)


AS_IT_IS = {
    in_place_without_gradient: "in place under no_grad",
    cast_within: "autocast",
    running: "changes 'norm.",
    batched: "the state of torch is changed",
    checkpointed: "higher-order op",
}


@pytest.mark.parametrize("between", AS_IT_IS, ids=lambda f: f.__name__)
def test_a_graph_that_is_not_functional(between: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(lambda: Around(between)).train()
    with caplog.at_level(logging.INFO, "depthc.backend"):
        assert_same(model, through(model), ids(), tolerance=1e-5)
    assert AS_IT_IS[between] in caplog.text
    error = refused(model, ids(), recipe="roll")
    assert isinstance(error, depthc.CaptureError)
    assert AS_IT_IS[between] in str(error)


def test_a_number_that_varies(caplog: pytest.LogCaptureFixture) -> None:
    """A float that is an argument becomes an input of Dynamo's graph when it changes."""
    model = seeded(lambda: Around(lambda _, x: x))
    function = through(model, inner="eager")
    with caplog.at_level(logging.INFO, "depthc.backend"):
        for scale in (1.0, 0.5, 0.25):
            assert torch.equal(function(ids(), scale), model(ids(), scale))
    assert "a floating-point number that varies" in caplog.text


def test_nothing_repeats(caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(lambda: Chain(1))
    with caplog.at_level(logging.INFO, "depthc.backend"):
        assert_same(model, through(model, inner="eager"), states())
    assert "the model has no repeated layers" in caplog.text
    assert isinstance(refused(model, states(), recipe="roll"), depthc.OutlineError)


# legality


def test_a_recipe_that_changes_the_parameters_names_the_other_door() -> None:
    error = refused(seeded(lambda: Chain(4)), states(), recipe="tie(loops=2)")
    assert isinstance(error, depthc.RecipeError)
    assert "use depthc.compile(model" in str(error)
    assert "4 made (layers.1.linear.bias), 8 not read (layers.2.linear.bias)" in str(error)


@pytest.mark.slow
def test_a_recipe_that_keeps_the_parameters_trains() -> None:
    """Half of the tokens in one layer, and no parameter more or less."""
    model, recipe = seeded(lambda: Stacked(Spec(depth=2))), "keep(capacities=(1.0, 0.5))"
    x = ids(2, 6)
    other = depthc.compile(model, recipe, (x,)).train()
    found, grads = gradients(Called(model, through(model, recipe=recipe, dynamic=True)), (x,), {})
    expected, wanted = gradients(other, (x,), {})
    assert difference(found, expected) <= SAME
    assert grads.keys() == wanted.keys()
    assert max(difference(grads[name], wanted[name]) for name in wanted) <= SAME
    assert not torch.equal(expected, model(x))
    error = refused(model, ids(2, 6), recipe=recipe, dynamic=False)  # export has marked the sizes of `x`
    assert "any length" in str(error)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, DepthModule, Path]:
    """A model, what a recipe made of it, and where that is saved."""
    model = seeded(lambda: Chain(4))
    rewritten = depthc.compile(model, "tie", (states(),), loops=2)
    folder = tmp_path_factory.mktemp("weights") / "tied"
    depthc.save(rewritten, folder)
    return model, rewritten, folder


def test_weights_for_inference(tied: Any) -> None:
    model, rewritten, folder = tied
    file = folder.parent / "tied.safetensors"
    save_file({name: p.detach().clone() for name, p in rewritten.state_dict().items()}, file)
    for options in ({"weights": folder}, {"weights": str(file), "recipe": "tie(loops=2)"}):
        torch.compiler.reset()
        function = through(model, **options)
        with torch.no_grad():
            for length in (5, 8):
                x = states(2, length)
                assert torch.equal(function(x), rewritten(x))
                assert not torch.equal(function(x), model(x))


@pytest.mark.thorough
def test_weights_of_a_routed_model(tmp_path: Path) -> None:
    model = seeded(lambda: Stacked(Spec(depth=4)))
    rewritten = depthc.compile(model, "mor", (ids(),), loops=2, std=1.0)
    depthc.save(rewritten, tmp_path / "mor")
    function = through(model, weights=tmp_path / "mor", dynamic=True)
    with torch.no_grad():
        for length in (6, 9):
            assert difference(function(ids(2, length)), rewritten(ids(2, length))) <= SAME


def test_weights_that_do_not_serve(tied: Any, tmp_path: Path) -> None:
    model, rewritten, folder = tied
    x = states()
    error = refused(model, x, weights=folder)
    assert isinstance(error, depthc.InputError)
    assert "gradients are on" in str(error)
    file, damaged, weights = tmp_path / "w.safetensors", tmp_path / "damaged", dict(rewritten.state_dict())
    damaged.write_bytes(b"no weights")
    with torch.no_grad():
        for path in (tmp_path / "nowhere", damaged):
            error = refused(model, x, weights=path)
            assert isinstance(error, depthc.CheckpointError)
            assert str(path) in str(error)
        error = refused(model, x, weights=folder, recipe="albert")
        assert isinstance(error, depthc.RecipeError)
        assert "another recipe" in str(error)
        name = next(name for name in weights if "layers.1" in name)
        kept = weights.pop(name)
        for wrong, what in ((weights, "lack 1 parameters"), (weights | {name: kept.double()}, "another type")):
            save_file({n: t.clone() for n, t in wrong.items()}, file)
            error = refused(model, x, weights=file, recipe="tie(loops=2)")
            assert isinstance(error, depthc.StateDictError)
            assert what in str(error)
            assert name in str(error)


# bad input


@pytest.mark.parametrize(
    ("options", "kind", "what"),
    [
        ({"recipee": "roll"}, depthc.InputError, "use 'recipe'"),
        ({"inner": "inducter"}, depthc.InputError, "use 'inductor'"),
        ({"recipe": "rol"}, depthc.RecipeError, "use 'roll'"),
        ({"recipe": "tie(loop=2)"}, depthc.RecipeError, "use 'loops'"),
        ({"recipe": "tie(loops=3)"}, depthc.RecipeError, "do not divide"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], kind: type[Exception], what: str) -> None:
    error = refused(seeded(lambda: Chain(4)), states(), **options)
    assert isinstance(error, kind)
    assert what in str(error)


def test_modes_are_those_of_inductor() -> None:
    model = seeded(Chain)
    with pytest.raises(BackendCompilerFailed, match="use 'reduce-overhead'"):
        torch.compile(model, backend="depthc", mode="reduce-overhed")(states())
    patches = depthc.backend._compiler("inductor", "max-autotune").keywords["config_patches"]
    assert patches["max_autotune"]
    assert patches["keep_output_stride"]


def test_gpus_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {torch.device("cuda:0"), torch.device("cpu")}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.raises(
        depthc.InputError, match=r"Inductor cannot compile for cuda:0[\s\S]*found: compute capability 6.1"
    ):
        require_gpus(gpu, "inductor")
    require_gpus(gpu, "aot_eager")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    require_gpus(gpu, "inductor")
    monkeypatch.setattr("depthc.backend.find_spec", lambda name: None)
    with pytest.raises(depthc.InputError, match=r'found: no triton[\s\S]*"inner": "aot_eager"'):
        require_gpus(gpu, "inductor")
    require_gpus({torch.device("cpu")}, "inductor")
