"""Bad input gets a typed error that says what is wrong, where in the user's model, and what to do about it."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depthc

from .models import WIDTH, Chain, Residual, ids, seeded, states


def refused(kind: type[depthc.DepthError], run: Callable[[], Any]) -> depthc.DepthError:
    """The error that `run` raises. It has a remedy, and its text has every part."""
    with pytest.raises(depthc.DepthError) as caught:
        run()
    error = caught.value
    assert type(error) is kind
    assert error.remedy
    assert all(part in str(error) for part in (error.what, error.where, error.expected, error.found, error.remedy))
    return error


def line_of(code: str) -> str:
    """This file and the number of the line that holds `code` and the mark "here"."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if code in line and line.endswith("# here")]
    return f"{Path(__file__).name}:{number}"


def forward_of(model: type) -> str:
    return f"{Path(__file__).name}:{inspect.getsourcelines(model.forward)[1]}"


# capture


class BranchesOnValues(Chain):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # here
            x = x * 2
        return super().forward(x)


class LoopsOnValues(Chain):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max().item())):  # here
            x = self.layers[0](x)
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "code"), [(BranchesOnValues, "if x.sum() > 0:"), (LoopsOnValues, "for _ in range(int(")]
)
def test_control_flow_that_depends_on_values(model: type[Chain], code: str) -> None:
    error = refused(depthc.CaptureError, lambda: depthc.capture(seeded(model), (states(),)))
    assert "control flow depends on the values of a tensor" in error.what
    assert line_of(code) in error.where
    assert "torch.where" in error.remedy


class Fails(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ torch.ones(3, 3)  # here


def test_forward_that_fails() -> None:
    error = refused(depthc.CaptureError, lambda: depthc.capture(seeded(Fails), (states(),)))
    assert "does not export" in error.what
    assert line_of("torch.ones(3, 3)") in error.where


class Counts(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # here
        return super().forward(x) * self.calls


def test_side_effect() -> None:
    error = refused(depthc.CaptureError, lambda: depthc.capture(seeded(Counts), (states(),)))
    assert "changes 'calls'" in error.what
    assert line_of("self.calls += 1") in error.where


class WritesToItsArgument(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)  # here
        return super().forward(x)


def test_argument_that_the_model_changes() -> None:
    error = refused(depthc.CaptureError, lambda: depthc.capture(seeded(WritesToItsArgument), (states(),)))
    assert "changes 'x'" in error.what
    assert line_of("x.mul_(2)") in error.where


class Memory:
    def __init__(self) -> None:
        self.state = states()


class ReadsObject(Chain):
    def forward(self, x: Tensor, memory: Any = None) -> Tensor:
        return super().forward(x + memory.state)


def test_argument_that_is_not_data() -> None:
    error = refused(depthc.CaptureError, lambda: depthc.capture(seeded(ReadsObject), (states(), Memory())))
    assert "argument 'memory' is a Memory, which is not data" in error.what
    assert forward_of(ReadsObject) in error.where
    assert "register_pytree_node" in error.remedy


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((states(), None, 3), {}), ((states(),), {"x": states()}), ((states(),), {"mask": 1})],
)
def test_arguments_that_forward_does_not_take(args: tuple, kwargs: dict) -> None:
    error = refused(depthc.InputError, lambda: depthc.capture(seeded(ReadsObject), args, kwargs))
    assert "do not fit the model's forward" in error.what
    assert error.expected == "(x, memory)"
    assert forward_of(ReadsObject) in error.where


class NothingRepeats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(WIDTH, 5), nn.Linear(5, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.relu(self.narrow(x)))


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = Residual(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


@pytest.mark.parametrize("model", [NothingRepeats, OneLayer])
def test_no_repeated_layers(model: type[nn.Module]) -> None:
    error = refused(depthc.OutlineError, lambda: depthc.capture(seeded(model), (states(),)))
    assert "no repeated layers" in error.what
    assert model.__name__ in error.where
    assert forward_of(model) in error.where
    assert "at least two" in error.expected


# arguments of a captured program


class Limited(nn.Module):
    """Token ids and a mask; at most 16 positions, in groups of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.chain = nn.Embedding(13, WIDTH), nn.Embedding(16, WIDTH), Chain()

    def forward(self, ids: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        h = (self.tokens(ids) + self.positions.weight[: ids.shape[1]]) * scale
        h = h if mask is None else h * mask[..., None]
        return self.chain(h.view(ids.shape[0], ids.shape[1] // 2, 2, WIDTH).flip(2).view(*ids.shape, WIDTH))


@pytest.fixture(scope="module")
def compiled() -> nn.Module:
    return depthc.compile(seeded(Limited), args=(ids(2, 6), torch.ones(2, 6)), kwargs={"scale": 2.0})


WRONG_ARGUMENTS: dict[str, tuple[tuple, dict, str, str, str]] = {
    "too long": ((ids(2, 18), torch.ones(2, 18)), {}, "dimension 1 of argument 'ids'", "to 16", "18 (shape (2, 18))"),
    "not a multiple": ((ids(2, 5), torch.ones(2, 5)), {}, "sizes", "s", "5"),
    "two sizes": ((ids(2, 6), torch.ones(2, 8)), {}, "dimension 1 of argument 'mask'", "s", "8 (shape (2, 8))"),
    "two batches": ((ids(2, 6), torch.ones(3, 6)), {}, "dimension 0 of argument 'mask'", "b", "3 (shape (3, 6))"),
    "rank": ((ids(2, 6), torch.ones(6)), {}, "another dtype or rank", "f32[b, s]", "float32[6]"),
    "dtype": ((ids(2, 6), torch.ones(2, 6).double()), {}, "argument 'mask'", "f32[b, s]", "float64[2, 6]"),
    "missing": ((ids(2, 6),), {}, "argument 'mask' is missing", "ids, mask, scale", "ids"),
    "not a tensor": ((ids(2, 6), 1.0), {}, "'mask' is not a tensor", "f32[b, s]", "1.0"),
    "structure": ((ids(2, 6), [torch.ones(2, 6)]), {}, "another structure", "TreeSpec", "TreeSpec"),
    "another value": ((ids(2, 6), torch.ones(2, 6)), {"scale": 3.0}, "'scale' was captured with another", "2.0", "3.0"),
    "unknown": ((ids(2, 6), torch.ones(2, 6)), {"other": 1}, "do not fit", "(ids, mask, scale)", ""),
    "device": ((ids(2, 6), torch.ones(2, 6).to("meta")), {}, "several devices", "", "mask on meta"),
}


@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
def test_arguments_that_were_not_captured(compiled: nn.Module, wrong: tuple[tuple, dict, str, str, str]) -> None:
    args, kwargs, what, expected, found = wrong
    for run in (compiled, compiled.program.run):
        error = refused(depthc.InputError, lambda run=run: run(*args, **kwargs))
        assert what in error.what
        assert expected in error.expected
        assert found in error.found


def test_argument_that_was_not_given_at_capture() -> None:
    program = depthc.capture(seeded(Limited), (ids(2, 6),))
    error = refused(depthc.InputError, lambda: program.run(ids(2, 6), torch.ones(2, 6)))
    assert "'mask' was not among the captured arguments" in error.what
    assert "capture again" in error.remedy


def test_batch_of_one_in_the_example_is_static() -> None:
    program = depthc.capture(seeded(Chain), (states(1, 5),))
    error = refused(depthc.InputError, lambda: program.run(states(2, 5)))
    assert "dimension 0" in error.what
    assert error.expected.startswith("1")
    assert "above 1" in error.remedy


def test_device_of_the_arguments(compiled: nn.Module) -> None:
    error = refused(depthc.InputError, lambda: compiled(ids(2, 6).to("meta"), torch.ones(2, 6, device="meta")))
    assert "another device than the parameters" in error.what
    assert (error.expected, error.found) == ("cpu", "meta")


@pytest.mark.parametrize("convert", [lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.half()])
def test_another_dtype_after_capture(compiled: nn.Module, convert: Callable[[nn.Module], Any]) -> None:
    before = {name: value.clone() for name, value in compiled.state_dict().items()}
    error = refused(depthc.InputError, lambda: convert(compiled))
    assert "dtype that it was captured in" in error.what
    assert error.expected == "torch.float32"
    assert "compile it again" in error.remedy
    for name, value in compiled.state_dict().items():
        assert value.dtype is before[name].dtype, "nothing may change before the refusal"
        assert torch.equal(value, before[name])


# weights and recipes


def test_state_dict_with_missing_and_unexpected_names(compiled: nn.Module) -> None:
    state = compiled.state_dict()
    state["chain.layers.0.linear.wait"] = state.pop("chain.layers.0.linear.weight")
    error = refused(depthc.StateDictError, lambda: compiled.load_state_dict(state))
    assert "lacks 1 and adds 1" in error.what
    assert "chain.layers.0.linear.weight" in error.expected
    assert "chain.layers.0.linear.wait" in error.found
    assert error.remedy == "rename 'chain.layers.0.linear.wait' to 'chain.layers.0.linear.weight'"


def test_state_dict_with_another_shape(compiled: nn.Module) -> None:
    state = compiled.state_dict() | {"tokens.weight": torch.ones(14, WIDTH)}
    for strict in (True, False):
        error = refused(depthc.StateDictError, lambda strict=strict: compiled.load_state_dict(state, strict=strict))
        assert "'tokens.weight' has another shape" in error.what
        assert (error.expected, error.found) == ("(13, 8)", "(14, 8)")


def test_program_without_weights() -> None:
    program = depthc.parse(str(depthc.capture(seeded(Chain), (states(),))))
    error = refused(depthc.StateDictError, lambda: program.run(states()))
    assert re.search(r"no weight 'layers\.\d\.\w+\.\w+'", error.what)


def test_unknown_recipe() -> None:
    error = refused(depthc.RecipeError, lambda: depthc.compile(seeded(Chain), recipe="identify", args=(states(),)))
    assert "no recipe or pass 'identify'" in error.what
    assert error.remedy == "use 'identity'"
