"""What the training experiment runs: variants, settings, and the runs that they make one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]  # results by the name of the run
MORE_RATES = 2  # at either end, where the best rate is the last one there


@dataclass(frozen=True)
class Variant:
    """One way to use the depth.

    Attributes:
        recipe: as text, with the place of the routers' seed.
        rate_of: the variant whose learning rate it takes; its own by default.
        topk: whether training selects by top-k, so that there are two ways to evaluate.
        depth: the share of the layers that its model has.
    """

    recipe: str
    rate_of: str = ""
    topk: bool = False
    depth: float = 1.0


# Routers start as published: linear, normal values of std 0.02, alpha 0.1 (mor), softmax with alpha 1 (mor_token).
_TIE = 'tie(loops=3, sharing="middle_cycle")'
VARIANTS = {
    "vanilla": Variant("identity"),
    "tied": Variant(_TIE, rate_of="vanilla"),
    "mor": Variant(f"{_TIE} | route(seed={{seed}})", topk=True),
    "mor_token": Variant(f"{_TIE} | tokenchoice(seed={{seed}})", rate_of="mor"),
    "mod": Variant("mod(predictor=True, seed={seed})", rate_of="mor", topk=True),
    # The published weight of the routers' loss, 0.001, is for trainings that are a hundred times longer.
    "mor_loss": Variant(f"{_TIE} | route(loss=0.1, seed={{seed}})", rate_of="mor", topk=True),
    "half": Variant("identity", rate_of="vanilla", depth=0.5),
    "stagger": Variant("stagger()", rate_of="vanilla"),
    "stagger_128": Variant("stagger(window=128)", rate_of="vanilla"),
    "stagger_1": Variant("stagger(window=1)", rate_of="vanilla"),
    "stagger_4": Variant("stagger(stacks=4)", rate_of="vanilla"),
    # The layers of the half model twice: as many as the vanilla model runs.
    "stagger_shared": Variant("stagger(shared=True)", rate_of="vanilla", depth=0.5),
    "altup": Variant('widen(embedding="recycled")', rate_of="vanilla"),
}


@dataclass(frozen=True)
class Settings:
    """The model, the batches and the budget; results of different settings do not go together.

    Attributes:
        tokens: how many a final run of the vanilla model reads; its operations are the budget of every final run.
        sweep: the share of that budget which a run that tries a learning rate gets.
        rates: the learning rates to try first.
        every: steps between two looks at the loss.
        windows: of held-out text, at most.
    """

    width: int = 256
    layers: int = 11
    heads: int = 4
    inner: int = 768
    context: int = 512
    batch: int = 64
    tokens: int = 100_000_000
    sweep: float = 0.25
    seeds: int = 2
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    more_rates: int = MORE_RATES
    every: int = 50
    windows: int = 2048

    @property
    def read(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.context


@dataclass(frozen=True)
class Study:
    """Variants that are compared with each other, and how many layers the vanilla one has."""

    variants: tuple[str, ...]
    layers: int


STUDIES = {
    "routing": Study(("vanilla", "tied", "mor", "mor_token", "mod", "mor_loss"), 11),
    "staggered": Study(
        ("vanilla", "half", "stagger", "stagger_128", "stagger_1", "stagger_4", "stagger_shared", "altup"), 12
    ),
}
TINY = Settings(
    width=32, layers=5, heads=2, inner=64, context=32, batch=4, tokens=1024, sweep=0.5, seeds=1, rates=(1e-3, 4e-3),
    more_rates=0, every=2, windows=8,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        share: of the budget.
    """

    variant: str
    seed: int
    rate: float
    share: float = 1.0

    @property
    def kind(self) -> str:
        """Whether it tries a rate or is reported."""
        return "final" if self.share == 1 else "sweep"

    @property
    def name(self) -> str:
        """Under which its result is kept; a final run has the rate that the sweep chose."""
        return f"{self.variant}, seed {self.seed}" if self.kind == "final" else f"{self.variant} at {self.rate:g}"


def runs(
    settings: Settings, rows: Rows, only: Collection[str] = STUDIES["routing"].variants, unknown: float | None = None
) -> Iterator[Run]:
    """All runs as far as they are known: the sweeps, then final runs of the variants whose rate is chosen.

    Runs of one variant follow each other, so that it is compiled once.

    Args:
        only: the variants.
        unknown: a rate for final runs of the others.
    """
    wanted = [name for name in VARIANTS if name in only]
    swept = list(dict.fromkeys(VARIANTS[name].rate_of or name for name in wanted))
    for name in swept:
        yield from sweep(name, settings, rows)
    for name in wanted:
        rate = best_rate(VARIANTS[name].rate_of or name, settings, rows)
        if (rate := unknown if rate is None else rate) is not None:
            yield from (Run(name, seed, rate) for seed in range(settings.seeds))


def sweep(variant: str, settings: Settings, rows: Rows) -> list[Run]:
    """The rates to try; while the best of them is the least or the greatest one, another one beyond it."""
    rates = sorted(settings.rates)
    for _ in range(2 * settings.more_rates):
        best = _best([_try(variant, rate, settings) for rate in rates], rows)
        if best == rates[0] and rates[0] > min(settings.rates) / 2**settings.more_rates:
            rates.insert(0, rates[0] / 2)
        elif best == rates[-1] and rates[-1] < max(settings.rates) * 2**settings.more_rates:
            rates.append(rates[-1] * 2)
    return [_try(variant, rate, settings) for rate in rates]


def best_rate(variant: str, settings: Settings, rows: Rows) -> float | None:
    """The rate with the least causal loss on the text for choosing; None while there are rates to try."""
    return _best(sweep(variant, settings, rows), rows)


def _try(variant: str, rate: float, settings: Settings) -> Run:
    return Run(variant, 0, rate, settings.sweep)


def _best(tried: list[Run], rows: Rows) -> float | None:
    if not all(run.name in rows for run in tried):
        return None
    losses = {run.rate: rows[run.name]["causal"]["bits"] for run in tried if "causal" in rows[run.name]}
    return min(losses, key=losses.__getitem__) if losses else None


def seconds_of(run: Run, budget: float, report: Mapping[str, Any], door: str, ready: bool = False) -> float | None:
    """How long a run will take, as far as results or measurements tell; None if nothing does.

    Args:
        budget: the operations of a final run.
        ready: whether the variant is compiled already.
    """
    own = [row for row in report["runs"].values() if row["variant"] == run.variant and "causal" in row]
    if own:
        speed, made, evaluated = own[-1]["flops"] / own[-1]["seconds"], own[0]["made"], own[-1]["evaluated"]
    else:
        speeds = [report["speed"].get(name, {}) for name in (run.variant, VARIANTS[run.variant].rate_of)]
        found = next((speed[door] for speed in speeds if door in speed), None)
        if found is None:
            return None
        speed, made, evaluated = found["flops_per_second"], found["made"], found["evaluated"]
    return float(run.share * budget / speed + evaluated + (0.0 if ready else made))
