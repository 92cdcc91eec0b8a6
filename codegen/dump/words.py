"""Words: numbers, selection rules and whole recipes, said so that nobody needs the code to follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from depthc.ir import sizes
from depthc.ir.program import Kv, Loop, Select
from depthc.ir.selection import parse_rule

PLANS: Mapping[str, str] = {
    "store": "stored for later",
    "read": "read from a store, not computed",
    "share": "stored by the first application, read by later ones",
    "update": "a store, renewed where tokens run",
    "overlay": "stored by the first application; later ones lay their own over it",
}
TIMES, NO_VALUE = "\u00d7", "\u2013"
NARROW = "\u202f"  # a space at which no line breaks
EVERYONE = {"topk": 1.0, "stride": 1.0, "threshold": float("-inf")}  # numbers of rules that take all tokens
MOST_NUMBERS = 6  # of a rule, in words
UNITS = (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3))


@dataclass(frozen=True)
class Scope:
    """What words about an op may refer to.

    Attributes:
        loops: those around it, outer ones first.
        sets: what made each token set.
        makers: the segment that made each value.
    """

    loops: tuple[Loop, ...] = ()
    sets: Mapping[str, Select] = field(default_factory=dict)
    makers: Mapping[str, str] = field(default_factory=dict)

    def inside(self, loop: Loop) -> Scope:
        """The scope of a loop's body."""
        return replace(self, loops=(*self.loops, loop))


def short(number: float, unit: str = "") -> str:
    """A number with three digits and a unit of thousands.

    Example:
        >>> short(134515008).split(NARROW), short(999), short(538060032, "B").split(NARROW)
        (['135', 'M'], '999', ['538', 'MB'])
    """
    for prefix, factor in UNITS:
        if abs(number) >= factor * 0.9995:
            value = number / factor
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {prefix}{unit}".replace(" ", NARROW)
    return f"{number:,.0f}{NARROW if unit else ''}{unit}"


def share(number: float) -> str:
    """A share as a fraction, where it is a simple one.

    Example:
        >>> share(0.125), share(2 / 3), share(0.3333), share(0.99), share(1.0)
        ('1/8', '2/3', '33.3%', '99%', 'all')
    """
    near = Fraction(number).limit_denominator(32)
    if abs(near - number) >= 1e-9:
        return f"{100 * number:.3g}%"
    return "all" if near == 1 else f"{near}"


def listed(words: Sequence[str]) -> str:
    """Words in a row.

    Example:
        >>> listed(["a"]), listed(["a", "b", "c"])
        ('a', 'a, b and c')
    """
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else "".join(words)


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "layer"), counted(1200, "layer")
        ('1 layer', '1,200 layers')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# selection


def chosen(select: Select, scope: Scope) -> str:
    """Which tokens a selection takes in training.

    Example:
        >>> chosen(Select("A", "topk(0.125)", "s"), Scope(makers={"s": "router"}))
        'the best 1/8 of the tokens by router'
        >>> chosen(Select("A", "topk([1.0, 0.5][r])", "s"), Scope((Loop("r", 2, ()),)))
        'all tokens in pass 1, then the best 1/2 of all by s'
    """
    name, _, _, warmup = parse_rule(select.rule)
    carried = _carried(select, scope)
    said = _rule(select.rule, select.score, scope, "of them" if carried and select.of is None else "of all")
    said += " of every document" if select.within else ""
    said += f" by {scope.makers.get(select.score, select.score)}" if select.score and name == "topk" else ""
    said += " among those of the pass before" if carried else ""
    return said + (f", falling from all over {counted(warmup, 'step')}" if warmup else "")


def inferred(select: Select, scope: Scope) -> str:
    """Which tokens it takes outside of training; "" where the rule is the same.

    Example:
        >>> inferred(Select("A", "topk(0.5)", "s", inference="threshold(0.0)"), Scope(makers={"s": "router"}))
        'the tokens with a score above 0 by router'
    """
    if select.inference is None:
        return ""
    judge = select.judge or select.score
    maker = scope.makers.get(judge or "")
    return _rule(select.inference, "a score" if maker else judge, scope) + (f" by {maker}" if maker else "")


def brief(select: Select, scope: Scope) -> str:
    """The rule in a few letters, for a small box.

    Example:
        >>> brief(Select("A", "topk(0.125)", "s"), Scope()), brief(Select("A", "threshold(0.0)", "s"), Scope())
        ('1/8', '> 0')
    """
    name, _, _, _ = parse_rule(select.rule)
    signs = {"topk": "", "stride": "1/", "threshold": "> ", "atleast": "≥ "}
    return f"{signs[name]}{_number(name, _by_pass(select.rule, scope)[0])}" if name in signs else name


def _rule(rule: str, score: str | None, scope: Scope, whole: str = "of all") -> str:
    """A rule in words; `whole` says what shares are of, where they differ by pass."""
    name, _, _, _ = parse_rule(rule)
    values = _by_pass(rule, scope)
    if name == "all" or all(value == EVERYONE.get(name) for value in values):
        return "all tokens"
    if len(set(values)) == 1:
        return _phrase(name, values[:1], score, "of the tokens")
    if values[0] == EVERYONE.get(name):
        return f"all tokens in pass 1, then {_phrase(name, values[1:], score, whole)}"
    return _phrase(name, values, score, whole)


def _phrase(name: str, values: Sequence[float | str], score: str | None, whole: str) -> str:
    """A rule with its numbers, one a pass."""
    shown = [_number(name, value) for value in (values if len(set(values)) > 1 else values[:1])]
    shown = shown if len(shown) <= MOST_NUMBERS else [*shown[:3], "...", shown[-1]]
    numbers = ", then ".join(shown)
    if name == "topk":
        return f"the best {numbers} {whole}"
    if name == "stride":
        return f"one token in {numbers}"
    return f"the tokens with {score} {'above' if name == 'threshold' else 'at least'} {numbers}"


def _number(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    return share(value) if name == "topk" else f"{value:g}"


def _by_pass(rule: str, scope: Scope) -> list[float | str]:
    """The number of a rule in every pass of the innermost loop; as its text where it is not static."""
    _, numbers, index, _ = parse_rule(rule)
    loop = scope.loops[-1] if scope.loops else None
    if not index or loop is None or not isinstance(loop.count, int):
        return [_float(number) for number in numbers]
    try:
        return [_float(numbers[sizes.evaluate(index, {loop.index: n})]) for n in range(loop.count)]
    except KeyError:  # it reads the index of a loop further outside
        return [_float(number) for number in numbers]


def _float(number: float | str) -> float | str:
    return number if isinstance(number, str) else float(number)


def _carried(select: Select, scope: Scope) -> bool:
    """Whether the candidates of a selection are those that the pass before has handed on."""
    body = scope.loops[-1].body if scope.loops else ()
    here = next((place for place, op in enumerate(body) if op is select), 0)
    writers = [place for place, op in enumerate(body) if isinstance(op, Select) and op.write == select.among]
    return bool(writers) and writers[0] >= here


def planned(plans: Sequence[Kv]) -> str:
    """What a call's key/value plans say; "" where all are fresh."""
    modes = list(dict.fromkeys(plan.mode for plan in plans if plan.mode != "fresh"))
    return "; ".join(PLANS[mode] for mode in modes)
