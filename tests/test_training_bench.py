"""The training experiment in small: its corpus, equal operations, resumption, and every variant from end to end."""

from __future__ import annotations

import argparse
import io
import json
import math
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import corpus
import pages_training
import pytest
import torch
import training
import training_experiment
from rich.console import Console
from training_eval import Routing, judged, windows
from training_experiment import Experiment
from training_model import Cost, Maker, llama, loss_of
from training_plan import STUDIES, TINY, VARIANTS, Run, Settings, best_rate, runs, seconds_of, sweep
from training_report import Results, SettingsError
from training_run import Trainer, schedule, thinned

from depthc.codegen.aux import Aux
from depthc.ir.tokens import TokenSet

FILES = {f"pkg/{i % 60}/{i}.py": f"def f{i}(x):\n    return x * {i} + {i**3}\n".encode() * 9 for i in range(300)}


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker(TINY, "cpu")


@pytest.fixture
def data() -> bytes:
    return corpus.packed(corpus.chosen(FILES, 10**6))


# the corpus


def test_corpus_is_the_same_whatever_the_order_of_files(data: bytes) -> None:
    again = corpus.packed(corpus.chosen(dict(reversed(FILES.items())), 10**6))
    assert again == data
    assert corpus.split(data).sha256 == corpus.split(again).sha256


def test_folders_are_held_out_whole(data: bytes) -> None:
    parts = corpus.split(data)
    folders = {}
    for name in ("train", "choice", "report"):
        text = getattr(parts, name)
        folders[name] = {file.partition(b"\n")[0].rpartition(b"/")[0] for file in text.split(b"\0")[1:]}
    assert all(folders.values())
    assert not folders["train"] & folders["choice"] | folders["train"] & folders["report"]
    assert not folders["choice"] & folders["report"]
    assert sum(len(getattr(parts, name)) for name in folders) == len(data)


def test_corpus_has_no_text_twice_and_keeps_its_size() -> None:
    files = FILES | {f"copy/{n}": text for n, text in FILES.items()} | {"empty.py": b"", "binary.py": b"a\0b"}
    assert len(corpus.chosen(files, 10**7)) == len(FILES)
    few = corpus.packed(corpus.chosen(files, 9000))
    assert 8000 < len(few) <= 9000


def test_another_corpus_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "corpus.bin"
    with pytest.raises(
        corpus.CorpusError, match=r"there is no corpus\n  where: .*corpus.bin\n.*\n.*\n  remedy: make it"
    ):
        corpus.read(path, "0" * 64)
    path.write_bytes(data)
    own = corpus.split(data).sha256
    with pytest.raises(
        corpus.CorpusError, match=f"(?s)another one.*expected: sha256 000.*found: sha256 {own}.*--sha256"
    ):
        corpus.read(path, "0" * 64)
    assert corpus.read(path, own).train == corpus.split(data).train


@pytest.mark.slow
def test_recorded_corpus_can_be_made_again() -> None:
    record = json.loads(corpus.RECORD.read_text())
    if any(version(name) != found for name, found in record["distributions"].items()):
        pytest.skip(f"made of {record['distributions']}")
    files = {path: text for name in corpus.DISTRIBUTIONS for path, text in corpus.sources(name).items()}
    assert corpus.described(corpus.packed(corpus.chosen(files, 36 * 10**6)), record["distributions"]) == record


# the plan


def rows_of(losses: dict[float, float | None], variant: str = "mor") -> dict[str, Any]:
    """Results of a sweep; None for a run that failed."""
    made = {Run(variant, 0, rate, 0.25).name: bits for rate, bits in losses.items()}
    return {n: {"failed": "nan"} if bits is None else {"causal": {"bits": bits}} for n, bits in made.items()}


def test_a_sweep_goes_on_until_the_best_rate_is_inside() -> None:
    found = rows_of({1e-3: 1.0, 2e-3: 0.9, 4e-3: 0.8, 8e-3: 0.7})
    assert [run.rate for run in sweep("mor", Settings(), found)][-1] == 16e-3
    assert best_rate("mor", Settings(), found) is None
    assert best_rate("mor", Settings(), found | rows_of({16e-3: None})) == 8e-3
    inside = rows_of({1e-3: 1.0, 2e-3: 0.6, 4e-3: 0.8, 8e-3: 0.9})
    assert len(sweep("mor", Settings(), inside)) == 4
    assert best_rate("mor", Settings(), inside) == 2e-3


def test_a_sweep_ends() -> None:
    settings, losses = Settings(), dict.fromkeys(Settings().rates, 1.0)
    for _ in range(9):  # the least rate is always the best one
        losses |= {run.rate: run.rate for run in sweep("mor", settings, rows_of(losses))}
    assert sorted(losses) == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    assert best_rate("mor", settings, rows_of(losses)) == 2.5e-4


def test_final_runs_take_the_rate_of_their_sweep() -> None:
    found = rows_of({1e-3: 0.9, 2e-3: 0.6, 4e-3: 0.8, 8e-3: 0.9}, "vanilla")
    planned = [run for run in runs(Settings(), found) if run.kind == "final"]
    assert [run.name for run in planned] == [f"{name}, seed {seed}" for name in ("vanilla", "tied") for seed in (0, 1)]
    assert {run.rate for run in planned} == {2e-3}
    assert {run.variant for run in runs(Settings(), {}, ["tied"])} == {"vanilla"}


def test_seconds_are_foretold_by_results_then_by_measurements() -> None:
    run = Run("mor_token", 0, 1e-3, 0.5)
    speed = {"mor": {"eager": {"flops_per_second": 10.0, "made": 3.0, "evaluated": 1.0}}}
    assert seconds_of(run, 100.0, {"runs": {}, "speed": {}}, "eager") is None
    assert seconds_of(run, 100.0, {"runs": {}, "speed": speed}, "eager") == 9.0
    row = {"variant": "mor_token", "causal": {}, "flops": 20.0, "seconds": 4.0, "made": 1.5, "evaluated": 0.5}
    known = {"runs": {"x": row}, "speed": speed}
    assert [seconds_of(run, 100.0, known, "eager", ready) for ready in (False, True)] == [12.0, 10.5]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    Results(path, TINY, "a", "cpu").speed("mor", "eager", {})
    Results(path, replace(TINY, tokens=7), "a", "cpu").keep("mor, seed 0", {"bits": 1})  # measured before it is settled
    with pytest.raises(SettingsError, match=r"expected: tokens=7\n  found: tokens=1024\n"):
        Results(path, TINY, "a", "cpu")
    with pytest.raises(SettingsError, match="expected: corpus=a"):
        Results(path, replace(TINY, tokens=7), "b", "cpu")
    assert Results(path, replace(TINY, tokens=7), "a", "cpu").rows == {"mor, seed 0": {"bits": 1}}


# a training


def trainer(maker: Maker, variant: str, checkpoint: Path, data: bytes, budget: float = 1e9) -> Trainer:
    text = torch.frombuffer(bytearray(corpus.split(data).train), dtype=torch.uint8)
    module, _ = maker.module(variant, 0)
    return Trainer(Run(variant, 0, 3e-3), module, text, TINY, budget, checkpoint)


def test_the_rate_rises_and_falls_over_the_budget() -> None:
    rates = [schedule(share / 100) for share in range(101)]
    assert 0 < rates[0] < 0.05
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[100] == pytest.approx(0.0, abs=1e-9)
    assert thinned(list(range(61)), 20) == list(range(0, 61, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["mor", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("vanilla", "mor_token"))]
)
def test_resumed_is_as_uninterrupted(maker: Maker, tmp_path: Path, data: bytes, variant: str) -> None:
    whole = trainer(maker, variant, tmp_path / "none.pt", data, 1.2e9 / 4)
    assert whole.train(lambda: False, lambda *_: None)
    weights = {name: p.detach().clone() for name, p in whole.module.named_parameters()}
    stops = 0
    while True:
        part = trainer(maker, variant, tmp_path / "part.pt", data, 1.2e9 / 4)
        if part.train(lambda: True, lambda *_: None):
            break
        stops += 1
    assert stops >= 2
    assert part.state.curve == whole.state.curve
    assert (part.state.step, part.state.spent) == (whole.state.step, whole.state.spent)
    for name, parameter in part.module.named_parameters():
        assert torch.equal(parameter, weights[name]), name


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_not_taken(maker: Maker, tmp_path: Path, data: bytes) -> None:
    assert not trainer(maker, "vanilla", tmp_path / "one.pt", data).train(lambda: True, lambda *_: None)
    assert trainer(maker, "vanilla", tmp_path / "one.pt", data).state.step == TINY.every
    assert trainer(maker, "vanilla", tmp_path / "one.pt", data, 2e9).state.step == 0


@pytest.mark.slow
def test_variants_of_a_seed_begin_alike_and_read_the_same(maker: Maker, tmp_path: Path, data: bytes) -> None:
    first = trainer(maker, "mor", tmp_path / "a.pt", data)
    drawn = first.batches.next()
    before = {name: p.detach().clone() for name, p in first.module.named_parameters()}
    first.train(lambda: True, lambda *_: None)
    again = trainer(maker, "mor", tmp_path / "b.pt", data)  # the same module, with its first weights
    assert torch.equal(again.batches.next(), drawn)
    assert all(torch.equal(p, before[name]) for name, p in again.module.named_parameters())
    other = {name: p.detach().clone() for name, p in maker.module("mor", 1)[0].named_parameters()}
    assert not any(torch.equal(p, before[name]) for name, p in other.items() if p.dim() > 1 or "router" in name)


@pytest.mark.slow
def test_a_step_of_token_choice_costs_what_tokens_chose(maker: Maker, data: bytes) -> None:
    module, _ = maker.module("mor_token", 0)
    cost = Cost(module.program, TINY)
    aux = loss_of(module, torch.randint(256, (TINY.batch, TINY.context)), "cpu")[2]
    spent = cost.spent(aux).item()
    width, inner = TINY.width, TINY.inner

    def layer(tokens: int) -> int:
        """Projections, the pairs of a causal mask, and the gated layer."""
        return 8 * tokens * width**2 + 2 * tokens * (tokens + 1) * width + 6 * tokens * width * inner

    everyone = TINY.batch * (2 * layer(TINY.context) + 2 * TINY.context * (256 + 3) * width)
    sizes = [route.chosen.sum(1).tolist() for route in aux.routes]
    # Of rotary positions, for every row: a product in some versions of transformers.
    tables = TINY.batch * TINY.context * width // TINY.heads
    chosen = sum(layer(tokens) for rows in sizes for tokens in rows)
    assert spent - 3 * (everyone + chosen) in (0, 3 * tables)
    assert spent < cost.most


# what came out


@pytest.mark.slow
def test_bits_are_those_of_the_model_on_windows_of_the_text(maker: Maker, data: bytes) -> None:
    text = torch.frombuffer(bytearray(corpus.split(data).report), dtype=torch.uint8)
    rows = windows(text, TINY)
    assert rows.shape == (TINY.windows, TINY.context)
    assert torch.equal(rows[1], text.view(-1)[: len(text) // 32 * 32].view(-1, 32)[-(-(len(text) // 32) // 8)])
    found = judged(maker.module("vanilla", 0)[0], "vanilla", text, TINY)["causal"]
    with torch.no_grad():
        logits = llama(TINY, 0).eval()(input_ids=rows.long()).logits
    each = torch.nn.functional.cross_entropy(logits[:, :-1].mT, rows[:, 1:].long(), reduction="none").mean(1)
    assert found["bits"] == pytest.approx(each.mean().item() / math.log(2), rel=1e-5)
    assert found["error"] == pytest.approx(each.std().item() / math.log(2) / math.sqrt(8), rel=1e-3)


def test_routes_of_layers_that_choose_apart_are_counted() -> None:
    def route(layer: int, logit: list[list[float]], chosen: list[list[int]]) -> dict[str, Any]:
        sets = {"candidates": [[1, 1, 1]] * 2, "chosen": chosen}
        taps: dict[str, Any] = {name: TokenSet(torch.tensor(rows).bool()) for name, rows in sets.items()}
        return {f"route.mod.{layer}.{name}": tap for name, tap in (taps | {"logit": torch.tensor(logit)}).items()}

    first = route(1, [[1.0, -1, -1], [1, 1, -1]], [[1, 0, 0], [1, 0, 0]])
    second = route(3, [[1.0, -1, -1], [-1, -1, 1]], [[1, 0, 0], [0, 1, 0]])
    routing = Routing()
    routing.add(Aux(first | second))
    assert routing.numbers() == {
        "depths": pytest.approx([3 / 6, 2 / 6, 1 / 6]),
        "dead": pytest.approx(3 / 6),
        "dead_positions": pytest.approx(1 / 3),
        "chosen": pytest.approx([2 / 6, 2 / 6]),
        "accuracy": pytest.approx([5 / 6, 4 / 6]),
    }


# from end to end


@pytest.fixture
def one_capture(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_experiment, "Maker", lambda *_: maker)


def experiment(tmp_path: Path, data: bytes) -> Experiment:
    options = argparse.Namespace(
        device="cpu",
        eager=True,
        beside=False,
        compiled_only=False,
        checkpoints=tmp_path / "checkpoints",
        limit=1e6,
        only=["mor"],
    )
    results = Results(tmp_path / "training.json", TINY, "x", "cpu")
    return Experiment(results, corpus.split(data), options, Console(file=io.StringIO()))


@pytest.mark.thorough
@pytest.mark.usefixtures("one_capture")
def test_a_call_that_is_out_of_time_is_gone_on_with(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = experiment(tmp_path, data)
    assert one.all() == 0
    whole, one.results = one.results.rows, Results(tmp_path / "again.json", TINY, "x", "cpu")
    assert one.measure() == 0
    assert one.results.report["speed"].keys() == {"mor"}
    one.options.limit = 0.0
    assert one.measure() == 0  # there is nothing left to measure
    one.results.report["speed"].clear()
    assert one.measure() == 3
    monkeypatch.setattr(training_experiment, "seconds_of", lambda *_: None)  # begin, whatever it takes
    calls = 0
    while one.all() == 3:
        calls += 1
    assert calls > len(whole)
    assert one.results.rows.keys() == whole.keys()
    for name, row in one.results.rows.items():
        same = ("curve", "causal", "flops", "steps", *(["topk"] if "topk" in row else []))
        assert [row[key] for key in same] == [whole[name][key] for key in same]
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_capture")
def test_a_run_that_does_not_fit_is_not_begun_and_one_that_fails_is_a_result(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = experiment(tmp_path, data)
    monkeypatch.setattr(training_experiment, "seconds_of", lambda *_: 1e9)
    assert one.all() == 3
    assert "run this again" in one.console.file.getvalue()  # type: ignore[attr-defined]

    def fail(*_: Any) -> bool:
        raise FloatingPointError("the loss is not a number at step 2")

    monkeypatch.setattr(Trainer, "train", fail)
    monkeypatch.setattr(training_experiment, "seconds_of", lambda *_: None)
    for _ in TINY.rates:
        assert one.all() == 1
    assert one.all() == 0  # and no final run without a rate
    assert {row["failed"] for row in one.results.rows.values()} == {
        "FloatingPointError: the loss is not a number at step 2"
    }
    assert "Runs that failed:" in pages_training.training(one.results.report)


@pytest.mark.thorough
@pytest.mark.usefixtures("one_capture")
def test_every_variant_in_small(tmp_path: Path, data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "corpus.bin"
    path.write_bytes(data)
    out = ["--out", str(tmp_path), "--checkpoints", str(tmp_path), "--device", "cpu", "--eager"]
    command = ["--corpus", str(path), "--sha256", corpus.split(data).sha256, "--tiny", *out]
    assert training.main([*command, "--measure", "--only", "mor"]) == 0
    capsys.readouterr()
    assert training.main([*command, "--plan"]) == 0
    planned = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in planned[:-1]] == [
        *(f"{name} at {rate:g}" for name in ("vanilla", "mor") for rate in TINY.rates),
        *(f"{name}, seed 0" for name in STUDIES["routing"].variants),
    ]
    assert training.main(command) == 0
    capsys.readouterr()
    assert training.main([*command, "--plan"]) == 0
    assert capsys.readouterr().out.startswith("0.001024 million bytes: in all 0 s")
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["speed"]["mor"]["eager"]["tokens_per_second"] > 0
    assert report["runs"].keys() == {f"{name} at {rate:g}" for name in ("vanilla", "mor") for rate in TINY.rates} | {
        f"{name}, seed 0" for name in STUDIES["routing"].variants
    }
    finals = {row["variant"]: row for row in report["runs"].values() if row["kind"] == "final"}
    for name, row in finals.items():
        assert abs(row["flops"] - row["budget"]) <= 0.51 * row["flops"] / row["steps"], name
        assert row["budget"] == finals["vanilla"]["budget"]
        assert 0 < row["causal"]["bits"] < 8
        assert ("topk" in row) == VARIANTS[name].topk
    assert finals["vanilla"]["flops"] == pytest.approx(finals["vanilla"]["flops_per_token"] * TINY.tokens)
    sizes = {name: row["parameters"] for name, row in finals.items()}
    assert sizes["mor"]["unique"] == sizes["tied"]["unique"] + 3 * TINY.width
    assert sizes["tied"]["applied"] == sizes["vanilla"]["applied"]
    assert finals["mor"]["topk"]["dead"] == pytest.approx(11 / 32)
    assert finals["mod"]["topk"]["chosen"] == [4 / 32, 4 / 32]
    tables = pages_training.training(report)
    assert f"| mor | {sizes['mor']['unique']:,} | {sizes['mor']['applied']:,} |" in tables


@pytest.mark.thorough
def test_staggered_variants_in_small(tmp_path: Path, data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "corpus.bin"
    path.write_bytes(data)
    out = ["--out", str(tmp_path), "--checkpoints", str(tmp_path), "--device", "cpu", "--eager"]
    command = ["--corpus", str(path), "--sha256", corpus.split(data).sha256, "--tiny", "--study", "staggered", *out]
    assert training.main(command) == 0
    capsys.readouterr()
    rows = json.loads((tmp_path / "training.json").read_text())["runs"]
    finals = {row["variant"]: row for row in rows.values() if row["kind"] == "final"}
    assert finals.keys() == {*STUDIES["staggered"].variants}
    assert not [row for row in rows.values() if "failed" in row]
    sizes = {name: row["parameters"]["unique"] for name, row in finals.items()}
    assert sizes["half"] < sizes["stagger_shared"] < sizes["vanilla"] < sizes["stagger"] < sizes["stagger_4"]
    assert sizes["stagger"] == sizes["stagger_1"] == sizes["stagger_128"]
