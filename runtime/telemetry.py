"""Telemetry of routed loops: how deep tokens went, and how well routers foretell it, as plain numbers.

Everything is counted over *real* tokens: those that were a candidate of some recursion, so padding takes no part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from depthc.codegen.aux import Aux, Route
from depthc.ir.errors import InputError


@dataclass(frozen=True)
class Report:
    """What a routed loop did with the tokens of one or more batches.

    The fields are exact counts, so that reports can be combined; the shares and means are computed from them. A share
    of nothing (a recursion that no token reached) is nan.

    *Dead tokens.* A recursion is selective if it left out at least one candidate of the report. A real token is dead if
    no selective recursion chose it: it had the compute that every token has, and no more. A recursion of capacity 1
    takes every candidate and is never selective. Each token of each batch row counts for itself. Published numbers
    (Mixture-of-Recursions, arXiv 2507.10524) may count something else: the authors' code counts how often each
    *position* of a sequence is chosen over many samples.

    Attributes:
        loop: the loop's index.
        tokens: the number of real tokens.
        tokens_per_depth: [recursions + 1]: tokens that took 0, 1, 2, ... recursions. Recursions are nested, so the last
            recursion of a token that took d of them was recursion d - 1.
        candidates: [recursions]: tokens that a recursion could choose.
        chosen: [recursions]: tokens that it chose.
        foretold: [recursions]: candidates for which (logit > 0) == chosen; nan where tokens choose their depth at once.
        bits: [recursions]: the sum over the candidates of the binary entropy of sigmoid(logit).

    Example:
        >>> one = Report("r", 4, (0, 2, 2), candidates=(4, 4), chosen=(4, 2), foretold=(4, 3), bits=(2.0, 3.0))
        >>> one.mean_depth, one.dead, one.accuracy, one.entropy
        (1.5, 0.5, (1.0, 0.75), (0.5, 0.75))
        >>> print(one)
        loop r: 4 tokens, mean depth 1.50, dead 50.0%, foretold 87.5%
        recursion  candidates  chosen  last  share  foretold  entropy
             none                         0   0.0%
                0           4       4     2  50.0%    100.0%    0.500
                1           4       2     2  50.0%     75.0%    0.750
    """

    loop: str
    tokens: int
    tokens_per_depth: tuple[int, ...]
    candidates: tuple[int, ...]
    chosen: tuple[int, ...]
    foretold: tuple[float, ...]
    bits: tuple[float, ...]

    @property
    def mean_depth(self) -> float:
        """Recursions a real token."""
        return _share(sum(depth * count for depth, count in enumerate(self.tokens_per_depth)), self.tokens)

    @property
    def dead(self) -> float:
        """The share of dead tokens among real ones (see above)."""
        sizes = zip(self.chosen, self.candidates, strict=True)
        first = next((r for r, (chosen, candidates) in enumerate(sizes) if chosen < candidates), None)
        # Recursions are nested: who is not chosen by the first selective one is chosen by no later one.
        return _share(0 if first is None else sum(self.tokens_per_depth[: first + 1]), self.tokens)

    @property
    def accuracy(self) -> tuple[float, ...]:
        """[recursions]: the share of candidates whose choice the sign of their logit foretells.

        Outside of training the sign *is* the choice wherever the capacity is below 1.
        """
        return tuple(map(_share, self.foretold, self.candidates))

    @property
    def overall_accuracy(self) -> float:
        """The same over the candidates of all recursions."""
        return _share(sum(self.foretold), sum(self.candidates))

    @property
    def entropy(self) -> tuple[float, ...]:
        """[recursions]: the mean binary entropy of sigmoid(logit) over the candidates, in bits; 1 is undecided."""
        return tuple(map(_share, self.bits, self.candidates))

    def numbers(self) -> dict[str, int | float]:
        """All of it under flat names, for a logger.

        Example:
            >>> list(Report("r", 1, (0, 1), (1,), (1,), (1,), (0.5,)).numbers())
            ['tokens', 'mean_depth', 'dead', 'accuracy', 'tokens.0', 'tokens.1', 'accuracy.0', 'entropy.0']
        """
        flat: dict[str, int | float] = {"tokens": self.tokens, "mean_depth": self.mean_depth, "dead": self.dead}
        flat["accuracy"] = self.overall_accuracy
        flat |= {f"tokens.{depth}": count for depth, count in enumerate(self.tokens_per_depth)}
        flat |= {f"accuracy.{r}": share for r, share in enumerate(self.accuracy)}
        return flat | {f"entropy.{r}": bits for r, bits in enumerate(self.entropy)}

    def __str__(self) -> str:
        summary = f"mean depth {self.mean_depth:.2f}, dead {self.dead:.1%}, foretold {self.overall_accuracy:.1%}"
        heads = ("recursion", "candidates", "chosen", "last", "share", "foretold", "entropy")
        last = [(str(count), f"{_share(count, self.tokens):.1%}") for count in self.tokens_per_depth]
        rows = [heads, ("none", "", "", *last[0], "", "")]
        for r, (accuracy, entropy) in enumerate(zip(self.accuracy, self.entropy, strict=True)):
            sizes = (str(self.candidates[r]), str(self.chosen[r]))
            rows.append((str(r), *sizes, *last[r + 1], f"{accuracy:.1%}", f"{entropy:.3f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
        return "\n".join([f"loop {self.loop}: {self.tokens} tokens, {summary}", *lines])


def depth_of(aux: Aux, loop: str | None = None) -> Tensor:
    """How many recursions every token took, or how many layers that choose tokens: int64[batch, tokens].

    0 for padding, which is never a candidate, and for a real token that none chose.

    Args:
        aux: what `forward_with_aux` gives beside the output.
        loop: the loop's index; needed if several loops route.

    Raises:
        InputError: no loop routes, there is no such loop, or several and none is named.

    Example:
        >>> from depthc.ir.tokens import TokenSet
        >>> chosen = TokenSet(torch.tensor([[True, False]]))
        >>> taps = {"logit": torch.zeros(1, 2), "candidates": TokenSet(torch.ones(1, 2).bool()), "chosen": chosen}
        >>> depth_of(Aux({f"route.r.0.{name}": value for name, value in taps.items()}))
        tensor([[1, 0]])
    """
    return torch.stack([route.chosen for route in _routes(aux, loop)]).sum(0)


def report(aux: Aux, loop: str | None = None) -> Report:
    """The report on one forward; see `depth_of` for arguments and errors.

    It is about nested choices, as those of recursions are; an InputError refuses others.

    Example:
        >>> from depthc.ir.tokens import TokenSet
        >>> everyone = TokenSet(torch.ones(1, 2).bool())
        >>> taps = {"logit": torch.tensor([[0.0, 9.0]]), "candidates": everyone, "chosen": everyone}
        >>> report(Aux({f"route.r.0.{name}": value for name, value in taps.items()})).accuracy
        (0.5,)
    """
    routes = _routes(aux, loop)
    _require_nested(routes)
    real = torch.stack([route.candidates for route in routes]).any(0)
    depths = torch.bincount(depth_of(aux, loop)[real], minlength=len(routes) + 1)
    counts = [_counts(route) for route in routes]
    candidates, chosen, foretold, bits = zip(*counts, strict=True)
    return Report(routes[0].loop, int(real.sum()), tuple(depths.tolist()), candidates, chosen, foretold, bits)


def combine(reports: Iterable[Report]) -> Report:
    """The report on all batches of these reports on the same loop.

    Raises:
        InputError: there are none, or they are about different loops.

    Example:
        >>> one = Report("r", 4, (0, 2, 2), candidates=(4, 4), chosen=(4, 2), foretold=(4, 3), bits=(2.0, 3.0))
        >>> combine([one, one]).tokens_per_depth
        (0, 4, 4)
    """
    every = list(reports)
    kinds = sorted({f"loop {one.loop} of {len(one.chosen)} recursions" for one in every})
    if len(kinds) != 1:
        raise InputError(
            "there are no reports to combine" if not kinds else "the reports are about different loops",
            expected="reports on one loop",
            found=", ".join(kinds),
            remedy="combine the reports of each loop by themselves" if kinds else "give at least one report",
        )

    def total(name: str) -> tuple[float, ...]:
        return tuple(map(sum, zip(*(getattr(one, name) for one in every), strict=True)))

    totals = {name: total(name) for name in ("tokens_per_depth", "candidates", "chosen", "foretold", "bits")}
    return Report(every[0].loop, sum(one.tokens for one in every), **totals)  # type: ignore[arg-type]


def _counts(route: Route) -> tuple[int, int, float, float]:
    """Of one recursion: candidates, chosen, foretold, bits; nan where nothing foretells them."""
    if route.logit is None:
        return int(route.candidates.sum()), int(route.chosen.sum()), math.nan, math.nan
    # What lies under padding may be anything, NaN as well.
    logit = route.logit.detach()[route.candidates].cpu().double()
    chosen = route.chosen[route.candidates].cpu()
    sure = logit.sigmoid()
    bits = torch.special.entr(sure) + torch.special.entr(1 - sure)
    foretold = int(((logit > 0) == chosen).sum())
    return len(logit), int(chosen.sum()), foretold, float(bits.sum()) / math.log(2.0)


def _routes(aux: Aux, loop: str | None) -> list[Route]:
    """The recursions of one loop, in order."""
    found = aux.routes
    known = list(dict.fromkeys(route.loop for route in found))
    if not known:
        raise InputError(
            "the module routes no tokens",
            expected="an Aux with routes",
            found=f"an Aux with {', '.join(aux.taps) or 'nothing'}",
            remedy='compile the model with a recipe that routes, for example "mor"',
        )
    if loop not in known and (loop is not None or len(known) > 1):
        raise InputError(
            "several loops route tokens" if loop is None else f"no loop {loop!r} routes tokens",
            expected=f"one of {', '.join(known)}",
            found="no name" if loop is None else loop,
            remedy=f"name the loop: loop={known[0]!r}",
        )
    return sorted((route for route in found if route.loop == (loop or known[0])), key=lambda route: route.recursion)


def _require_nested(routes: Sequence[Route]) -> None:
    for before, after in pairwise(routes):
        if bool((after.chosen & ~before.chosen).any()):
            raise InputError(
                f"recursion {after.recursion} of loop {after.loop} chose a token that the one before did not",
                expected="nested choices",
                remedy="use depth_of, or count the choices of aux.routes yourself",
            )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
