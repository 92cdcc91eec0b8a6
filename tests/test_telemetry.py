"""Telemetry of routed loops: by hand, by loops over tokens, and of a routed model."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depthc
from depthc.codegen.aux import Aux
from depthc.ir.tokens import TokenSet
from depthc.runtime.telemetry import Report, combine, depth_of, report

from .models import Chain, seeded, states

# Two rows, three recursions of capacities 1, 1/2, 1/4: what each token's routes are, written out. "." is padding, a
# digit is the number of recursions that the token took.
ROWS = ("3121", "21..")
# 5 is sure to be chosen, -5 sure not to be.
LOGITS = (
    ((5.0, 5.0, -5.0, 0.0), (5.0, -5.0, math.nan, 5.0)),
    ((5.0, 5.0, 5.0, -5.0), (-5.0, -5.0, 5.0, math.nan)),
    ((5.0, 9.0, 5.0, 9.0), (-5.0, 9.0, math.nan, math.inf)),
)


def routed(rows: tuple[str, ...], logits: Any, loop: str = "r") -> Aux:
    """An Aux in which every token takes the recursions that its digit says."""
    taps: dict[str, Any] = {}
    for r, logit in enumerate(logits):
        candidates = [[t != "." and int(t) >= r for t in row] for row in rows]
        chosen = [[t != "." and int(t) > r for t in row] for row in rows]
        taps[f"route.{loop}.{r}.logit"] = torch.tensor(logit)
        taps[f"route.{loop}.{r}.candidates"] = TokenSet(torch.tensor(candidates))
        taps[f"route.{loop}.{r}.chosen"] = TokenSet(torch.tensor(chosen))
    return Aux(taps)


def random_aux(seed: int, shape: tuple[int, int], recursions: int, loop: str = "r") -> Aux:
    """Nested routes of random tokens, some of them padding, some never chosen."""
    generator = torch.Generator().manual_seed(seed)
    depths = torch.randint(-1, recursions + 1, shape, generator=generator).tolist()
    rows = tuple("".join("." if d < 0 else str(d) for d in row) for row in depths)
    logits = [(torch.randn(shape, generator=generator) * 3).tolist() for _ in range(recursions)]
    return routed(rows, logits, loop)


def joined(first: Aux, second: Aux) -> Aux:
    """One Aux over the rows of both."""
    taps: dict[str, Any] = {}
    for route, other in zip(first.routes, second.routes, strict=True):
        at = f"route.{route.loop}.{route.recursion}"
        taps[f"{at}.logit"] = torch.cat([route.logit, other.logit])
        taps[f"{at}.candidates"] = TokenSet(torch.cat([route.candidates, other.candidates]))
        taps[f"{at}.chosen"] = TokenSet(torch.cat([route.chosen, other.chosen]))
    return Aux(taps)


def entropy(logit: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q)


def expected(aux: Aux) -> dict[str, Any]:
    """Every number of a report, token by token, from the definitions."""
    routes = aux.routes
    batch, length = routes[0].logit.shape
    selective = [r for r in routes if any(c and not k for c, k in zip(*flat(r.candidates, r.chosen), strict=True))]
    depths, dead = [], 0
    for at in [(b, t) for b in range(batch) for t in range(length)]:
        if not any(r.candidates[at] for r in routes):
            continue
        depths.append(sum(bool(r.chosen[at]) for r in routes))
        dead += bool(selective) and not any(r.chosen[at] for r in selective)
    found: dict[str, Any] = {"tokens": len(depths), "mean_depth": sum(depths) / len(depths)}
    found["tokens_per_depth"] = tuple(depths.count(d) for d in range(len(routes) + 1))
    found["dead"] = dead / len(depths)
    right, entropies, sizes = [], [], []
    for route in routes:
        logits, candidates, chosen = flat(route.logit, route.candidates, route.chosen)
        own = [(x, k) for x, c, k in zip(logits, candidates, chosen, strict=True) if c]
        right.append(sum((x > 0) == k for x, k in own))
        entropies.append(sum(entropy(x) for x, _ in own))
        sizes.append(len(own))
    found["accuracy"] = tuple(a / n for a, n in zip(right, sizes, strict=True))
    found["overall_accuracy"] = sum(right) / sum(sizes)
    found["entropy"] = tuple(e / n for e, n in zip(entropies, sizes, strict=True))
    return found


def flat(*tensors: Tensor) -> list[list[Any]]:
    return [t.flatten().tolist() for t in tensors]


def assert_as_expected(found: Report, wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_depths_by_hand() -> None:
    aux = routed(ROWS, LOGITS)
    assert depth_of(aux).tolist() == [[3, 1, 2, 1], [2, 1, 0, 0]]
    assert depth_of(aux).dtype == torch.int64


def test_report_by_hand() -> None:
    found = report(routed(ROWS, LOGITS))
    assert found.tokens == 6
    assert found.tokens_per_depth == (0, 3, 2, 1)
    assert found.mean_depth == pytest.approx(10 / 6)
    assert found.candidates == (6, 6, 3)
    assert found.chosen == (6, 3, 1)
    # Recursion 0 took everyone and does not count: dead are the three that recursion 1 left out.
    assert found.dead == 0.5
    # Wrong at recursion 0: -5, 0 and -5. At 1: the second token of row 0, the first of row 1. At 2: the third of row 0.
    assert found.foretold == (3, 4, 2)
    assert found.accuracy == (3 / 6, 4 / 6, 2 / 3)
    assert found.overall_accuracy == 9 / 15
    sure = 0.0579669  # of sigmoid(5) = 0.9933071
    assert found.entropy == pytest.approx(((5 * sure + 1) / 6, sure, sure), abs=1e-6)


def test_numbers_are_plain() -> None:
    found = report(routed(ROWS, LOGITS))
    numbers = found.numbers()
    assert {type(n) for n in numbers.values()} == {int, float}
    assert json.loads(json.dumps(dataclasses.asdict(found)))["tokens_per_depth"] == [0, 3, 2, 1]
    assert numbers["tokens.3"] == 1
    assert numbers["accuracy.2"] == 2 / 3
    assert numbers["accuracy"] == 0.6
    assert len(numbers) == 4 + 4 + 3 + 3


@pytest.mark.parametrize("seed", range(8))
def test_report_of_random_routes(seed: int) -> None:
    aux = random_aux(seed, (3, 20), 1 + seed % 4)
    assert_as_expected(report(aux), expected(aux))


def test_dead_counts_from_the_first_recursion_that_leaves_out() -> None:
    zeros = [[0.0] * 4] * 3
    # Nobody is left out: nobody is dead.
    assert report(routed(("33",), [[[0.0] * 2]] * 3)).dead == 0
    # Recursion 0 leaves out one of four; the others may stop right after it.
    assert report(routed(("0111",), [[row] for row in zeros])).dead == 0.25
    # Only the last recursion leaves out: three of four.
    assert report(routed(("2322",), [[row] for row in zeros])).dead == 0.75


def test_sure_logits_have_no_entropy() -> None:
    logits = [[[math.inf, -math.inf, 1e4, -1e4, 0.0]]]
    found = report(routed(("10100",), logits))
    assert found.entropy == (0.2,)
    assert found.accuracy == (1.0,)


def test_half_precision_and_gradients() -> None:
    aux = routed(ROWS, LOGITS)
    taps = {n: v.to(torch.bfloat16).requires_grad_() if isinstance(v, Tensor) else v for n, v in aux.taps.items()}
    assert report(Aux(taps)) == report(aux)


def test_combined_is_one_report_over_all_batches() -> None:
    first, second, third = (random_aux(seed, (2, 5 + seed), 3) for seed in range(3))
    found = combine([report(first), report(second), report(third)])
    tokens = [report(a).tokens for a in (first, second, third)]
    assert found.tokens == sum(tokens)
    assert found.mean_depth == pytest.approx(
        sum(report(a).mean_depth * n for a, n in zip((first, second, third), tokens, strict=True)) / sum(tokens)
    )
    same = [random_aux(seed, (2, 9), 3) for seed in range(3)]
    assert_as_expected(combine(map(report, same)), expected(functools.reduce(joined, same)))


def test_combined_dead_tokens_are_those_of_all_batches() -> None:
    """In one batch recursion 0 takes everyone, in the other it does not: over both it is selective."""
    zeros = [[[0.0, 0.0]]] * 2
    first, second = routed(("12",), zeros), routed(("01",), zeros)
    assert [report(first).dead, report(second).dead] == [0.5, 0.5]
    assert combine([report(first), report(second)]).dead == 0.25 == report(joined(first, second)).dead


def test_a_recursion_without_candidates() -> None:
    found = report(routed(("00",), [[[-1.0, -1.0]], [[1.0, 1.0]]]))
    assert found.candidates == (2, 0)
    assert found.accuracy[0] == 1
    assert math.isnan(found.accuracy[1])
    assert math.isnan(found.entropy[1])
    assert found.overall_accuracy == 1
    assert "nan" in str(found)


def test_batch_of_padding() -> None:
    found = report(routed(("..",), [[[0.0, 0.0]]]))
    assert found.tokens == 0
    assert math.isnan(found.mean_depth)
    assert combine([found, report(routed(("10",), [[[1.0, -1.0]]]))]).mean_depth == 0.5


def test_table() -> None:
    lines = str(report(routed(ROWS, LOGITS))).splitlines()
    assert lines[0] == "loop r: 6 tokens, mean depth 1.67, dead 50.0%, foretold 60.0%"
    assert lines[1].split() == ["recursion", "candidates", "chosen", "last", "share", "foretold", "entropy"]
    assert [line.split() for line in lines[2:]] == [
        ["none", "0", "0.0%"],
        ["0", "6", "6", "3", "50.0%", "50.0%", "0.215"],
        ["1", "6", "3", "2", "33.3%", "66.7%", "0.058"],
        ["2", "3", "1", "1", "16.7%", "66.7%", "0.058"],
    ]
    assert len({len(line) for line in lines[1:2] + lines[3:]}) == 1


def test_one_of_several_loops() -> None:
    inner, outer = routed(ROWS, LOGITS, "encoder.r"), routed(("10",), [[[1.0, -1.0]]], "r")
    both = Aux({**inner.taps, **outer.taps})
    assert report(both, "encoder.r") == report(inner)
    assert report(both, "r").tokens_per_depth == (1, 1)
    assert depth_of(both, loop="r").tolist() == [[1, 0]]
    with pytest.raises(depthc.InputError) as error:
        report(both)
    assert str(error.value) == (
        "several loops route tokens\n"
        "  expected: one of encoder.r, r\n"
        "  found: no name\n"
        "  remedy: name the loop: loop='encoder.r'"
    )


def test_unknown_loop() -> None:
    with pytest.raises(depthc.InputError, match=r"no loop 's' routes tokens(.|\n)*expected: one of r\n"):
        depth_of(routed(ROWS, LOGITS), "s")


@pytest.mark.parametrize(("taps", "found"), [({}, "nothing"), ({"loss.r.0.router": 0.0}, "loss.r.0.router")])
def test_nothing_routes(taps: dict[str, Any], found: str) -> None:
    with pytest.raises(depthc.InputError) as error:
        report(Aux(taps))
    assert str(error.value) == (
        "the module routes no tokens\n"
        "  expected: an Aux with routes\n"
        f"  found: an Aux with {found}\n"
        '  remedy: compile the model with a recipe that routes, for example "mor"'
    )


def test_choices_that_are_not_nested() -> None:
    aux = routed(("12",), [[[0.0, 0.0]]] * 2)
    taps = {**aux.taps, "route.r.1.chosen": TokenSet(torch.tensor([[True, True]]))}
    assert report(Aux(taps)).tokens_per_depth == (0, 0, 2)
    taps["route.r.0.chosen"] = TokenSet(torch.tensor([[True, False]]))
    with pytest.raises(depthc.InputError, match=r"recursion 1 of loop r chose a token that the one before did not"):
        report(Aux(taps))


def test_combining_what_does_not_fit() -> None:
    one, other = report(routed(ROWS, LOGITS)), report(routed(ROWS, LOGITS[:2] + LOGITS[2:], "s"))
    with pytest.raises(depthc.InputError, match="found: loop r of 3 recursions, loop s of 3 recursions"):
        combine([one, other])
    with pytest.raises(depthc.InputError, match="found: loop r of 1 recursions, loop r of 3 recursions"):
        combine([one, report(routed(("10",), [[[1.0, 1.0]]]))])
    with pytest.raises(depthc.InputError, match="no reports to combine"):
        combine([])


# models


def test_routed_model() -> None:
    compiled = depthc.compile(seeded(lambda: Chain(5)), "mor", args=(states(3, 12),), std=1.0)
    for training, sizes in ((True, (0, 12, 12, 12)), (False, None)):
        with torch.no_grad():
            aux = compiled.train(training).forward_with_aux(states(3, 12, seed=1))[1]
        found = report(aux)
        assert_as_expected(found, expected(aux))
        # Capacities are 1, 2/3 and 1/3 in training; after it a threshold of zero, so the sign is the choice.
        assert sizes is None or found.tokens_per_depth == sizes
        assert training or found.accuracy[1:] == (1, 1)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        use_cache=False,
    )
    model = seeded(lambda: transformers.LlamaForCausalLM(config)).eval()
    return depthc.compile(model, "mor", kwargs=padded(0, 0), std=1.0)


def padded(seed: int, padding: int) -> dict[str, Tensor]:
    """Two rows, the second of which begins with padding."""
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["training", "inference"])
def test_routed_llama(llama: nn.Module, selection: str) -> None:
    llama.selection = selection
    with torch.no_grad():
        every = [llama.forward_with_aux(**padded(seed, 3 * seed))[1] for seed in range(2)]
    for seed, aux in enumerate(every):
        found = report(aux)
        assert_as_expected(found, expected(aux))
        assert found.tokens == 24 - 3 * seed
        assert not depth_of(aux)[1, : 3 * seed].any()
    if selection == "training":
        # Of 12, 12, 12 and 9 real tokens a row.
        assert report(every[0]).tokens_per_depth == (0, 8, 8, 8)
        assert report(every[1]).tokens_per_depth == (0, 4 + 3, 4 + 3, 4 + 3)
        assert report(every[1]).dead == pytest.approx(1 / 3)
    else:
        assert report(every[0]).accuracy[1:] == (1, 1)
    assert_as_expected(combine(map(report, every)), expected(joined(*every)))
