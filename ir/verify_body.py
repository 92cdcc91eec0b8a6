"""The rules of bodies: closed, functional graphs whose every need is a declared input."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import fx

from depthc.ir.body import Body, Input
from depthc.ir.certificate import operands, target_name
from depthc.ir.errors import VerifyError
from depthc.ir.text.operations import is_operation, misfit
from depthc.ir.types import Scalar, Type

_ENVIRONMENT = ("training", "device")


def check_body(body: Body, where: str) -> None:
    """Check one body; a body that was checked is not checked again.

    Raises:
        VerifyError: the first rule that it breaks.
    """
    if "verified" in vars(body):
        return
    seen: set[fx.Node] = set()
    names: set[tuple[str, str]] = set()
    for node in body.graph.nodes:
        if node.op == "placeholder":
            _check_input(node, names, where)
        elif node.op == "call_function":
            _check_op(node, seen, where)
        elif node.op != "output":
            _fail(node, where, f"a body is not closed: {node.op}", expected="placeholder, call_function and output")
        seen.add(node)
    for result in body.results:
        if not isinstance(result, fx.Node) or result not in seen:
            _fail(None, where, "a result is not a value of the body", expected="a node", found=repr(result))
    vars(body)["verified"] = True


def _fail(node: Any, where: str, what: str, *, expected: str = "", found: str = "") -> NoReturn:
    source = node.meta.get("source", "") if node is not None else ""
    raise VerifyError(
        what,
        where=f"{where}{f', {node.name}' if node is not None else ''}{f', {source}' if source else ''}",
        expected=expected,
        found=found or (str(node.format_node()) if node is not None else ""),
        remedy="correct the pass or the text that made this body",
    )


def _check_input(node: fx.Node, names: set[tuple[str, str]], where: str) -> None:
    info = node.meta.get("input")
    if not isinstance(info, Input) or info.kind not in ("value", "param", "const", "env"):
        expected = 'an Input in meta["input"]'
        _fail(node, where, "an input of the body is not declared", expected=expected, found=str(info))
    if (info.kind, info.name) in names:
        _fail(node, where, f"two inputs of one kind are called {info.name!r}", expected="unique names")
    names.add((info.kind, info.name))
    legal = {
        "value": isinstance(info.type, Type | Scalar),
        "param": isinstance(info.type, Type),
        "const": info.type is None or isinstance(info.type, Scalar),
        "env": info.type is None and info.name in _ENVIRONMENT,
    }
    if not legal[info.kind]:
        expected = "values and parameters with a type, numbers as constants, training or device"
        _fail(node, where, f"an input has the wrong type or name: {info.kind} {info.name!r}", expected=expected)


def _check_op(node: fx.Node, seen: set[fx.Node], where: str) -> None:
    if not is_operation(node.target):
        found = getattr(node.target, "__name__", str(node.target))
        _fail(node, where, "this is not an op", expected="ATen ops and functions on sizes", found=found)
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable and node.target is not torch.ops.aten.detach_.default:
        _fail(node, where, "an op changes its operand", expected="ops that return new values")
    wrong = misfit(node.target, node.args, list(node.kwargs))
    if wrong:
        _fail(node, where, f"the arguments do not fit {target_name(node.target)}: {wrong}")
    for operand in operands(node):
        if isinstance(operand, fx.Node) and operand not in seen:
            _fail(node, where, f"{operand.name!r} is read before it is computed", expected="an earlier value")
