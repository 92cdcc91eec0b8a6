"""The measurements of depth routing in small: what is asked and how low it can go, turns, failures, resumption."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pages_routing
import pytest
import routing
import routing_op
import routing_time
import routing_tokens
import torch
from routing_layer import RECIPE, least, operations, share_of
from routing_layers import Layers, routed
from routing_ops import OPS, inputs_of
from routing_plan import ROWS, TINY, Asked, Row, tiny
from routing_race import BYTES, FLOPS, Race, judged
from routing_region import HALF, Region, ready, routed_by, stream_of
from routing_time import Clock, Place, Ready, Skip
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from turns import Turns

import depthc
from depthc.codegen.module import DepthModule
from depthc.ir.program import Program

HERE = Place("cpu", "eager")
QUICK = Clock(HERE, rounds=2, least=0.0)


# what is measured


def test_rows_begin_with_the_routed_layer_and_the_whole_model() -> None:
    names = list(ROWS)
    assert names[:2] == ["1 layer, 1/3, forward", "1 layer, 1/3, training"]
    assert names[6] == "MoR-3"
    assert {row.kind for row in ROWS.values()} == {"layer", "whole", "shared", "op", "graph", "step", "tokens"}
    assert max(row.limit for row in ROWS.values()) <= 560  # a call has ten minutes


def test_chosen_tokens() -> None:
    counts = {name: row.chosen for name, row in ROWS.items()}
    assert [counts[f"1 layer, {share}, forward"] for share in ("1/3", "2/3", "1")] == [682, 1365, 2048]
    assert [counts[f"1 layer, {share} by 128, forward"] for share in ("1/3", "2/3")] == [640, 1408]
    assert share_of(ROWS["1 layer, 1/3, forward"]) == 682 / 2048


def test_what_is_asked() -> None:
    asked = ROWS["1 layer, 1/3, forward"].asked
    assert [(one.of, one.peer, one.most) for one in asked] == [
        (("in place", "bodies", "whole"), "dense", 1.03),
        (("bodies", "whole"), "dense", 1.06),
    ]
    assert asked[0].answer({"dense": 2.0, "bodies": 2.2, "whole": 2.1})["ratio"] == 1.05
    assert asked[0].answer({"dense": 2.0, "bodies": 2.2, "whole": 2.1})["best"] == "whole"
    assert asked[0].answer({"bodies": 2.2})["ratio"] is None
    assert asked[0].answer({"dense": 2.0})["best"] is None


# floors


def region(row: Row) -> tuple[Program, DepthModule, Tensor]:
    """Captured layers, what depthc made of them, and a stream."""
    torch.manual_seed(0)
    stack, h = Layers(row.sizes, row.layers + 1).to(HALF), stream_of(row, "cpu")
    captured = depthc.capture(stack, (h,))
    return captured, routed_by(RECIPE.format(share=share_of(row)), captured, row.training), h


@pytest.mark.slow
def test_floor_of_a_region() -> None:
    """2 rows of 32 tokens of 32 features, 2 heads and 1 key head of 16, 64 inner ones; 10 tokens a row are chosen."""
    row = tiny(ROWS["1 layer, 1/3, forward"])
    captured, module, _ = region(row)
    products = 2 * 20 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)
    pairs = 2 * (10 * 11 // 2)
    assert operations(row, captured, module.program) == products + 4 * pairs * 32
    found = least(row, products + 4 * pairs * 32)
    stream, rows = 64 * 32 * 2, 20 * 32 * 2
    assert found["moved"] == stream + 9 * 64 + 9 * 20 + 3 * rows + 16 * 20
    assert found["floor"] == pytest.approx(found["flops"] / 790e12 + found["moved"] / 4.3e12)
    trained = least(tiny(ROWS["1 layer, 1/3, training"]), 1.0)
    assert trained["flops"] == 3.0
    assert trained["moved"] == 6 * stream + 5 * rows + 13 * 64 + 13 * 20


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [
        ("choose", 64 * 64 + 9 * 64 + 9 * 20, 0),
        ("select", 9 * 64 + 9 * 20, 0),
        ("take", 2 * 20 * 64 + 8 * 20, 84 * 64 + 4 * 64),
        ("combine", (2 * 64 + 20) * 64 + 4 * 64 + 4 * 20, 3 * 20 * 64),
        ("combine in place", 3 * 20 * 64 + 16 * 20, 0),
        ("gather_norm", 3 * 20 * 64 + 12 * 20, 64 * 64 + 3 * 20 * 64 + 12 * 20),
        (
            "shared attention",
            2 * 2 * 16 * (20 * 2 + 64) + 4 * 40 + 8 * 20,
            4 * 2 * 16 * (20 * 2 + 64) + 4 * 40 + 8 * 20,
        ),
    ],
)
def test_bytes_of_an_op(op: str, forward: int, backward: int) -> None:
    """64 tokens and 20 rows of 64 bytes."""
    x = inputs_of(TINY, 10, "cpu", 0)
    assert OPS[op].least(x, False)[1] == forward
    assert OPS[op].least(x, True)[1] == forward + backward


def test_operations_of_shared_attention() -> None:
    x = inputs_of(TINY, 10, "cpu", 0)
    pairs = sum(int(position) + 1 for position in x.positions.flatten())
    assert OPS["shared attention"].least(x, True)[0] == 14 * pairs * 2 * 16


# by hand


def test_routing_by_hand_is_its_formula() -> None:
    row = tiny(ROWS["1 layer, 1/3, forward"])
    torch.manual_seed(0)
    stack, h = Layers(row.sizes, 1).double(), torch.randn(2, 32, 32).double()
    router, (cos, sin) = torch.randn(32), stack.tables(h)
    with torch.no_grad():
        found = routed(stack.layers, router, 10, h, cos, sin)
        for b in range(2):
            logit = h[b].float() @ router
            chosen = sorted(logit.argsort(descending=True)[:10].tolist())
            rows = stack.layers[0](h[b : b + 1, chosen], cos[chosen], sin[chosen])[0].float()
            for t in range(32):
                y = rows[chosen.index(t)] * 0.1 * logit[t].sigmoid() if t in chosen else 0.0
                torch.testing.assert_close(found[b, t], h[b, t] + y, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_region_is_what_the_module_runs_in_place_or_not() -> None:
    _, module, h = region(tiny(ROWS["1 layer, 1/3, forward"]))
    one = Region(module, h)
    with torch.no_grad():
        whole, stream = module(h), one.stream.clone()
        assert torch.equal(one(one.stream), whole)
        assert torch.equal(one.stream, stream)
        assert torch.equal(one.in_place(stream), whole)


def test_training_gives_the_gradient_of_the_input() -> None:
    x, weight = torch.randn(2, 3), torch.randn(3, requires_grad=True)
    first = ready(lambda h: h * weight, x, [weight], True).run()
    upstream = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(first, upstream * weight.detach())
    assert not ready(lambda h: h * weight, x, [weight], False).run().requires_grad


def packed_attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *_: Any, **__: Any) -> Tensor:
    """Sequence by sequence, as the kernel that needs a GPU has it: [members, heads, features]."""
    parts = []
    for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        own = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
        parts.append(scaled_dot_product_attention(*own, is_causal=True)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.slow
def test_packing_by_hand_is_what_depthc_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", packed_attention)
    torch.manual_seed(0)
    row = tiny(ROWS["token choice, forward"])
    stack, ids = Layers(row.sizes, 3, 512).to(HALF).eval(), torch.randint(512, (2, 32))
    module = routed_by(routing_tokens.RECIPE, depthc.capture(stack, (ids,)), training=False)
    choice = routing_tokens.Choice(row, HERE, stack, module, ids)
    with torch.no_grad():
        found, expected = choice._by_hand(routing_tokens._packed, ids), module(ids)
    assert (found - expected).norm() < 0.01 * expected.norm()


# turns


def test_variants_take_turns_twice_over() -> None:
    seen: list[str] = []
    made = {name: (lambda name=name: Ready(lambda: seen.append(name))) for name in "abc"}
    race = Race(QUICK).run(made)
    turns = 2 * QUICK.rounds
    orders = ["".join(seen[-3 * n :][:3]) for n in range(1, turns + 1)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1  # what is cool before it is not always the same
    assert {name: len(runs) for name, runs in race.times.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_sample_lasts_and_resets_what_is_written_over() -> None:
    x, resets = torch.zeros(()), []
    one = Ready(lambda: x.add_(1), lambda: resets.append(float(x)) or x.zero_())
    clock = Clock(HERE, rounds=1, least=1.0, each=2)
    assert clock.calls(one) == 30  # at most
    clock.sample(one, 5)
    assert float(x) == 5
    assert len(resets) == 2


def test_what_fails_is_a_result_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Ready:
        raise RuntimeError("out of memory\n  and so on")

    def absent() -> Ready:
        raise Skip("no such kernel here")

    made = {name: (lambda x=x: Ready(lambda: x)) for name, x in {"eager": 1.0, "near": 1.01, "far": 1.2}.items()}
    made = {name: (lambda make=make: _tensor(make())) for name, make in made.items()}
    race = Race(QUICK).run({"broken": broken, "absent": absent, **made})
    row = judged(race, [Asked(("near",), "eager", 2.0)], flops=1.0, moved=1.0, floor=1e-9, choices="a\nb")
    assert row["failures"] == {
        "broken": "RuntimeError: out of memory and so on",
        "far": "its result is 0.2 off that of 'eager'",
    }
    assert row["skipped"] == {"absent": "no such kernel here"}
    assert row["error"] == {"near": pytest.approx(0.01)}
    assert row["times"].keys() == {"eager", "near", "far"}
    assert row["ratios"]["near"]["near"] == 1.0
    assert row["choices"] == ["a", "b"]
    assert row["percent_of_floor"] == {}  # this is no H200
    late = Race(Clock(HERE, 1, 0.0, until=-math.inf)).run(made)
    assert late.skipped["near"] == "the time of this row was gone before it was made"


def test_a_variant_that_fails_while_it_is_timed_is_left_out() -> None:
    left = iter(range(5))
    race = Race(QUICK).run({"a": lambda: Ready(lambda: None), "b": lambda: Ready(lambda: next(left))})
    assert race.times.keys() == {"a"}
    assert race.failed == {"b": "StopIteration: "}


def _tensor(one: Ready) -> Ready:
    return Ready(lambda: torch.tensor(one.run()))


def test_a_result_that_is_no_number_has_failed() -> None:
    race = Race(QUICK, found={"eager": torch.ones(2), "kernel": torch.full((2,), torch.nan)})
    assert race.errors("eager") == {}
    assert race.failed == {"kernel": "its result is nan off that of 'eager'"}


# the command


class Rows:
    """In place of processes: rows that fail as they are told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
        self.ran: list[str] = []
        self.answers: dict[str, dict[str, Any]] = {}
        self.out = out
        monkeypatch.setattr(routing, "in_a_process", self.process)

    def process(self, script: str, arguments: list[str], limit: int, fresh: bool) -> dict[str, Any]:
        name = arguments[arguments.index("--row") + 1]
        assert Path(script).name == "routing.py"
        assert "--tiny" in arguments
        assert not fresh
        self.ran.append(name)
        return self.answers.get(name, {"times": {}, "failures": {}, "asked": []})

    def call(self, *options: str) -> int:
        self.ran.clear()
        return routing.main(["--tiny", "--device", "cpu", "--out", str(self.out), *options])


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rows:
    return Rows(monkeypatch, tmp_path / "new" / "routing.json")


def test_rows_that_are_done_are_not_run_again(rows: Rows) -> None:
    assert rows.call("--only", "MoR-3", "op, select") == 0
    assert rows.ran == ["MoR-3", "op, select, 1/3"]
    assert rows.call("--only", "MoR-3") == 0
    assert rows.ran == []
    assert rows.call("--only", "op, combine, 1/3", "MoR") == 0
    assert rows.ran == ["op, combine, 1/3"]
    assert rows.call("--limit", "1e6") == 0
    assert len(rows.ran) == len(ROWS) - 3
    report = json.loads(rows.out.read_text())
    assert report["rows"].keys() == ROWS.keys()
    assert report["floors"] == {"flops_per_second": FLOPS, "bytes_per_second": BYTES}
    assert report["versions"]["torch"] == torch.__version__
    settings = report["rows"]["MoR-3"]["settings"]
    assert (settings["kind"], settings["layers"], settings["chosen"]) == ("whole", 5, 32)


def test_a_row_that_does_not_fit_is_not_begun(rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    assert rows.call("--only", "MoR-3", "--limit", "499") == 3
    assert rows.ran == []
    assert "MoR-3 may take 500 s and 499 s are left: run this again" in capsys.readouterr().out
    assert rows.call("--only", "MoR-3", "--limit", "501") == 0
    assert rows.call("--plan", "--only", "op, select", "MoR") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "op, select, 1/3: at most 150 s"


def test_failures_are_kept_and_run_again_on_demand(rows: Rows) -> None:
    names = ["MoR-3", "token choice, forward"]
    rows.answers[names[0]] = {"failed": "no message"}
    rows.answers[names[1]] = {"times": {}, "failures": {"bodies": "OutOfMemoryError: 1"}, "asked": []}
    assert rows.call("--only", *names, "op, select") == 1
    assert len(rows.ran) == 3
    assert rows.call("--only", *names, "op, select") == 1
    assert rows.ran == []
    assert rows.call("--only", "op, select") == 0  # of what is asked for, none failed
    del rows.answers[names[0]]
    assert rows.call("--only", *names, "op, select", "--retry") == 1
    assert rows.ran == names
    rows.answers.clear()
    assert rows.call("--only", *names, "--retry") == 0
    assert rows.ran == names[1:]


def test_a_row_that_the_call_had_no_time_for_is_none(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows.call("--only", "1 layer, 1/3, forward") == 0
    monkeypatch.setattr(routing, "in_a_process", lambda *_, **__: {"failed": "not done after 0 s"})
    monkeypatch.setattr(routing.Results, "expected", lambda *_: 0.0)
    assert rows.call("--only", "1 layer, 2/3, forward", "--limit", "0.5") == 3
    assert "1 layer, 2/3, forward" not in json.loads(rows.out.read_text())["rows"]


def test_rows_get_ready_side_by_side(rows: Rows) -> None:
    """Those who do not fit into the time are left out; the rest is done, each told where the turns are kept."""
    turns: list[str] = []

    def process(script: str, arguments: list[str], limit: int, fresh: bool) -> dict[str, Any]:
        turns.append(arguments[arguments.index("--turns") + 1])
        return rows.process(script, arguments, limit, fresh) | {"waited": 1e6}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "in_a_process", process)
        assert rows.call("--only", "MoR-3", "op, select", "op, take", "--limit", "200", "--jobs", "2") == 3
    assert sorted(rows.ran) == ["op, select, 1/3", "op, take, 1/3", "op, take, 1/3, training"]
    assert len(turns) == 3
    assert len(set(turns)) == 1
    found = json.loads(rows.out.read_text())["rows"]
    assert all(row["seconds"] < 0 and "waited" not in row for row in found.values())  # waiting is no part of a row


def test_whoever_is_timed_is_alone(tmp_path: Path) -> None:
    """It waits for those inside, and those who come later wait for it."""
    inside, timed, later = (Turns(tmp_path / "device") for _ in range(3))
    seen: list[str] = []

    def alone() -> None:
        with timed.alone():
            time.sleep(0.2)
            seen.append("alone")

    def beside() -> None:
        later.beside()
        seen.append("later")

    inside.beside()
    threads = [threading.Thread(target=one, daemon=True) for one in (alone, beside)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    assert seen == []
    inside.beside()  # lets the others go first
    seen.append("inside")
    for thread in threads:
        thread.join()
    assert seen[0] == "alone"
    assert min(one.waited for one in (inside, timed, later)) > 0.1
    for one in (inside, timed, later):
        one.close()


def test_results_of_other_sizes_are_refused(rows: Rows) -> None:
    assert rows.call("--only", "op, select") == 0
    with pytest.raises(routing.ResultsError, match=r"of another tiny\n.*\n  expected: True\n  found: False"):
        routing.main(["--device", "cpu", "--out", str(rows.out)])


# from end to end


@pytest.mark.slow
def test_a_process_measures_and_the_tables_show_it(tmp_path: Path) -> None:
    out = tmp_path / "routing.json"
    command = ["--tiny", "--device", "cpu", "--backend", "eager", "--out", str(out)]
    assert routing.main([*command, "--only", "op, combine, 1/3"]) == 0
    report = json.loads(out.read_text())
    row = report["rows"]["op, combine, 1/3"]
    assert row["floor"] == pytest.approx(((2 * 64 + 20) * 64 + 4 * 64 + 4 * 20) / 4.3e12)
    assert all(len(runs) == 2 and min(runs) > 0 for runs in row["times"].values())
    assert row["choices"] == ["kernel: torch, since the tensors are on cpu, and Triton runs on cuda"]
    report["rows"]["graph"] = {"settings": {"kind": "graph"}, **routing.measure(tiny(ROWS["graph, D=960, B=1"]), HERE)}
    page = pages_routing.routing(report)
    assert "| row | chosen | kernel | kernel, compiled | eager |" in page
    assert "- graph: skipped: CUDA graphs need CUDA" in page


EVERY = ("1 layer, 1/3, training",)
NAMES = ("share_first, 1/3, forward", "MoR-3", "token choice, forward")
LONG = [pytest.param(name, marks=pytest.mark.thorough) for name in NAMES]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*EVERY, *LONG])
def test_every_kind_in_small(name: str) -> None:
    torch.compiler.reset()
    row = routing.measure(tiny(ROWS[name]), HERE)
    assert row["failures"] == {}
    assert row["error"].keys() <= row["times"].keys()
    assert all(one["ratio"] for one in row["asked"] if "memory" not in one["peer"])
    assert any("select_topk" in line or "torch" in line for line in row["choices"])
    json.dumps(row, allow_nan=False)
    named = {"settings": {"kind": ROWS[name].kind, "chosen": 1}, **row}
    page = pages_routing.routing({"device": "x", "versions": {}, "command": "y", "rows": {name: named}})
    assert page.count(f"| {name} |") == 1 + len(row["asked"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS)
def test_every_op_in_small(op: str) -> None:
    training = bool(OPS[op].wanted)
    row = Row(op, "op", TINY, 1 / 3, op=op, training=training, rounds=1, least=0.0)
    found = routing_op.measure(row, HERE)
    assert found["failures"] == {}
    assert found["error"].keys() == found["times"].keys() - {"eager"}


def test_clocks_follow_the_row() -> None:
    clock = routing_time.clock_of(ROWS["MoR-3"], HERE, 100.0)
    assert clock.until == pytest.approx(100 + 500 * 2 / 3)
    assert clock.rounds == 6
