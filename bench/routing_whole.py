"""Training of a whole Mixture-of-Recursions beside the model that it was made of."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from routing_plan import Row
from routing_race import FLOPS, Race, judged
from routing_region import HALF, routed_by
from routing_time import Place, Ready, Variants, clock_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

import depthc
from depthc.codegen.causal import flagged
from depthc.codegen.module import DepthModule, lower
from depthc.ir.cost.flops import flops
from depthc.ir.program import Program

VOCABULARY, CHUNKS = 49152, 8
EMBEDDING = "embed_tokens.weight"
RECIPE = 'tie(loops=3, sharing="middle_cycle") | route()'
Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # tokens to last states, and the loss of the routers


def llama(row: Row, vocabulary: int) -> nn.Module:
    """A Llama without its head, which is the embedding."""
    import transformers

    s = row.sizes
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=s.width,
        intermediate_size=s.inner,
        num_hidden_layers=row.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.key_heads,
        max_position_embeddings=s.tokens,
        use_cache=False,
    )
    return transformers.LlamaModel(config)


def measure(row: Row, place: Place) -> dict[str, Any]:
    """One row of the kind "whole": training steps, with AdamW, in tokens a second."""
    began, s, vocabulary = time.perf_counter(), row.sizes, VOCABULARY if place.cuda else 64
    with torch.device(place.device):
        model = llama(row, vocabulary).to(HALF).train()
        ids = torch.randint(vocabulary, (s.batch, s.tokens))
    captured = depthc.capture(model, kwargs={"input_ids": ids})
    module = routed_by(RECIPE, captured, training=True)
    whole = Whole(model, lower(flagged(captured)).train(), module, ids, place)
    race = Race(clock_of(row, place, began)).run(whole.variants())
    vanilla, routed = whole.operations(captured), whole.operations(module.program)
    others = {f"memory, {name}": float(held) for name, held in whole.memory.items()}
    for name in {"vanilla", "dense"} & race.times.keys():
        others[f"{name} by FLOPs"] = race.median(name) * routed / vanilla
    text = str(module.explain_kernels())
    found = judged(race, row.asked, flops=routed, moved=0.0, floor=routed / FLOPS, choices=text, others=others)
    speed = {name: s.batch * s.tokens / race.median(name) for name in race.times}
    return found | {"tokens_per_second": speed, "memory": whole.memory, "flop_ratio": vanilla / routed}


class Whole:
    """Training steps of the model and of what depthc made of it.

    Attributes:
        memory: the most bytes that a variant held at once, its parameters and their optimizer included.
    """

    def __init__(self, model: nn.Module, lowered: DepthModule, module: DepthModule, ids: Tensor, place: Place) -> None:
        self.model, self.lowered, self.module, self.ids, self.place = model, lowered, module, ids, place
        self.memory: dict[str, int] = {}
        self.loss = place.compiled(_summed)

    def variants(self) -> Variants:
        """The model by torch.compile and by depthc, with the same attention; the module whole, by bodies and eager."""
        found = {"vanilla": self.vanilla, "dense": self.dense}
        found |= {"whole": self.whole, "bodies": self.bodies, "eager": self.eager}
        return {name: (lambda name=name, make=make: self._weighed(name, make)) for name, make in found.items()}

    def _weighed(self, name: str, make: Callable[[], Ready]) -> Ready:
        """A variant that has run, with the memory that it took."""
        if not self.place.cuda:
            return make()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        made = make()
        made.run()
        torch.cuda.reset_peak_memory_stats()
        made.run()
        self.memory[name] = torch.cuda.max_memory_allocated() - before
        return made

    def vanilla(self) -> Ready:
        model = copy.deepcopy(self.model)
        run = self.place.compiled(lambda ids: model(input_ids=ids).last_hidden_state)
        return self.training(model, lambda ids: (run(ids), None), dict(model.named_parameters())[EMBEDDING])

    def dense(self) -> Ready:
        module = copy.deepcopy(self.lowered)
        self.place.compile(module)
        return self.of_depthc(module, lambda ids: (module(input_ids=ids).last_hidden_state, None))

    def eager(self) -> Ready:
        module = self.copied(kernels=False)
        return self.of_depthc(module, _forward(module))

    def bodies(self) -> Ready:
        module = self.copied()
        self.place.compile(module)
        return self.of_depthc(module, _forward(module))

    def whole(self) -> Ready:
        module = self.copied()
        _forward(module)(self.ids)  # rows are traced before the whole is
        return self.of_depthc(module, self.place.compiled(_forward(module)))

    def copied(self, kernels: bool = True) -> DepthModule:
        module = copy.deepcopy(self.module)
        if not kernels:
            module.kernels = ()
        return module

    def of_depthc(self, module: DepthModule, forward: Forward) -> Ready:
        return self.training(module, forward, module.parameter_of(EMBEDDING))

    def training(self, module: nn.Module, forward: Forward, head: Tensor) -> Ready:
        """A step of training."""
        optimizer = torch.optim.AdamW(module.parameters(), 1e-6, fused=self.place.cuda)

        def step() -> Tensor:
            states, beside = forward(self.ids)
            loss = self.cross_entropy(states, head)
            (loss if beside is None else loss + beside).backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Ready(step)

    def cross_entropy(self, states: Tensor, head: Tensor) -> Tensor:
        """Of every next token, in chunks whose logits are computed again backward."""
        targets = self.ids.roll(-1, 1)
        targets[:, -1] = -100
        pieces = zip(states.flatten(0, 1).chunk(CHUNKS), targets.flatten().chunk(CHUNKS), strict=True)
        parts = [checkpoint(self.loss, rows, head, wanted, use_reentrant=False) for rows, wanted in pieces]
        return torch.stack(parts).sum() / (targets >= 0).sum()

    def operations(self, program: Program) -> float:
        """Those of a step: three times a forward, with the products of the head."""
        batch, tokens = self.ids.shape
        head = 2 * batch * tokens * self.model.get_input_embeddings().weight.numel()
        return 3 * (float(flops(program).subs({"b": batch, "s": tokens})) + head)


def _forward(module: DepthModule) -> Forward:
    def forward(ids: Tensor) -> tuple[Tensor, Tensor | None]:
        out, aux = module.forward_with_aux(input_ids=ids)
        return out.last_hidden_state, aux.loss

    return forward


def _summed(rows: Tensor, head: Tensor, wanted: Tensor) -> Tensor:
    return cross_entropy(linear(rows, head).float(), wanted, reduction="sum")
