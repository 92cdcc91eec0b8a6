"""Selection: the rules by which `select` makes a token set of scores."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from depthc.ir import sizes
from depthc.ir.errors import RoutingError
from depthc.ir.tokens import TokenSet

RULES = ("all", "stride", "topk", "threshold", "atleast")
STAGES = 16  # of a warm-up
POINTWISE = ("all", "threshold", "atleast")  # rules that judge every token by its own score


def read_rule(text: str, indices: Mapping[str, int], step: int | None = None) -> tuple[str, float]:
    """The name and the number of a rule: "topk(0.5)", "topk([1.0, 0.5][r])" with a number an iteration, "all".

    A capacity with a warm-up, "topk(0.5, warmup=1000)", falls from 1 along a cosine over the first optimizer steps:
    C + (1 - C) (1 + cos(pi t / T)) / 2 (recipes: section 4), in as many stages as `STAGES` says, so that what is
    compiled for one capacity serves many steps. Without a `step` it is the capacity at the end.

    Raises:
        ValueError: this is no rule.
        KeyError, IndexError: it reads an index that is not there, or beyond its numbers.

    Example:
        >>> read_rule("topk([1.0, 0.5][r])", {"r": 1})
        ('topk', 0.5)
        >>> read_rule("topk(0.5, warmup=1000)", {}, step=500)
        ('topk', 0.75)
    """
    name, numbers, index, warmup = parse_rule(text)
    at = sizes.evaluate(index, indices) if index else 0
    if not 0 <= at < len(numbers):
        raise IndexError(f"{at} is not among {len(numbers)} numbers")
    number = numbers[at]
    if isinstance(number, str):
        number = sizes.evaluate(number, indices)
    if warmup and step is not None:
        number += (1 - number) * (1 + math.cos(math.pi * stage_of(step, warmup) / STAGES)) / 2
    return name, number


def stage_of(step: int, warmup: int) -> int:
    """How far a warm-up is after some optimizer steps: from 0 to `STAGES`."""
    return min(STAGES, step * STAGES // warmup)


def stage_begin(step: int, warmups: Iterable[int]) -> int:
    """The first step at which all of these warm-ups are in the stage in which they are at `step`.

    Example:
        >>> stage_begin(999, [1000]), stage_begin(10**6, [1000])
        (938, 1000)
    """
    return max((-(-stage_of(step, warmup) * warmup // STAGES) for warmup in warmups), default=0)


def parse_rule(text: str) -> tuple[str, tuple[float | str, ...], str, int]:
    """The name of a rule, its numbers, the expression that picks one of them, and the steps of its warm-up.

    A number may be an expression.

    Raises:
        ValueError: this is no rule.

    Example:
        >>> parse_rule("topk([1.0, 0.5][r], warmup=9)"), parse_rule("stride(r + 1)")
        (('topk', (1.0, 0.5), 'r', 9), ('stride', ('r + 1',), '', 0))
    """
    return _parsed(text)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> tuple[str, tuple[float | str, ...], str, int]:
    tree = ast.parse(text, mode="eval").body
    match tree:
        case ast.Name(id="all"):
            return "all", (0.0,), "", 0
        case ast.Call(func=ast.Name(id=name), args=[ast.Subscript(value=ast.List(elts=numbers), slice=picked)]):
            found, index = tuple(map(_number, numbers)), ast.unparse(picked)
        case ast.Call(func=ast.Name(id=name), args=[argument]):
            found, index = (_number(argument),), ""
        case _:
            raise ValueError(f"not a selection rule: {text!r}")
    warmup = _warmup(name, tree.keywords)
    if warmup is None or name not in RULES or name == "all":
        raise ValueError(f"not a selection rule: {text!r}")
    return name, found, index, warmup


def _warmup(name: str, keywords: list[ast.keyword]) -> int | None:
    """The steps of a warm-up, 0 without; None if this is none."""
    match keywords:
        case []:
            return 0
        case [ast.keyword(arg="warmup", value=ast.Constant(value=int() as steps))] if name == "topk" and steps > 0:
            return steps
    return None


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
    step: int | None = None,
    within: Tensor | None = None,
) -> TokenSet:
    """The set that a rule makes of scores [batch, tokens, ...] among the candidates.

    Rules: "all"; "stride(q)": every q-th position; "topk(c)": the max(1, int(c n)) best, where n counts the tokens of
    `of` in the batch row (the candidates, if it is not given), or in each of its documents, whose ids are `within`:
    int[batch, tokens]; ties to the lower position; "threshold(x)": score > x,
    all for x = -inf; "atleast(r)": score >= r. The number of a rule may be an expression over the loop `indices`, and
    of "topk" fall over the optimizer steps (`step`). "all" and "stride" read no more than the shape of the score, and
    need none with candidates.

    Raises:
        RoutingError: a candidate's score is not a number.

    Example:
        >>> select("topk(0.5)", torch.tensor([[1.0, 3.0, 3.0, 2.0]])).mask
        tensor([[False,  True,  True, False]])
    """
    name, number = read_rule(rule, indices or {}, step)
    if among is None:
        assert score is not None, "verify asks for a score or candidates"
        among = all_tokens(score)
    if reads_score(name, number):
        assert score is not None, "verify asks for a score"
        refuse_nan(score, among.mask)
    return choose(name, number, score, among, of, within)


def all_tokens(score: Tensor) -> TokenSet:
    """The set of all tokens of a score [batch, tokens, ...]."""
    mask = torch.ones(score.shape[:2], dtype=torch.bool, device=score.device)
    return TokenSet(mask, count=mask.shape[1])


def reads_score(name: str, number: float) -> bool:
    """Whether a rule reads the score itself, and not its shape alone."""
    return name not in ("all", "stride") and not (name == "threshold" and number == -float("inf"))


def choose(
    name: str,
    number: float,
    score: Tensor | None,
    among: TokenSet,
    of: TokenSet | None = None,
    within: Tensor | None = None,
) -> TokenSet:
    """The set that a rule with its number makes; no look at the data decides how it is computed."""
    if name == "stride":
        places = torch.arange(among.mask.shape[1], device=among.mask.device)
        count = -(-len(places) // int(number)) if among.everyone else None
        return TokenSet(among.mask & (places % int(number) == 0), count=count)
    if not reads_score(name, number):
        return among
    assert score is not None, "verify asks for a score"
    if name == "topk":
        if within is not None:
            return _best_within(score, among, of or among, float(number), within)
        return _best(score, among, of or among, float(number))
    return TokenSet(among.mask & (score > number if name == "threshold" else score >= number))


def _best(score: Tensor, among: TokenSet, of: TokenSet, capacity: float) -> TokenSet:
    """The `max(1, int(capacity * n))` best candidates of every batch row, at most all of them."""
    count, most, wanted = share_of(among, of, capacity)
    if count is not None:
        if count == among.count:
            return among
        best = torch.zeros_like(among.mask).scatter(1, ranked(score, among.mask)[:, :count], True)
        return TokenSet(best, count=count)
    assert wanted is not None
    return TokenSet(best_of(score, among.mask, wanted), most=most)


def share_of(among: TokenSet, of: TokenSet, capacity: float) -> tuple[int | None, int, Tensor | None]:
    """How many candidates a capacity lets in: (in every row, where that is known; at most; in each row, if it is not).

    Example:
        >>> everyone = all_tokens(torch.zeros(1, 8))
        >>> share_of(everyone, everyone, 0.5)
        (4, 4, None)
    """
    if of.count is not None and among.count is not None:
        count = min(_share(of.count, capacity), among.count)
        return count, count, None
    return None, _share(of.mask.shape[1], capacity), (of.mask.sum(1).double() * capacity).long().clamp(min=1)


def best_of(score: Tensor, among: Tensor, wanted: Tensor) -> Tensor:
    """bool [batch, tokens]: so many of the best candidates of every row as is `wanted` [batch], at most all of them."""
    order = ranked(score, among)
    places = torch.arange(score.shape[1], device=order.device).expand_as(order)
    return among & (torch.empty_like(order).scatter(1, order, places) < wanted[:, None])


def ranked(score: Tensor, among: Tensor) -> Tensor:
    """Positions [batch, tokens] from the best candidate to the worst, ties to the lower; then all other tokens."""
    if score.is_floating_point():
        score = score.clamp(min=torch.finfo(score.dtype).min)  # a candidate at -inf comes before what is no candidate
    return score.masked_fill(~among, float("-inf")).argsort(dim=1, descending=True, stable=True)


def _best_within(score: Tensor, among: TokenSet, of: TokenSet, capacity: float, within: Tensor) -> TokenSet:
    """The best candidates of every document, by its own number of tokens."""
    order = ranked(score, among.mask)
    order = order.gather(1, within.gather(1, order).argsort(dim=1, stable=True))  # by document, then by score
    ids, places = within.gather(1, order), torch.arange(score.shape[1], device=score.device).expand_as(order)
    begins = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0))
    number, rank = begins.cumsum(1), places - (begins * places).cummax(1).values
    tokens = torch.zeros_like(order).scatter_add(1, number, of.mask.gather(1, order).long())
    wanted = (tokens.double() * capacity).long().clamp(min=1).gather(1, number)
    return TokenSet(among.mask & torch.zeros_like(among.mask).scatter(1, order, rank < wanted))


def _share(count: int, capacity: float) -> int:
    return max(1, int(count * capacity)) if count else 0


def refuse_nan(score: Tensor, candidates: Tensor) -> None:
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
