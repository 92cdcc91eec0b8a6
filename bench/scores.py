"""Routers whose every logit is a number that one gives: where the recipes say what a score is, not what makes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from depthc.ir.program import Program, Segment, Stack
from depthc.passes.glue import Glue, aten


def with_scores(program: Program, value: float) -> Program:
    """The program with routers that give every token this logit."""

    def constant(op: Any) -> Any:
        if not isinstance(op, Segment) or op.name != "router":
            return op
        g = Glue()
        x = g.op(aten.select.int, g.value("h", op.body.inputs_of("value")[0].type), -1, 0)  # type: ignore[arg-type]
        return replace(op, body=g.body(g.op(aten.full_like.default, x, value)), params=())

    body = [replace(i, ops=tuple(map(constant, i.ops))) if isinstance(i, Stack) else i for i in program.body]
    return replace(program, body=tuple(body))
