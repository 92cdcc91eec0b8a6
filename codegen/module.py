"""Module lowering: a program as an `nn.Module` with the captured model's signature, output type and parameter names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthc.codegen.aux import Aux
from depthc.codegen.causal import flagged
from depthc.codegen.checkpointing import Checkpointing
from depthc.codegen.choices import Choices, choices_of
from depthc.codegen.functions import function_of
from depthc.codegen.kernels.common import require_one_of
from depthc.codegen.kernels.shared_attention.attend import attend
from depthc.codegen.loops import LoopBody
from depthc.codegen.routing import KERNELS, KernelEvaluator, combines_of, scores_of
from depthc.codegen.rows import RowsLowering
from depthc.codegen.tables import tables_of
from depthc.ir import selection, sizes
from depthc.ir.body import Body
from depthc.ir.errors import InputError, StateDictError
from depthc.ir.evaluate import WeightParams
from depthc.ir.params import STEP
from depthc.ir.program import Loop, Merge, On, Op, Program, Segment, Select, Stack
from depthc.ir.selection import stage_begin
from depthc.ir.settle import settle
from depthc.ir.signature import device_of
from depthc.passes.pipeline import Step
from depthc.passes.recipe import Recipe
from depthc.passes.stages import stages_of

_RESERVED = ("program", "recipe", "history", "add_losses", "selection")


class DepthModule(Checkpointing, nn.Module):
    """A lowered program. Its parameters have the names of the captured model's; under the identity recipe they are the
    same tensors.

    Every block is compiled to one Python function that all its layers share.

    Attributes:
        program: the program that was lowered.
        recipe, history: how it was made of the captured one.
        add_losses: whether a training forward adds the auxiliary losses to the loss that the model returns.
        selection: "inference" (causal) or "training" (top-k): how `eval()` selects tokens. Top-k sees the whole
            sequence: it is for measurements and is not causal.
        bounded: whether sets whose size the data decide (thresholds, depths that tokens choose) are packed at the size
            of all tokens. Then nothing waits for the data: a CUDA graph can hold a run, and torch.compile makes one
            graph of the module. It takes the memory of all tokens; products in bf16 skip the others on GPUs that can.
    """

    accepts_loss_kwargs = False  # the Trainer scales losses by gradient accumulation, auxiliary ones as well

    def __init__(self, program: Program, recipe: Recipe | None = None, history: tuple[Step, ...] = ()) -> None:
        super().__init__()
        program = settle(program, copies=False)
        self.recipe, self.history = recipe or Recipe(), history
        self.add_losses, self.selection, self.bounded = False, "inference", False
        self._kernels = frozenset(KERNELS)
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        values = WeightParams(program)
        made: dict[int, Tensor] = {}
        for name, param in program.params.items():
            self._register(name, values(name), param.kind, made)
        self._bodies = {body.certificate: body for body in bodies_of(program)}
        functions = {key: function_of(body) for key, body in self._bodies.items()}
        self._functions = dict.fromkeys((False, True), functions)
        self._rows = RowsLowering(attend=attend)
        self._blocks = {block.body.certificate for block in program.blocks.values()}
        self.program = program.with_weights(_Weights(self))
        self._warmups, self._tables = _warmups(program), tables_of(program)
        self._combines, self._scores = combines_of(program), scores_of(program)
        self._read_step()
        self.register_load_state_dict_post_hook(_read_step)  # also where a module around this one loads

    def _register(self, name: str, value: Tensor, kind: str, made: dict[int, Tensor]) -> None:
        owner: nn.Module = self
        *path, leaf = name.split(".")
        if hasattr(type(self), (top := name.split(".")[0])) or top in _RESERVED or top.startswith("_"):
            raise InputError(
                f"parameter {name!r} has the name of an attribute of compiled modules",
                found=top,
                remedy=f"rename the model's attribute {top!r}",
            )
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        self._owners[name] = (owner, leaf)
        if kind in ("parameter", "frozen"):
            if id(value) not in made:
                made[id(value)] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, kind == "parameter")
            owner.register_parameter(leaf, made[id(value)])  # type: ignore[arg-type]
        else:
            owner.register_buffer(leaf, value, persistent=kind == "buffer")

    def parameter_of(self, name: str) -> Tensor:
        """The parameter or buffer of a state-dict name."""
        owner, leaf = self._owners[name]
        return getattr(owner, leaf)

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the captured model does not have, by name: routers and the like."""
        return {name: p for name, p in self.named_parameters() if name.startswith("depth.")}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the captured model's forward does; same arguments, same output type.

        Raises:
            InputError: arguments that were not captured, another device than the parameters', a mode that was not
                captured, losses asked for where the model returns none.
            RoutingError: a router's logit is not a number.
        """
        out, aux = self.forward_with_aux(*args, **kwargs)
        return self._with_losses(out, aux) if self.add_losses and self.training else out

    def forward_with_aux(self, *args: Any, **kwargs: Any) -> tuple[Any, Aux]:
        """The output, and what the program taps: auxiliary losses and routes."""
        tensors = self.program.signature.flatten(args, kwargs)
        evaluator = self._evaluator(device_of(tensors))
        values = evaluator.run(self.program.body, dict(tensors), self.program.signature.size_values(tensors))
        return self.program.signature.unflatten(values), Aux(evaluator.taps)

    def compile(self, **options: Any) -> None:
        """Compile every body with torch.compile, once for all its applications; what is around them stays Python.

        `torch.compile(module)` traces the whole forward, each application anew; here the time to compile does not grow
        with the depth. `options` are those of torch.compile.
        """
        inner = partial(torch.compile, **options)
        self._functions = {  # two functions a body: what one mode needs takes nothing of Dynamo's limit from the other
            mode: {key: inner(function_of(body)) for key, body in self._bodies.items()} for mode in (False, True)
        }
        self._rows = RowsLowering(inner, self._rows.attend)

    @property
    def kernels(self) -> frozenset[str]:
        """The kernels that are on, of `depthc.codegen.routing.KERNELS`: all, until others are assigned.

        Raises:
            InputError: there is no such kernel.
        """
        return self._kernels

    @kernels.setter
    def kernels(self, names: Collection[str]) -> None:
        for name in names:
            require_one_of("a kernel", name, KERNELS)
        self._kernels = frozenset(names)
        self._rows = RowsLowering(self._rows.compile, attend if "attention" in self._kernels else None)

    def explain_kernels(self) -> Choices:
        """Which kernel runs each step of every routed region where the module is now, and why.

        Example:
            >>> print(compiled.explain_kernels())  # doctest: +SKIP
            step    site                  kernel       because
            select  model.layers: chosen  select_topk  topk([1.0, 0.5][r])
        """
        device = next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        return choices_of(self.program, self._kernels, device)

    def set_step(self, step: int) -> None:
        """Say how many optimizer steps were taken, for what warms up; it is saved with the parameters.

        A program without a schedule takes no notice.
        """
        if STEP in self._owners:
            self.parameter_of(STEP).fill_(step)
            self._read_step()

    def dump(self, folder: str | Path) -> Path:
        """Write what the recipe did into a folder, a few files for every pass and `report.html`; returns the folder.

        Raises:
            DumpError: the folder cannot be written; nothing is left half-written.
        """
        from depthc.codegen.dump.files import dump_of, write

        stages = stages_of(self.program, self.history)
        return write(dump_of(stages, str(self.recipe)), folder)

    def _read_step(self) -> None:
        """The stage of the schedules as a number that changes seldom: what is compiled depends on it."""
        held = self.parameter_of(STEP) if self._warmups else None
        taken = 0 if held is None or held.is_meta else int(held)
        self._step = stage_begin(taken, self._warmups) if self._warmups else None

    def loop(self, name: str) -> LoopBody:
        """The body of a loop, callable alone; `name` is the loop's index.

        Raises:
            InputError: there is no such loop.
        """
        return LoopBody(self.program, name, self._evaluator)

    def _evaluator(self, device: torch.device) -> KernelEvaluator:
        self._check(device)
        evaluator = KernelEvaluator(
            self.program, self.parameter_of, device, self.training, self._run_body, self.selection, self._step
        )
        evaluator.run_rows, evaluator.kernels = self._rows, self._kernels
        evaluator.bounded = self.bounded
        evaluator.combines, evaluator.scores, evaluator.tables = self._combines, self._scores, self._tables
        if self._checkpoint is not None and self.training:
            evaluator.run_rows = partial(self._checkpoint, self._rows)
        return evaluator

    def _run_body(self, body: Body, inputs: Sequence[Any]) -> Sequence[Any]:
        if self._checkpoint is not None and self.training and body.certificate in self._blocks:
            return self._checkpoint(self._functions[True][body.certificate], *inputs)  # type: ignore[no-any-return]
        return self._functions[self.training][body.certificate](*inputs)

    def _with_losses(self, out: Any, aux: Aux) -> Any:
        """The output with the auxiliary losses added to its loss."""
        if aux.loss is None:
            return out
        if not isinstance(out, Mapping) or not isinstance(out.get("loss"), Tensor):
            raise InputError(
                "there is no loss to add the auxiliary losses to",
                expected="an output with the key 'loss'",
                found=type(out).__name__,
                remedy="capture the model with labels, or add forward_with_aux(...)[1].loss to a loss of your own",
            )
        out["loss"] = out["loss"] + aux.loss.to(out["loss"].dtype)  # type: ignore[index]
        return out

    def _check(self, device: torch.device) -> None:
        if self.training not in self.program.modes:
            raise InputError(
                f"the model was captured in {'eval' if self.training else 'train'} mode only: in the other one it does"
                " not export, or differs by more than dropout",
                remedy="put the model into the mode that you run and capture it again; that says which it is",
            )
        own = next((p.device for p in self.parameters()), device)
        if own != device:
            raise InputError(
                "the arguments are on another device than the parameters",
                expected=str(own),
                found=str(device),
                remedy=f"move the arguments to {own}, or the module to {device}",
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DepthModule:
        device = next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        for dtype in {p.type.dtype for p in self.program.params.values() if p.type.dtype.is_floating_point}:
            cast = fn(torch.empty(0, dtype=dtype, device=device)).dtype
            if cast != dtype:
                raise InputError(
                    "a compiled module keeps the dtype that it was captured in: its casts were captured with it",
                    expected=str(dtype),
                    found=str(cast),
                    remedy=f"convert the original model with .to({cast}) and compile it again",
                )
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights by the captured model's names.

        Raises:
            StateDictError: missing, unexpected or misshapen entries (the first two only if `strict`).
        """
        own = self.state_dict()
        wrong = {k: v for k, v in state_dict.items() if k in own and v.shape != own[k].shape}
        for name, value in wrong.items():
            raise StateDictError(
                f"weight {name!r} has another shape",
                expected=str(tuple(own[name].shape)),
                found=str(tuple(value.shape)),
                remedy="load the weights of a model with the same configuration",
            )
        missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
        if strict and (missing or unexpected):
            close = [m for u in unexpected for m in difflib.get_close_matches(u, missing, 1)]
            raise StateDictError(
                f"the state dict lacks {len(missing)} and adds {len(unexpected)} names",
                expected=f"also {', '.join(missing[:3])}" if missing else "no other names",
                found=f"also {', '.join(unexpected[:3])}" if unexpected else "nothing else",
                remedy=f"rename {unexpected[0]!r} to {close[0]!r}"
                if close
                else "pass strict=False to load what matches",
            )
        return super().load_state_dict(state_dict, strict, assign)


def _read_step(module: DepthModule, _: Any) -> None:
    module._read_step()


class _Weights(Mapping[str, Tensor]):
    """A module's parameters as the weights of its program: those of now, whatever became of them since."""

    def __init__(self, module: DepthModule) -> None:
        self.module = module

    def __getitem__(self, name: str) -> Tensor:
        return self.module.parameter_of(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.module._owners)

    def __len__(self) -> int:
        return len(self.module._owners)


def lower(
    program: Program,
    signature: inspect.Signature | None = None,
    recipe: Recipe | None = None,
    history: tuple[Step, ...] = (),
) -> DepthModule:
    """A module that computes `program`; `signature` is shown as its forward's.

    A program that passes rewrote takes its causal masks as flags (`depthc.codegen.causal`); without a `history` it runs
    op for op as it was captured.
    """
    for reader in (sizes.postfix, selection.parse_rule):  # of texts, which Dynamo need not look into
        torch.compiler.assume_constant_result(reader)

    def forward(self: DepthModule, *args: Any, **kwargs: Any) -> Any:
        return DepthModule.forward(self, *args, **kwargs)

    forward.__doc__ = DepthModule.forward.__doc__
    if signature is not None:
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [own, *signature.parameters.values()]
        if parameters[1:] and parameters[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            parameters[0] = own.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    kind = type(f"Depth{program.name}", (DepthModule,), {"forward": forward, "__module__": __name__})
    return kind(flagged(program) if history else program, recipe, history)  # type: ignore[no-any-return]


def bodies_of(program: Program) -> list[Body]:
    """Every body of a program, once."""
    ops = [op for item in program.body for op in (_flat(item.ops) if isinstance(item, Stack) else [item])]
    inner = [op.body for op in ops if isinstance(op, Segment)]
    combines = [op.combine for op in ops if isinstance(op, Merge) and op.combine is not None]
    return [*(block.body for block in program.blocks.values()), *inner, *combines]


def _warmups(program: Program) -> tuple[int, ...]:
    """The steps of every warm-up in a program."""
    ops = [op for stack in program.stacks for op in _flat(stack.ops)]
    rules = [selection.parse_rule(op.rule) for op in ops if isinstance(op, Select)]
    return tuple(sorted({warmup for *_, warmup in rules} - {0}))


def _flat(ops: Sequence[Op]) -> list[Op]:
    return [inner for op in ops for inner in (_flat(op.body) if isinstance(op, Loop | On) else [op])]
