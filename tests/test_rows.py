"""Rows: a block on some of its tokens equals the block on all of them, with the other tokens masked as keys."""

import pytest
import torch
from blocks import LEGAL, legal_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from traced import BATCH, FOREIGN, LENGTH, WIDTH, Case, draw, inputs

from depthc.ir.axes.caches import cached_of
from depthc.ir.axes.ops import op_name
from depthc.ir.axes.ports import ports_of
from depthc.ir.errors import SubsetError
from depthc.ir.program import Kv
from depthc.ir.rows.run import run_rows

MASKED = [name for name in LEGAL if name != "causal_flag"]  # the others read the mask
ONE_PORT = [name for name in LEGAL if "cross" not in name and name != "two_hops"]
TOLERANCE = 1e-12


def choose(count: int, batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Positions, other ones in each batch row, ascending."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(length, generator=generator)[:count].sort().values for _ in range(batch)]
    return torch.stack(rows)


def pick(x: Tensor, positions: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0])[:, None], positions]


def masked(mask: Tensor, positions: Tensor) -> Tensor:
    """The mask with every token that is not at `positions` removed from the keys; a token always sees itself."""
    length = mask.shape[-1]
    chosen = torch.zeros(positions.shape[0], length, dtype=torch.bool).scatter(1, positions, True)
    return mask.masked_fill(~(chosen[:, None, None, :] | torch.eye(length, dtype=torch.bool)), -1e30)


def rows_of(case: Case, h: Tensor, feeds: dict[str, Tensor], **options: object) -> tuple[Tensor, tuple]:
    results, caches = run_rows(case.block, [h], case.pick(feeds), case.params, **options)  # type: ignore[arg-type]
    return results[0], caches


def plans(case: Case, mode: str, cross: str = "") -> list[Kv]:
    return [Kv(cross or mode if port.cross else mode, "s") for port in ports_of(case.block)]  # type: ignore[arg-type]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", LEGAL)
def test_all_tokens_bitwise(name: str) -> None:
    case, feeds = legal_cases()[name], inputs()
    h = feeds.pop("h")
    expected = case.full(h, **feeds)
    assert torch.equal(rows_of(case, h, feeds)[0], expected)
    everyone = torch.arange(LENGTH).expand(BATCH, -1)
    assert torch.equal(rows_of(case, h, feeds, positions=everyone, ordered=True)[0], expected)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("count", [1, 5])
def test_recursion(name: str, count: int) -> None:
    """Keys are the selected tokens only."""
    case, feeds = legal_cases()[name], inputs()
    h, positions = feeds.pop("h"), choose(count)
    expected = pick(case.full(h, **feeds | {"mask": masked(feeds["mask"], positions)}), positions)
    close(rows_of(case, pick(h, positions), feeds, positions=positions)[0], expected)
    reads_mask = "mask" in case.sides
    assert not reads_mask or (pick(case.full(h, **feeds), positions) - expected).abs().max() > 1e-6


@pytest.mark.parametrize("name", LEGAL)
def test_shared_keys(name: str) -> None:
    """Queries of some tokens read the keys of all."""
    case, feeds = legal_cases()[name], inputs()
    h, positions = feeds.pop("h"), choose(5)
    whole, caches = rows_of(case, h, feeds, kv=plans(case, "store"))
    found, kept = rows_of(case, pick(h, positions), feeds, positions=positions, kv=plans(case, "read"), caches=caches)
    close(found, pick(whole, positions))
    assert all(a is b for new, old in zip(kept, caches, strict=True) for a, b in zip(new, old, strict=True))


@pytest.mark.parametrize("name", ONE_PORT)
def test_refreshed_keys(name: str) -> None:
    """Keys of all tokens, with those of the selected ones replaced."""
    case, feeds = legal_cases()[name], inputs()
    h, positions = feeds.pop("h"), choose(5)
    _, caches = rows_of(case, h, feeds, kv=plans(case, "store"))
    rows = pick(h, positions) + draw(BATCH, 5, WIDTH, seed=7)
    changed = h.clone()
    changed[torch.arange(BATCH)[:, None], positions] = rows
    options = {"positions": positions, "kv": plans(case, "update"), "caches": caches}
    found, updated = rows_of(case, rows, feeds, **options)
    close(found, pick(case.full(changed, **feeds), positions))
    _, expected = rows_of(case, changed, feeds, kv=plans(case, "store"))
    for new, old in zip(updated, expected, strict=True):
        for a, b in zip(new, old, strict=True):
            close(a, b)


@pytest.mark.parametrize("name", LEGAL)
def test_decoding(name: str) -> None:
    """A prompt, then one token at a time; the foreign keys of cross-attention are read from the cache."""
    case, feeds = legal_cases()[name], inputs()
    h = feeds.pop("h")
    expected = case.full(h, **feeds)
    _, caches = rows_of(case, h[:, :8], feeds, kv=plans(case, "store"))
    for at in range(8, LENGTH):
        options = {"positions": torch.tensor([[at]]), "kv": plans(case, "store", "read"), "caches": caches}
        found, caches = rows_of(case, h[:, at : at + 1], feeds, **options)
        close(found, expected[:, at : at + 1])


@pytest.mark.parametrize(
    "name", ["fused", "eager", "causal_flag", "memory_keys", "sinks", "rotary", "heads_in_batch", "latent"]
)
def test_decoding_ragged_rows(name: str) -> None:
    """Batch rows may hold different tokens: caches and new rows at positions of their own, some of them not valid."""
    case, feeds = legal_cases()[name], inputs()
    h = feeds.pop("h")
    old, new = torch.tensor([[0, 2, 3], [1, 4, 5], [0, 1, 0]]), torch.tensor([[5, 7], [6, 9], [4, 8]])
    key_valid = torch.tensor([[True] * 3, [True] * 3, [True, True, False]])
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    _, caches = rows_of(case, pick(h, old), feeds, positions=old, valid=key_valid, kv=plans(case, "store"))
    options = {"positions": new, "key_positions": old, "valid": valid, "key_valid": key_valid, "caches": caches}
    found, _ = rows_of(case, pick(h, new), feeds, kv=plans(case, "store"), **options)
    for row in range(BATCH):
        own = {k: v[row : row + 1] if k in ("mask", "memory") else v for k, v in feeds.items()}
        at = torch.cat([old[row][key_valid[row]], new[row][valid[row]]])[None]
        alone, _ = rows_of(case, h[row : row + 1, at[0]], own, positions=at, ordered=True)
        count = int(valid[row].sum())
        close(found[row, :count], alone[0, -count:])
    assert found.isfinite().all()


@pytest.mark.parametrize("name", LEGAL)
def test_rows_that_are_not_valid_are_no_keys(name: str) -> None:
    """Sets of different sizes, padded: every batch row equals itself alone."""
    case, feeds = legal_cases()[name], inputs()
    h, positions = feeds.pop("h"), choose(5)
    counts = [3, 4, 5]
    valid = torch.arange(5)[None] < torch.tensor(counts)[:, None]
    found, _ = rows_of(case, pick(h, positions), feeds, positions=positions, valid=valid)
    for row, count in enumerate(counts):
        own = {k: v[row : row + 1] if k in ("mask", "memory") else v for k, v in feeds.items()}
        at = positions[row : row + 1, :count]
        alone, _ = rows_of(case, h[row : row + 1, at[0]], own, positions=at, ordered=True)
        close(found[row : row + 1, :count], alone)
    assert found.isfinite().all()


@pytest.mark.parametrize(
    "name", ["eager", "causal_flag", "by_hand", "sigmoid", "memory_keys", "cross", "looped", "rotary"]
)
def test_gradients(name: str) -> None:
    """Gradients of states, side inputs and parameters are those of the masked full block; padding gives no NaN."""
    case, feeds = legal_cases()[name], inputs()
    h, positions = feeds.pop("h").requires_grad_(), choose(5)
    for weight in case.params:
        weight.requires_grad_()
    if name == "causal_flag":
        chosen = torch.zeros(
            BATCH, LENGTH, dtype=torch.bool
        )  # its mask is not an input: compare with one row at a time
        chosen.scatter_(1, positions, True)
        parts = [case.full(h[b : b + 1, positions[b]], **feeds) for b in range(BATCH)]
        expected = torch.cat(parts)
    else:
        expected = pick(case.full(h, **feeds | {"mask": masked(feeds["mask"], positions)}), positions)
    weight = draw(*expected.shape, seed=9)
    leaves = [h, *case.params]
    wanted = torch.autograd.grad((expected * weight).sum(), leaves, allow_unused=True)
    found, _ = rows_of(case, pick(h, positions), feeds, positions=positions)
    got = torch.autograd.grad((found * weight).sum(), leaves, allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)
    valid = torch.arange(5)[None] < torch.tensor([3, 4, 5])[:, None]
    padded, _ = rows_of(case, pick(h, positions), feeds, positions=positions, valid=valid)
    grads = torch.autograd.grad((padded * valid.unsqueeze(-1)).sum(), leaves, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", ["fused", "heads_in_batch", "cross", "rotary", "disentangled", "latent", "looped"])
def test_other_sizes(name: str) -> None:
    """Another batch, length and foreign length than the block was traced with; the block is analysed once."""
    case, feeds = legal_cases()[name], inputs(batch=2, length=7, foreign=FOREIGN + 3)
    h, positions = feeds.pop("h"), choose(3, batch=2, length=7)
    expected = pick(case.full(h, **feeds | {"mask": masked(feeds["mask"], positions)}), positions)
    close(rows_of(case, pick(h, positions), feeds, positions=positions)[0], expected)


@pytest.mark.parametrize("name", ["fused", "eager", "causal_flag", "rotary"])
def test_order_of_rows_does_not_matter(name: str) -> None:
    case, feeds = legal_cases()[name], inputs()
    h, positions, order = feeds.pop("h"), choose(5), torch.tensor([3, 0, 4, 1, 2])
    sorted_rows, _ = rows_of(case, pick(h, positions), feeds, positions=positions)
    mixed, _ = rows_of(case, pick(h, positions[:, order]), feeds, positions=positions[:, order])
    close(mixed, sorted_rows[:, order])


@pytest.mark.parametrize("name", ["fused", "eager", "heads_in_batch"])
def test_left_padding(name: str) -> None:
    """Padded tokens are masked by the model's own mask, which is read at the selected positions."""
    case, feeds = legal_cases()[name], inputs()
    h, positions = feeds.pop("h"), choose(5)
    padding = torch.arange(LENGTH)[None] < torch.tensor([0, 3, 5])[:, None]
    feeds["mask"] = feeds["mask"].masked_fill(padding[:, None, None, :], -1e30)
    expected = pick(case.full(h, **feeds | {"mask": masked(feeds["mask"], positions)}), positions)
    real = ~pick(padding, positions)
    close(rows_of(case, pick(h, positions), feeds, positions=positions)[0][real], expected[real])


@settings(max_examples=25)
@given(
    name=st.sampled_from([n for n in MASKED if n != "tokenwise"]),
    batch=st.integers(2, 4),
    length=st.integers(2, 13),
    data=st.data(),
)
def test_any_subset(name: str, batch: int, length: int, data: st.DataObject) -> None:
    """Any number of tokens at any length, kept in a cache, then refreshed or decoded from."""
    case, feeds = legal_cases()[name], inputs(batch, length)
    h, count = feeds.pop("h"), data.draw(st.integers(1, length))
    positions = choose(count, batch, length, seed=data.draw(st.integers(0, 99)))
    expected = pick(case.full(h, **feeds | {"mask": masked(feeds["mask"], positions)}), positions)
    rows = pick(h, positions)
    close(rows_of(case, rows, feeds, positions=positions)[0], expected)
    cut = data.draw(st.integers(0, count))
    if 0 < cut < count and "cross" not in name and name not in ("looped", "sorted_back", "sorted_add"):
        early = {"positions": positions[:, :cut], "kv": plans(case, "store")}
        _, caches = rows_of(case, rows[:, :cut], feeds, **early)
        late = {"positions": positions[:, cut:], "key_positions": positions[:, :cut], "caches": caches}
        close(rows_of(case, rows[:, cut:], feeds, kv=plans(case, "store"), **late)[0], expected[:, cut:])


# What is computed.


def counted(
    case: Case, monkeypatch: pytest.MonkeyPatch, h: Tensor, feeds: dict[str, Tensor], **options: object
) -> dict[str, list[int]]:
    """How many token rows went through every product with a parameter, by the name of its weight."""
    from depthc.ir.rows.fitting import Fitting

    seen: dict[str, list[int]] = {}
    original = Fitting.target

    def target(self: Fitting, node: fx.Node, frame: int, args: list, kwargs: dict) -> object:
        if op_name(node) == "linear":
            weight = node.args[1]
            features = args[1].shape[0] / weight.meta["input"].type.shape[0]
            seen.setdefault(weight.name, []).append(int(args[0][..., 0].numel() * features))
        return original(self, node, frame, args, kwargs)

    monkeypatch.setattr(Fitting, "target", target)
    rows_of(case, h, feeds, **options)
    return {name.split("_")[-2]: rows for name, rows in seen.items()}


@pytest.mark.parametrize("name", ["fused", "eager", "transposed", "differential", "gqa", "latent"])
def test_no_projection_sees_more_rows_than_it_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, feeds = legal_cases()[name], inputs()
    h, positions = feeds.pop("h"), choose(5)
    rows = pick(h, positions)
    assert all(n == [BATCH * 5] for n in counted(case, monkeypatch, rows, feeds, positions=positions).values())
    _, caches = rows_of(case, h, feeds, kv=plans(case, "store"))
    options = {"positions": positions, "kv": plans(case, "read"), "caches": caches}
    seen = counted(case, monkeypatch, rows, feeds, **options)
    assert seen.pop("q") == seen.pop("o") == [BATCH * 5]
    behind = {"up": [BATCH * LENGTH]} if name == "latent" else {}  # what is behind the cut runs for all keys
    assert seen == behind


def test_a_fused_projection_is_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the keys of another pass, only the query part of a fused projection is computed: a third."""
    case, feeds = legal_cases()["rotary"], inputs()
    h, positions = feeds.pop("h"), choose(6)
    _, caches = rows_of(case, h, feeds, kv=plans(case, "store"))
    options = {"positions": positions, "kv": plans(case, "read"), "caches": caches}
    assert counted(case, monkeypatch, pick(h, positions), feeds, **options) == {
        "qkv": [BATCH * 6 // 3],
        "o": [BATCH * 6],
    }


def test_cached_tensors_have_a_row_a_token() -> None:
    case, feeds = legal_cases()["gqa"], inputs()
    h = feeds.pop("h")
    _, ((k, v),) = rows_of(case, h, feeds, kv=plans(case, "store"))
    for tensor, cached in zip((k, v), cached_of(case.block)[0], strict=True):
        assert (tensor.shape[cached.batch], tensor.shape[cached.dim]) == (BATCH, LENGTH)
        assert tensor.numel() == BATCH * LENGTH * cached.elements


# Misuse.


def test_a_plan_without_its_cache_is_refused() -> None:
    case, feeds = legal_cases()["fused"], inputs()
    with pytest.raises(SubsetError, match="needs a cache") as caught:
        rows_of(case, feeds["h"], feeds, kv=[Kv("read", "s")])
    assert "store" in caught.value.remedy


def test_plans_for_another_number_of_ports_are_refused() -> None:
    case, feeds = legal_cases()["cross"], inputs()
    with pytest.raises(SubsetError, match="2 attention ports"):
        rows_of(case, feeds["h"], feeds, kv=[Kv()])
