"""What is measured of depth routing: the rows, the most important ones first, and what is asked of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

OURS = ("bodies", "whole")  # the ways in which depthc runs a region that makes a new stream
PLAIN = "without kernels"
ONE_IN_THREE, TWO_IN_THREE = 1 / 3, 2 / 3
MULTIPLE = 128  # tokens of a tile of the products
BOUNDED = ("choose", "combine", "combine in place")  # ops that are asked to be near their bytes
TRAINED = ("combine", "take", "gather_norm", "shared attention")  # ops with gradients


@dataclass(frozen=True)
class Asked:
    """The fastest of some variants takes at most so many times what a peer does.

    Example:
        >>> Asked(("bodies", "whole"), "dense", 1.03).answer({"dense": 2.0, "whole": 2.01})["ratio"]
        1.005
    """

    of: tuple[str, ...]
    peer: str
    most: float

    def answer(self, values: Mapping[str, float]) -> dict[str, Any]:
        """What was found, as it is kept; no ratio where a variant or the peer is missing."""
        best = min((name for name in self.of if name in values), key=values.__getitem__, default=None)
        known = best is not None and self.peer in values
        return asdict(self) | {"best": best, "ratio": values[best] / values[self.peer] if known else None}  # type: ignore[index]


@dataclass(frozen=True)
class Sizes:
    """A Llama-like layer and its batch."""

    width: int = 2048
    heads: int = 16
    key_heads: int = 8
    inner: int = 5632
    tokens: int = 2048
    batch: int = 16


SIZES = {2048: Sizes(), 960: Sizes(960, 15, 5, 2560), 4096: Sizes(4096, 32, 8, 14336)}
TINY = Sizes(width=32, heads=2, key_heads=1, inner=64, tokens=32, batch=2)


@dataclass(frozen=True)
class Row:
    """One row of the results; its name says all that it has beside the defaults.

    Attributes:
        kind: what is run: its module is named after it.
        capacity: the share of the tokens that the router chooses.
        multiple: what the number of chosen tokens is rounded to.
        layers: of the routed block.
        training: forward and backward, or forward alone.
        op: of a row that measures one op.
        limit: seconds that it may take, compilation included.
        rounds, least: samples of every variant in a run, and the seconds of each.
    """

    name: str
    kind: str
    sizes: Sizes = Sizes()
    capacity: float = 1.0
    multiple: int = 1
    layers: int = 1
    training: bool = False
    op: str = ""
    limit: int = 150
    rounds: int = 12
    least: float = 0.03
    asked: tuple[Asked, ...] = ()

    @property
    def chosen(self) -> int:
        """How many tokens of a row of the batch are chosen.

        Example:
            >>> [Row("", "", capacity=1 / 3, multiple=m).chosen for m in (1, 128)]
            [682, 640]
        """
        count = max(1, int(self.capacity * self.sizes.tokens))
        return count if self.multiple == 1 else max(self.multiple, round(count / self.multiple) * self.multiple)

    def described(self) -> dict[str, Any]:
        """Its settings as plain data."""
        return {name: value for name, value in asdict(self).items() if name != "asked"} | {"chosen": self.chosen}


def _layer(capacity: float, training: bool, layers: int = 1, multiple: int = 1) -> Row:
    share = {ONE_IN_THREE: "1/3", TWO_IN_THREE: "2/3"}.get(capacity, "1")
    ratios = {"1": 1.01, "2/3": 1.03, "1/3": 1.05} if training else {"1": 1.01, "2/3": 1.01, "1/3": 1.03}
    most = ratios[share] if layers == 1 else 1.01
    asked = [Asked(OURS if training else ("in place", *OURS), "dense", most)]
    if share == "1/3" and not training and layers == 1:
        asked.append(Asked(OURS, "dense", 1.06))
    name = f"{layers} {'layer' if layers == 1 else 'layers'}, {share}{f' by {multiple}' if multiple > 1 else ''}"
    name += ", training" if training else ", forward"
    limit = 150 if layers == 1 else 400
    return Row(name, "layer", Sizes(), capacity, multiple, layers, training, limit=limit, asked=tuple(asked))


def _graph(width: int, batch: int) -> Row:
    ours = ("in place", *OURS)
    asked = (Asked(ours, "dense + 25 us", 1.0), Asked(ours, "eager form, compiled", 1.0))
    sizes = replace(SIZES[width], batch=batch)
    return Row(f"graph, D={width}, B={batch}", "graph", sizes, ONE_IN_THREE, asked=asked)


def _shared(training: bool) -> Row:
    asked = (Asked(OURS, "closed form", 1.1), Asked(OURS, "all tokens", 1 / 2.5))
    name = f"share_first, 1/3, {'training' if training else 'forward'}"
    return Row(name, "shared", capacity=ONE_IN_THREE, training=training, asked=asked, limit=200)


def _tokens(training: bool) -> Row:
    asked = (Asked(OURS, "dense", 1.15),)
    return Row(f"token choice, {'training' if training else 'forward'}", "tokens", training=training, asked=asked)


def _whole() -> Row:
    memory = tuple(f"memory, {one}" for one in OURS)
    asked = tuple(Asked(OURS, f"{peer} by FLOPs", 1 / 0.95) for peer in ("vanilla", "dense"))
    asked += tuple(Asked(memory, f"memory, {peer}", 0.75) for peer in ("vanilla", "dense"))
    asked += (Asked(OURS, "eager", 0.5),)
    return Row("MoR-3", "whole", SIZES[960], layers=32, training=True, limit=500, rounds=6, asked=asked)


def _op(op: str, capacity: float = ONE_IN_THREE, training: bool = False) -> Row:
    near = Asked(("kernel", "kernel, compiled"), "floor", 1.5)
    name = f"op, {op}, {'1/3' if capacity == ONE_IN_THREE else '2/3'}{', training' if training else ''}"
    asked = (near,) if op in BOUNDED and not training else ()
    return Row(name, "op", capacity=capacity, training=training, op=op, asked=asked)


def _rows() -> Iterator[Row]:
    capacities = (ONE_IN_THREE, TWO_IN_THREE, 1.0)
    yield from (_layer(capacity, training) for capacity in capacities for training in (False, True))
    yield _whole()
    yield from map(_shared, (False, True))
    yield from map(_op, BOUNDED)
    yield from (_graph(width, batch) for batch in (1, 4) for width in SIZES)
    yield Row("graph, a training step", "step", replace(SIZES[960], batch=2), layers=5, training=True)
    yield from (_layer(c, training, layers=8) for c in capacities[:2] for training in (False, True))
    yield from map(_tokens, (False, True))
    yield from (_layer(c, training, multiple=MULTIPLE) for c in capacities[:2] for training in (False, True))
    yield from map(_op, ("shared attention", "select", "take", "gather_norm"))
    yield from (_op(op, training=True) for op in TRAINED)
    yield from (_op(op, TWO_IN_THREE) for op in BOUNDED)
    yield from (_graph(width, batch) for batch in (2, 3) for width in SIZES)
    yield _layer(1.0, False, layers=8)
    yield _layer(1.0, True, layers=8)


ROWS = {row.name: row for row in _rows()}


def tiny(row: Row) -> Row:
    """The same row of a size for a rehearsal."""
    layers = {"layer": min(row.layers, 2), "whole": 5}.get(row.kind, row.layers)
    return replace(row, sizes=TINY, layers=layers, multiple=min(row.multiple, 8), rounds=2, least=0.0)
