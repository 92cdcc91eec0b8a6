"""The backend of torch.compile: `torch.compile(model, backend="depthc", options={"recipe": ...})`.

Dynamo captures the model, guards it and lifts its parameters; the graph is outlined before AOT autograd, rewritten, and
every body is compiled once by Inductor. A backend replaces a graph and no more: the optimizer holds the parameters that
there are. So a rewrite is taken as it is only if it makes no parameter and still reads every one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx

from depthc.checkpoint import load
from depthc.codegen.ahead import AheadProgram
from depthc.codegen.early import start_early
from depthc.codegen.lazy import LazyProgram
from depthc.ir.errors import CheckpointError, DepthError, InputError, RecipeError, StateDictError
from depthc.ir.graph.dynamo import DynamoTrace, trace_dynamo
from depthc.ir.names import closest
from depthc.ir.outline.assemble import assemble
from depthc.ir.outline.outline import outline
from depthc.ir.params import Ref
from depthc.ir.plans import token_dim
from depthc.ir.program import Call, Merge, On, Program, Select
from depthc.ir.text.functions import walk
from depthc.ir.types import Type
from depthc.ir.verify import verify
from depthc.passes.layers import used_params
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipe import Recipe
from depthc.passes.recipes import recipe_of

log = logging.getLogger("depthc.backend")
OLDEST_GPU = (7, 0)  # compute capability, of Triton


@dataclass(frozen=True)
class Options:
    """What `options=` of torch.compile may hold.

    Attributes:
        recipe: as `depthc.compile` takes it; options of passes stand in its text, `"tie(loops=2)"`.
        weights: a folder that `depthc.save` wrote, or a safetensors file, with the parameters of the rewritten program.
        inner: the backend that compiles the bodies, by name.
    """

    recipe: Any = "identity"
    weights: str | Path | None = None
    inner: str = "inductor"


def backend(
    graph: fx.GraphModule, inputs: list[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile a graph of Dynamo by its depth: each body of its program once.

    A graph that has no repeated layers, or is not functional, goes to Inductor as it is if there is no recipe; the
    logger `depthc.backend` says why.

    Args:
        graph, inputs: what Dynamo hands a backend.
        options: `recipe`, `weights` and `inner`; see `Options`.
        mode: of Inductor ("reduce-overhead", "max-autotune", ...).

    Raises:
        InputError: an option or a mode that does not exist, a GPU for which there is no Triton, weights for a graph
            that trains.
        RecipeError: no such recipe, a recipe that does not apply, or one that changes which parameters there are.
        CaptureError, OutlineError: there is a recipe, and the graph is not functional, or has no layers.
        CheckpointError, StateDictError: weights that cannot be read, or do not fit.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> compiled = torch.compile(model, backend=backend, options={"inner": "eager"})
        >>> bool((compiled(torch.ones(2, 4)) == model(torch.ones(2, 4))).all())
        True
    """
    chosen = _options(options)
    recipe = recipe_of(chosen.recipe, {})
    compile = _compiler(chosen.inner, mode)
    devices = {value.device for value in inputs if isinstance(value, Tensor)}
    require_gpus(devices, chosen.inner)
    if chosen.inner == "inductor" and torch.device("cpu") in devices:
        start_early()
    try:
        return _compiled(graph, inputs, chosen, recipe, compile)
    except DepthError as error:
        if recipe.passes or chosen.weights is not None:
            raise
        log.info("compiled as it is: %s", error.what)
        return compile(graph, inputs)


def _compiled(
    graph: fx.GraphModule, inputs: Sequence[Any], chosen: Options, recipe: Recipe, compile: Callable[..., Any]
) -> Callable[..., Any]:
    """The graph by its depth, under a recipe."""
    traced = trace_dynamo(graph)
    program = assemble(traced.trace, outline(traced.trace))
    verify(program)
    if chosen.weights is not None:
        program = _with_weights(program, recipe, chosen, traced, inputs)
    elif recipe.passes:
        captured, (program, _) = program, run_recipe(program, recipe)
        _require_same_parameters(captured, program, recipe)
    return _function(program, traced, compile)


def _options(given: Mapping[str, Any] | None) -> Options:
    known = [f.name for f in fields(Options)]
    for name in given or {}:
        if name not in known:
            raise InputError(
                f"the backend depthc has no option {name!r}",
                expected=", ".join(known),
                found=str(name),
                remedy=f"use {closest(str(name), known)!r}; options of a recipe stand in its text: 'tie(loops=2)'",
            )
    return Options(**(given or {}))


def _compiler(inner: str, mode: str | None) -> Callable[..., Any]:
    """The compiler of graphs behind this one."""
    from torch._dynamo import list_backends, lookup_backend
    from torch._inductor import list_mode_options

    known = [name for name in list_backends(exclude_tags=()) if name != "depthc"]
    if inner not in known:
        remedy = f"use {closest(str(inner), known)!r}"
        expected = "a name of torch._dynamo.list_backends(None), such as inductor, aot_eager or eager"
        raise InputError("there is no such inner backend", expected=expected, found=str(inner), remedy=remedy)
    modes = list_mode_options()
    if mode is not None and (mode not in modes or inner != "inductor"):
        remedy = f"use {closest(mode, modes)!r} with Inductor, or leave it out"
        raise InputError("there is no such mode", expected=", ".join(modes), found=mode, remedy=remedy)
    found: Callable[..., Any] = lookup_backend(inner)
    if inner != "inductor":
        return found
    patches = {**modes.get(mode or "", {}), "keep_output_stride": True}  # the next body is compiled for these strides
    return partial(found, config_patches=patches)


def require_gpus(devices: Set[torch.device], inner: str) -> None:
    """Refuse GPUs for which Inductor would find no Triton; other inner backends need none.

    Raises:
        InputError: Triton is not installed, or a GPU is older than it supports.
    """
    for device in sorted(devices, key=str):
        if inner != "inductor" or device.type != "cuda":
            continue
        found = "no triton"
        if find_spec("triton") is not None:
            major, minor = torch.cuda.get_device_capability(device)
            if (major, minor) >= OLDEST_GPU:
                continue
            found = f"compute capability {major}.{minor}"
        raise InputError(
            f"Inductor cannot compile for {device}",
            expected=f"triton, and a GPU of compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]} or later",
            found=found,
            remedy='pass options={"inner": "aot_eager"}, which needs no Triton',
        )


# the parameters that there are


def _function(program: Program, traced: DynamoTrace, compile: Callable[..., Any]) -> Callable[..., Any]:
    """A program as a function of the inputs of Dynamo's graph; its weights are parameters that are no inputs."""
    tensors = (t for (kind, _), t in zip(traced.inputs, traced.fakes, strict=True) if kind and isinstance(t, Tensor))
    device = next(tensors).device
    constants = {name: value.to(device) for name, value in program.weights.items()}
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "depthc_program", "encoding": "string"},
        payload_fn=lambda: str(program),
        expect_trace_id=False,
    )
    if _selects(program):
        lazy = LazyProgram(program, device, backend=compile, dynamic=True)

        def run_lazily(*given: Any) -> tuple[Tensor, ...]:
            values, params = _named(traced, given)
            return lazy(values, (params | constants).__getitem__)

        return run_lazily
    ahead = AheadProgram(program, device, traced.mode, compile)
    values, params = _named(traced, traced.fakes)
    params |= {name: traced.mode.from_tensor(value, static_shapes=True) for name, value in constants.items()}
    ahead.prepare(values, params.__getitem__, partial(_number, traced, traced.fakes))
    log.info("%s: %d functions for %s layers", program.name, ahead.compiled, "+".join(map(str, program.depths)))

    def run(*given: Any) -> tuple[Tensor, ...]:
        values, params = _named(traced, given)
        return ahead(values, (params | constants).__getitem__, partial(_number, traced, given))

    return run


def _named(traced: DynamoTrace, given: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arguments and parameters by name."""
    found: dict[str, dict[str, Tensor]] = {"value": {}, "param": {}, "": {}}
    for (kind, name), value in zip(traced.inputs, given, strict=True):
        found[kind][name] = value
    return found["value"], found["param"]


def _number(traced: DynamoTrace, given: Sequence[Any], symbol: Any) -> Any:
    """What a symbol stands for."""
    at, dim = traced.symbols[symbol]
    return given[at] if dim is None else given[at].shape[dim]


def _selects(program: Program) -> bool:
    """Whether a program runs layers on some of the tokens, or on keys of other passes.

    Raises:
        RecipeError: it does, but the graph is for one length.
    """
    ops = [op for op, _ in walk(program.body)]
    if not any(isinstance(op, Select | On | Merge) or (isinstance(op, Call) and op.kv) for op in ops):
        return False
    for block in program.blocks.values():
        size = block.body.inputs_of("value")[0].type.shape[token_dim(block)]  # type: ignore[union-attr]
        if isinstance(size, int):
            raise RecipeError(
                f"a recipe that selects tokens needs a graph for any length, and this one is for {size}",
                expected="sizes of batch and tokens that vary",
                found=str(block.body.inputs_of("value")[0].type),
                remedy="pass dynamic=True to torch.compile",
            )
    return True


def _require_same_parameters(before: Program, after: Program, recipe: Recipe) -> None:
    """Refuse a rewrite after which the optimizer would hold other parameters than the program.

    Raises:
        RecipeError: the rewrite makes a parameter, or no longer reads one.
    """
    read, now = used_params(before), used_params(after)
    made = sorted(name for name in now if name not in before.params or after.params[name].expr is not None)
    lost = sorted(name for name in read - now if before.params[name].kind in ("parameter", "frozen"))
    if made or lost:
        counted = [f"{len(names)} {what} ({names[0]})" for names, what in ((made, "made"), (lost, "not read")) if names]
        name = recipe.name or str(recipe)
        raise RecipeError(
            f"the recipe {name!r} changes which parameters the model has, and a backend cannot",
            expected="a recipe that makes no parameter and still reads every one",
            found=", ".join(counted),
            remedy=f"use depthc.compile(model, recipe={name!r}, ...), a module with parameters of its own;"
            ' for inference, save that with depthc.save and pass options={"weights": folder}',
        )


# parameters from a file


def _with_weights(
    captured: Program, recipe: Recipe, chosen: Options, traced: DynamoTrace, inputs: Sequence[Any]
) -> Program:
    """The rewritten program over parameters from a file."""
    if torch.is_grad_enabled():
        raise InputError(
            "weights from a file are for inference: the optimizer would not hold them",
            expected="a call under torch.no_grad() or torch.inference_mode()",
            found="gradients are on",
            remedy="call the model under torch.no_grad(), or train depthc.compile(model, recipe=...)",
        )
    path = Path(chosen.weights)  # type: ignore[arg-type]
    tensors, saved = _read(path)
    if saved is not None and chosen.recipe != Options.recipe and recipe != saved:
        raise RecipeError(
            "the weights were saved under another recipe",
            where=str(path),
            expected=str(saved),
            found=str(recipe),
            remedy=f"leave the recipe out, or pass recipe={str(saved)!r}",
        )
    program, _ = run_recipe(captured, recipe if saved is None else saved)
    params = _named(traced, inputs)[1].items()
    own = {name: value for name, value in params if captured.params[name].kind == "buffer"}
    return _bound(program, tensors, own | dict(captured.weights), path)


def _read(path: Path) -> tuple[dict[str, Tensor], Recipe | None]:
    """The tensors of a file or of a saved folder, and the recipe that the folder was saved under."""
    if path.is_dir():
        module = load(path)
        return {name: module.parameter_of(name).detach() for name in module.program.params}, module.recipe
    try:
        return load_file(path), None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"the weights cannot be read: {error}",
            where=str(path),
            expected="a folder that depthc.save wrote, or a safetensors file",
            remedy="check the path",
        ) from None


def _bound(program: Program, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> Program:
    """A program with the parameters that it reads from a file; buffers that are not there are the model's.

    Raises:
        StateDictError: a parameter is missing or of another type.
    """
    params, weights, missing = {}, dict[str, Tensor](), []
    for name in sorted(used_params(program)):
        param = program.params[name]
        source = param.expr.name if isinstance(param.expr, Ref) and name not in tensors else name
        value = tensors.get(source, own.get(source) if param.expr is None else None)
        if value is None:
            missing.append(name)
            continue
        if (found := Type(value.dtype, tuple(value.shape))) != param.type:
            what, remedy = f"the weight {source!r} is of another type", "give weights of this model and this recipe"
            raise StateDictError(what, where=str(path), expected=str(param.type), found=str(found), remedy=remedy)
        params[name], weights[name] = replace(param, expr=None), value
    if missing:
        raise StateDictError(
            f"the weights lack {len(missing)} parameters of the rewritten program",
            where=str(path),
            expected=f"also {', '.join(missing[:3])}",
            found=", ".join(sorted(tensors)[:3]) or "nothing",
            remedy="save them with depthc.save(depthc.compile(model, recipe=...), folder)",
        )
    return replace(program, params=params, weights=weights)
