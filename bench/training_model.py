"""The models of the training experiment: built of one capture, compiled, and what a training step of each costs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import sympy
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training_plan import VARIANTS, Settings

import depthc
from depthc.codegen.aux import Aux
from depthc.codegen.module import DepthModule, lower
from depthc.ir.cost.flops import flops
from depthc.ir.evaluate import indexed
from depthc.ir.params import value_of
from depthc.ir.program import Call, Loop, Merge, On, Op, Program, Segment, Stack
from depthc.ir.settle import settle
from depthc.ir.sizes import evaluate
from depthc.passes.pipeline import run_recipe
from depthc.passes.recipes import recipe_of


def llama(settings: Settings, seed: int, depth: float = 1.0) -> nn.Module:
    """A Llama of bytes with the weights of a seed and a share of the layers."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=settings.width,
        intermediate_size=settings.inner,
        num_hidden_layers=round(settings.layers * depth),
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


class Maker:
    """Makes modules of variants: the model is captured once, and a variant is compiled once for all its runs."""

    def __init__(self, settings: Settings, device: str) -> None:
        self.settings, self.device = settings, device
        self._captured: dict[float, Program] = {}  # by the share of the layers
        self._held: tuple[tuple[str, str], DepthModule, str] | None = None
        self._last: tuple[tuple[str, int], Program] | None = None

    def module(self, variant: str, seed: int, door: str = "eager") -> tuple[DepthModule, str]:
        """The module with the weights of a seed, ready for its first step, and what is compiled of it.

        Args:
            door: "bodies", if torch.compile is to compile the bodies; or "eager".
        """
        if not self.holds(variant, door):
            self._held = None  # frees the one before
            torch.compiler.reset()
            self._held = (variant, door), *self._made(variant, seed, door)
        assert self._held is not None
        _, module, how = self._held
        program = self.program(variant, seed)
        with torch.no_grad():
            for name, param in program.params.items():
                module.parameter_of(name).copy_(value_of(name, param, program.weights))
        module.zero_grad(set_to_none=True)
        return module.train(), how

    def holds(self, variant: str, door: str) -> bool:
        """Whether a variant is compiled already."""
        return self._held is not None and self._held[0] == (variant, door)

    def program(self, variant: str, seed: int) -> Program:
        """The rewritten program over the weights of a seed; its routers have that seed as well."""
        if self._last is None or self._last[0] != (variant, seed):
            captured = self.captured(depth := VARIANTS[variant].depth)
            weights = {**captured.weights, **llama(self.settings, seed, depth).state_dict(keep_vars=True)}
            recipe = recipe_of(VARIANTS[variant].recipe.format(seed=seed), {})
            self._last = (variant, seed), run_recipe(captured.with_weights(weights), recipe)[0]
        return self._last[1]

    def captured(self, depth: float) -> Program:
        """The model with a share of the layers."""
        if depth not in self._captured:
            ids = torch.zeros((2, self.settings.context), dtype=torch.int64)
            model = llama(self.settings, 0, depth)
            self._captured[depth] = depthc.capture(model, kwargs={"input_ids": ids})
        return self._captured[depth]

    def _made(self, variant: str, seed: int, door: str) -> tuple[DepthModule, str]:
        """A module that has taken a step, so that rows are traced and bodies compiled.

        Where they do not compile it is eager, and says why.
        """
        module = lower(settle(self.program(variant, seed))).to(self.device)
        warm(module, self.settings, self.device)
        if door == "eager":
            return module, door
        module.compile()
        try:
            warm(module, self.settings, self.device)
        except Exception as error:  # what the compiler raises has no common base
            torch.compiler.reset()
            module = lower(settle(self.program(variant, seed))).to(self.device)
            warm(module, self.settings, self.device)
            return module, f"eager: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return module, door


def warm(module: DepthModule, settings: Settings, device: str) -> None:
    """Training steps that change nothing, each on another batch: sets whose size the data decide get several sizes."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        batch = torch.randint(256, (settings.batch, settings.context), generator=generator).to(device)
        loss_of(module.train(), batch, device)[0].backward()
    module.zero_grad(set_to_none=True)
    wait(device)


def loss_of(module: DepthModule, batch: Tensor, device: str) -> tuple[Tensor, Tensor, Aux]:
    """What is minimised, the cross-entropy of every next byte in nats [rows], and what the program taps."""
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        out, aux = module.forward_with_aux(input_ids=batch)
    every = cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
    rows = every.view(len(batch), -1).mean(1)
    loss = rows.mean()
    return loss if aux.loss is None else loss + aux.loss, rows.detach(), aux


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


class Cost:
    """The floating-point operations of a training step on a batch: three times the closed form of a forward.

    Where tokens choose their depth, each row of the batch counts for what its own tokens chose.

    Attributes:
        most: operations of a step in which every token is as deep as any may be.
        fixed: whether all steps take as many.
    """

    def __init__(self, program: Program, settings: Settings) -> None:
        one = 3 * flops(program).subs({"b": 1, "s": settings.context})
        sizes = sorted(one.free_symbols, key=str)
        found = [re.fullmatch(r"chosen_(\d+)", str(size)) for size in sizes]
        assert all(found), f"sizes that only the data decide: {sizes}"
        self._recursions = [int(one[1]) for one in found if one]  # to whose sets only some tokens belong
        self._of_row = sympy.lambdify(sizes, one, "math")
        self.fixed, self.rows = not sizes, settings.batch
        self.most = self.rows * float(self._of_row(*[settings.context] * len(sizes)))

    def spent(self, aux: Aux) -> Tensor:
        """The operations of one step, where steps differ."""
        sizes = [aux.routes[r].chosen.sum(1).double() for r in self._recursions]  # [recursion][row]
        return self._of_row(*sizes).sum()  # type: ignore[no-any-return]


def parameters(module: DepthModule) -> dict[str, int]:
    """How many there are, how many a forward applies (shared ones each time), and how many of them the recipe made."""
    program = module.program
    applied = sum(module.parameter_of(name).numel() for name in _applied(program) if _counts(program, name))
    made = sum(p.numel() for p in module.new_parameters().values())
    return {"unique": sum(p.numel() for p in module.parameters()), "applied": applied, "routers": made}


def _counts(program: Program, name: str) -> bool:
    return program.params[name].kind == "parameter"


def _applied(program: Program) -> Iterator[str]:
    """The parameters that a forward reads, one by one."""
    for item in program.body:
        yield from _read(item.ops if isinstance(item, Stack) else (item,), {})


def _read(ops: Sequence[Op], indices: Mapping[str, int]) -> Iterator[str]:
    for op in ops:
        match op:
            case Loop():
                for r in range(evaluate(op.count, indices)):
                    yield from _read(op.body, {**indices, op.index: r})
            case On():
                yield from _read(op.body, indices)
            case Call() | Segment() | Merge():
                yield from (indexed(name, indices) for name in op.params)
