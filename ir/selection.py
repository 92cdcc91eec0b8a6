"""Selection: the rules by which `select` makes a token set of scores."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from depthc.ir import sizes
from depthc.ir.errors import RoutingError
from depthc.ir.tokens import TokenSet

RULES = ("all", "stride", "topk", "threshold", "atleast")
POINTWISE = ("all", "threshold", "atleast")  # rules that judge every token by its own score


def read_rule(text: str, indices: Mapping[str, int]) -> tuple[str, float]:
    """The name and the number of a rule: "topk(0.5)", "topk([1.0, 0.5][r])" with a number an iteration, "all".

    Raises:
        ValueError: this is no rule.
        KeyError, IndexError: it reads an index that is not there, or beyond its numbers.

    Example:
        >>> read_rule("topk([1.0, 0.5][r])", {"r": 1})
        ('topk', 0.5)
    """
    name, numbers, index = parse_rule(text)
    at = sizes.evaluate(index, indices) if index else 0
    if not 0 <= at < len(numbers):
        raise IndexError(f"{at} is not among {len(numbers)} numbers")
    number = numbers[at]
    return name, sizes.evaluate(number, indices) if isinstance(number, str) else number


def parse_rule(text: str) -> tuple[str, tuple[float | str, ...], str]:
    """The name of a rule, its numbers, and the expression that picks one of them; a number may be an expression.

    Raises:
        ValueError: this is no rule.

    Example:
        >>> parse_rule("topk([1.0, 0.5][r])"), parse_rule("stride(r + 1)")
        (('topk', (1.0, 0.5), 'r'), ('stride', ('r + 1',), ''))
    """
    return _parsed(text)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> tuple[str, tuple[float | str, ...], str]:
    tree = ast.parse(text, mode="eval").body
    match tree:
        case ast.Name(id="all"):
            return "all", (0.0,), ""
        case ast.Call(func=ast.Name(id=name), args=[ast.Subscript(value=ast.List(elts=numbers), slice=index)]):
            found = name, tuple(map(_number, numbers)), ast.unparse(index)
        case ast.Call(func=ast.Name(id=name), args=[argument]):
            found = name, (_number(argument),), ""
        case _:
            raise ValueError(f"not a selection rule: {text!r}")
    if tree.keywords or name not in RULES or name == "all":
        raise ValueError(f"not a selection rule: {text!r}")
    return found


def _number(node: ast.expr) -> float | str:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
            return -float("inf")
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id="inf"):
            return float("inf")
    sizes.read(text := ast.unparse(node))
    return text


def select(
    rule: str,
    score: Tensor | None,
    among: TokenSet | None = None,
    of: TokenSet | None = None,
    indices: Mapping[str, int] | None = None,
) -> TokenSet:
    """The set that a rule makes of scores [batch, tokens, ...] among the candidates.

    Rules: "all"; "stride(q)": every q-th position; "topk(c)": the max(1, int(c n)) best, where n counts the tokens of
    `of` in the batch row (the candidates, if it is not given), ties to the lower position; "threshold(x)": score > x,
    all for x = -inf; "atleast(r)": score >= r. The number of a rule may be an expression over the loop `indices`. "all"
    and "stride" read no more than the shape of the score, and need none with candidates.

    Raises:
        RoutingError: a candidate's score is not a number.

    Example:
        >>> select("topk(0.5)", torch.tensor([[1.0, 3.0, 3.0, 2.0]])).mask
        tensor([[False,  True,  True, False]])
    """
    name, number = read_rule(rule, indices or {})
    if among is None:
        assert score is not None, "verify asks for a score or candidates"
        mask = torch.ones(score.shape[:2], dtype=torch.bool, device=score.device)
        among = TokenSet(mask, count=mask.shape[1])
    if name == "all" or (name == "threshold" and number == -float("inf")):
        return among
    if name == "stride":
        places = torch.arange(among.mask.shape[1], device=among.mask.device)
        return TokenSet(among.mask & (places % int(number) == 0))
    assert score is not None, "verify asks for a score"
    _refuse_nan(score, among.mask)
    if name == "topk":
        return _best(score, among, of or among, float(number))
    return TokenSet(among.mask & (score > number if name == "threshold" else score >= number))


def _best(score: Tensor, among: TokenSet, of: TokenSet, capacity: float) -> TokenSet:
    """The `max(1, int(capacity * n))` best candidates of every batch row, at most all of them."""
    length = score.shape[1]
    order = score.masked_fill(~among.mask, float("-inf")).argsort(dim=1, descending=True, stable=True)
    if of.count is not None and among.count is not None:
        count = min(_share(of.count, capacity), among.count)
        if count == among.count:
            return among
        best = torch.zeros_like(among.mask).scatter(1, order[:, :count], True)
        return TokenSet(best, count=count)
    sizes = of.mask.sum(1)
    wanted = torch.minimum((sizes.double() * capacity).long().clamp(min=1), among.mask.sum(1))
    places = torch.arange(length, device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, places)
    return TokenSet(among.mask & (rank < wanted[:, None]), most=_share(length, capacity))


def _share(count: int, capacity: float) -> int:
    return max(1, int(count * capacity)) if count else 0


def _refuse_nan(score: Tensor, candidates: Tensor) -> None:
    """An error where a score is NaN: at once on the CPU; on other devices without a wait for the data."""
    message = "a token's score is not a number (NaN)"
    if score.is_meta or not score.is_floating_point():
        return
    fine = ~(score.isnan() & candidates).any()
    if torch.compiler.is_compiling() or score.device.type != "cpu":
        torch._assert_async(fine, message)
    elif not bool(fine):
        row, token = (score.isnan() & candidates).nonzero()[0].tolist()[:2]
        raise RoutingError(
            message,
            where=f"batch row {row}, token {token}",
            expected="finite scores",
            found="nan",
            remedy="look for the first NaN in the hidden states: a learning rate that is too high, or bad input",
        )
