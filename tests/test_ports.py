"""Ports: attentions are found with what describes them, what they cache is the least there is, sublayers are cut."""

import pytest
import torch
from blocks import illegal_cases, legal_cases
from traced import BATCH, HEAD, LENGTH, WIDTH, inputs

from depthc.ir.axes.analysis import analyse
from depthc.ir.axes.caches import cached_of
from depthc.ir.axes.cuts import cuts_of, legal_spans
from depthc.ir.axes.ports import ports_of
from depthc.ir.rows.run import run_rows

ROOT = f"{HEAD**-0.5:.4g}"
DESCRIPTORS = {
    "fused": ["fused self biases=mask"],
    "eager": [f"pattern self scale={ROOT} biases=mask"],
    "by_hand": [f"pattern self scale={ROOT} biases=mask"],
    "sigmoid": [f"pattern self scale={ROOT} biases=mask weights=sigmoid"],
    "rectified": [f"pattern self scale={ROOT} biases=mask weights=relu"],
    "sinks": [f"pattern self scale={ROOT} biases=mask sinks=1"],
    "softcapped": [f"pattern self scale={ROOT} softcap=5 biases=mask"],
    "gqa": ["fused self biases=mask groups=2"],
    "causal_flag": ["fused self causal"],
    "cross": ["fused self biases=mask", "fused cross"],
    "cross_by_hand": [f"pattern self scale={ROOT} biases=mask", f"pattern cross scale={ROOT}"],
    "tokenwise": [],
    "looped": [],
}


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_descriptor(name: str) -> None:
    assert [str(port) for port in ports_of(legal_cases()[name].block)] == DESCRIPTORS[name]


def test_transposed_scores_have_the_same_port() -> None:
    """Whichever operand comes first, the softmax says which one holds the keys."""
    plain, turned = (ports_of(legal_cases()[name].block)[0] for name in ("eager", "transposed"))
    assert len(turned.queries) == len(turned.keys) == len(turned.values) == 1
    assert plain.descriptor.scale == turned.descriptor.scale
    sources = [[op.name for op in behind(port.keys[0])] for port in (plain, turned)]
    assert any("k" in name for name in sources[1])
    assert [len(s) for s in sources] == [len(behind(p.keys[0])) for p in (plain, turned)]


def behind(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The parameters that a value is computed from."""
    seen, stack = {node}, [node]
    while stack:
        stack.extend(n for n in stack.pop().all_input_nodes if n not in seen and not seen.add(n))  # type: ignore[func-returns-value]
    return [n for n in seen if n.op == "placeholder" and n.meta["input"].kind == "param"]


@pytest.mark.parametrize(
    ("name", "queries", "keys"), [("differential", 2, 2), ("key_bias", 1, 2), ("disentangled", 2, 2)]
)
def test_regions_with_several_operands(name: str, queries: int, keys: int) -> None:
    (port,) = ports_of(legal_cases()[name].block)
    assert (len(port.queries), len(port.keys), len(port.values)) == (queries, keys, 1)


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        *(("fused", 2 * WIDTH), ("gqa", 2 * HEAD), ("latent", 5 + 2), ("differential", 2 * WIDTH)),
        *(("key_bias", 2 * WIDTH + 2), ("memory_keys", 2 * WIDTH), ("rotary", 2 * WIDTH)),
    ],
)
def test_cache_is_the_least_per_token(name: str, elements: int) -> None:
    (cached,) = cached_of(legal_cases()[name].block)
    assert sum(c.elements for c in cached) == elements


def test_cached_values_lie_next_to_the_keys() -> None:
    """Of equally large values the last is cached, so that nothing is computed again."""
    block = legal_cases()["rotary"].block
    (port,), (cached,) = ports_of(block), cached_of(block)
    assert {c.node for c in cached} == {*port.keys, *port.values}


@pytest.mark.parametrize(
    ("name", "mixes"), [("fused", [True]), ("cross", [True, True]), ("hybrid", [True, False, True, False])]
)
def test_sublayers(name: str, mixes: list[bool]) -> None:
    block = (legal_cases() | illegal_cases())[name].block
    cuts = cuts_of(block)
    assert [cut.mixes for cut in cuts] == mixes
    assert cuts[0].start is block.body.placeholders[0]
    assert cuts[-1].end is block.body.results[0]
    assert [cut.end for cut in cuts[:-1]] == [cut.start for cut in cuts[1:]]
    nodes = [n for cut in cuts for n in cut.nodes]
    assert len(nodes) == len(set(nodes))


def test_a_hybrid_offers_what_follows_its_convolution() -> None:
    case, feeds = illegal_cases()["hybrid"], inputs()
    assert not analyse(case.block).legal
    (span,) = legal_spans(case.block)
    assert (span.first, span.last) == (1, 3)
    keep: dict[torch.fx.Node, torch.Tensor] = {}
    from depthc.ir.body import interpret

    arranged = case.block.body.arrange([feeds["h"], *case.pick(feeds)], case.params)
    (expected,) = interpret(case.block.body, arranged, lambda node, value: keep.setdefault(node, value))
    values = [feeds["h"], *case.pick(feeds)]
    sides, params = [values[i] for i in span.values], [case.params[i] for i in span.params]
    (found,), _ = run_rows(span.block, [keep[span.start]], sides, params)
    assert torch.equal(found, expected)
    positions = torch.tensor([[0, 2, 5]]).expand(BATCH, -1)
    (rows,), _ = run_rows(span.block, [keep[span.start][:, [0, 2, 5]]], sides, params, positions=positions)
    assert rows.shape == (BATCH, 3, WIDTH)


def test_a_legal_block_is_its_own_span() -> None:
    block = legal_cases()["cross"].block
    (span,) = legal_spans(block)
    assert span.block is block
    assert (span.first, span.last) == (0, 1)


def test_analysis_is_made_once() -> None:
    block = legal_cases()["eager"].block
    assert ports_of(block) is ports_of(block)
    assert analyse(block).labels is analyse(block).labels
    assert LENGTH not in analyse(block).probe.sizes.values()
