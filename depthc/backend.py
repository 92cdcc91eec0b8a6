"""The backend of torch.compile: `torch.compile(model, backend="depthc", options={"recipe": ...})`."""

from __future__ import annotations

import logging
from typing import Any
import torch
from torch import fx
from depthc.codegen.ahead import AheadProgram
from depthc.ir.graph.dynamo import trace_dynamo
from depthc.ir.outline.assemble import assemble
from depthc.ir.outline.outline import outline
from depthc.ir.verify import verify

log = logging.getLogger("depthc.backend")


def backend(graph: fx.GraphModule, inputs: list[Any], *, options=None) -> Any:
    from torch._dynamo import lookup_backend
    d = trace_dynamo(graph)
    program = assemble(d.trace, outline(d.trace))
    verify(program)
    fakes = {pair: f for pair, f in zip(d.inputs, d.fakes)}
    values = {n: f for (k, n), f in fakes.items() if k == "value"}
    device = next((t.device for t in values.values()))
    ahead = AheadProgram(program, device, d.mode, lookup_backend((options or {}).get("inner", "inductor")))
    def fsymbol(s):
        at, dim = d.symbols[s]
        return d.fakes[at] if dim is None else d.fakes[at].shape[dim]
    ahead.prepare(values, lambda name: fakes["param", name], fsymbol)
    print('compiled', ahead.compiled, len(ahead._sites))

    def run(*given):
        real = dict(zip(d.inputs, given))
        values = {n: f for (k, n), f in real.items() if k == "value"}
        def symbol(s):
            at, dim = d.symbols[s]
            return given[at] if dim is None else given[at].shape[dim]
        return ahead(values, lambda name: real["param", name], symbol)
    return run
