"""Methods that choose single keys or blocks for every query: definitions, limits and hazards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.attention import all_blocks, dense, moments, run
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.engines.cpu import prefill as cpu_prefill
from attnplan.kernels.numerics import balance
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors import smyrf, sorted_blocks
from attnplan.kernels.selectors._segment_tokens import SegmentTokens
from attnplan.kernels.selectors._static_pattern import causal
from attnplan.kernels.selectors.routing import Routing, best_members
from attnplan.kernels.selectors.smyrf import Smyrf
from attnplan.kernels.selectors.sorted_blocks import SortedBlocks, gray_rank

BY_SEGMENT = ["smyrf", "sorted_blocks", "routing"]


def method(name: str, **knobs: int) -> Approximation:
    return catalog.from_dict({"near": {"name": name, **knobs}})


def text(
    queries: int = 700,
    *,
    keys: int | None = None,
    seed: int = 0,
    noise: float = 0.4,
    start: tuple[int, ...] = (0,),
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Four heads over two kv heads; keys scatter around twelve centres, queries look for one."""
    keys = keys or queries
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, 16, generator=generator, dtype=torch.float64)

    batch = len(start)
    centres = randn(2, 12) * 1.5
    of_key = torch.randint(12, (batch, 2, keys), generator=generator)
    of_query = torch.randint(12, (batch, 4, queries), generator=generator)
    key = centres[torch.arange(2)[:, None], of_key] + noise * randn(batch, 2, keys) + 0.7
    query = centres[(torch.arange(4) // 2)[:, None], of_query] + noise * randn(batch, 4, queries)
    fitted = catalog.fit(moments(query, key))
    tensors = (t.to(dtype) for t in (query, key, randn(batch, 2, keys)))
    return Inputs.of_layer(*tensors, scale=0.25, start=start, fitted=fitted)


def pasts(
    selector: SegmentTokens, inputs: Inputs
) -> Iterator[tuple[tuple[int, int, int], list[int], list[int]]]:
    """(batch row, head, query row), the keys it chooses from and those it chose."""
    kept = selector.keep(inputs)
    for row, start in enumerate(inputs.start):
        for i in range(inputs.query.shape[2]):
            position = i + inputs.offset - start
            end = position - position % selector.segment - selector.window
            candidates = range(start + selector.sinks, start + end)
            if position >= 0 and len(candidates) > selector.top:
                for head in range(inputs.query.shape[1]):
                    chosen = [j for j in candidates if kept[row, head, i, j]]
                    yield (row, head, i), list(candidates), chosen


CALLS: dict[str, dict[str, Any]] = {
    "prefill": {"queries": 200},
    "continued": {"queries": 40, "keys": 217},
    "padded": {"queries": 150, "start": (0, 37)},
}


@pytest.mark.parametrize("sizes", CALLS.values(), ids=CALLS)
def test_smyrf_reads_what_lies_beside_the_query_on_every_line(sizes: dict[str, Any]) -> None:
    inputs = text(**sizes)
    selector = Smyrf(12, window=5, segment=32, rounds=3)
    query, key = balance.coordinates(inputs, inputs.query)
    lines = smyrf._lines(16, 3)
    for (row, head, i), candidates, chosen in pasts(selector, inputs):
        k, q = key[row, head, candidates], query[row, head, i]
        most = k.norm(dim=-1).max()
        lift = (most**2 - k.square().sum(-1)).clamp(min=0).sqrt()
        augmented = torch.cat([k, (lift - lift.mean())[:, None]], -1)
        wanted = torch.cat([q * most / q.norm(), torch.zeros(1, dtype=q.dtype)])
        expected = set()
        for line in lines.T:
            order = sorted(candidates, key=lambda j, x=augmented @ line: x[j - candidates[0]])
            before = int((augmented @ line < wanted @ line).sum())
            first = min(max(before - 2, 0), len(candidates) - 4)
            expected |= set(order[first : first + 4])
        assert chosen == sorted(expected)


@pytest.mark.parametrize("sizes", CALLS.values(), ids=CALLS)
def test_sorted_blocks_reads_the_block_of_its_rank(sizes: dict[str, Any]) -> None:
    inputs = text(**sizes)
    selector = SortedBlocks(12, window=5, segment=32, bits=4)
    query, key = balance.coordinates(inputs, inputs.query)
    directions = sorted_blocks._directions(16, 4)
    gray = [n ^ (n >> 1) for n in range(16)]

    def rank(x: Tensor) -> int:
        signs = (x @ directions > 0).tolist()
        return gray.index(int("".join(str(int(s)) for s in signs), 2))

    ranks = [[[rank(x) for x in head] for head in row] for row in key]
    for (row, head, i), candidates, chosen in pasts(selector, inputs):
        of_key = ranks[row][head]
        line = sorted(candidates, key=lambda j: (of_key[j], j))
        mine = rank(query[row, head, i])
        lower = sum(of_key[j] < mine for j in line)
        middle = (lower + sum(of_key[j] <= mine for j in line)) // 2
        first = min(middle // 12 * 12, len(line) - 12)
        assert chosen == sorted(line[first : first + 12])


@pytest.mark.parametrize("sizes", CALLS.values(), ids=CALLS)
def test_routing_reads_its_best_clusters(sizes: dict[str, Any]) -> None:
    inputs = text(**sizes)
    selector = Routing(12, window=5, segment=32)
    query, key = balance.coordinates(inputs, inputs.query)
    for (row, head, i), candidates, chosen in pasts(selector, inputs):
        start = inputs.start[row]
        cluster, _ = selector._clusters(key[row, head : head + 1, start:])
        score = {}
        for c in cluster[0].unique().tolist():
            all_of = (cluster[0] == c).nonzero()[:, 0]
            mean = key[row, head, all_of[all_of >= selector.sinks] + start].mean(0)
            score[c] = float(mean @ query[row, head, i])
        of_key = cluster[0].tolist()
        order = sorted(candidates, key=lambda j: (-score[of_key[j - start]], j))
        assert chosen == sorted(order[:12])


def test_members_of_clusters_come_in_the_order_of_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 9, 20, generator=generator)
    cluster = torch.randint(0, 20, (2, 50), generator=generator)
    cluster[:, 3] = 7  # some clusters are empty, one is not
    for top in (1, 5, 30, 50):
        found = best_members(scores, cluster, top)
        for head in range(2):
            of_key = cluster[head].tolist()
            for i in range(9):
                score = scores[head, i].tolist()
                order = sorted(range(50), key=lambda j: (-score[of_key[j]], j))
                assert found[head, i].tolist() == order[:top]


@pytest.mark.parametrize("name", BY_SEGMENT)
def test_few_past_keys_are_all_read(name: str) -> None:
    inputs = text(300)
    approximation = method(name, top=300, window=1, segment=64)
    torch.testing.assert_close(run(approximation, inputs), dense(inputs), rtol=0, atol=1e-10)


def test_as_many_keys_as_there_are_is_all_of_them() -> None:
    """The limits of the algorithms themselves, where nothing else keeps all keys."""
    places = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    everything = smyrf.beside(places[:, :5], places, 40).sort(-1).values
    assert torch.equal(everything, torch.arange(40).expand(3, 5, 40))


def test_routing_to_equal_keys_is_the_true_best() -> None:
    """Three different keys alone: clusters are exact, and their scores are those of the keys."""
    inputs = text(400)
    key = inputs.key[:, :, :3].clone()[:, :, torch.arange(400) % 3]
    inputs = dataclasses.replace(inputs, key=key)
    selector = Routing(60, window=5, segment=64)
    products = inputs.query @ inputs.key[:, list(inputs.kv_head)].mT
    for (row, head, i), candidates, chosen in pasts(selector, inputs):
        score = products[row, head, i].tolist()
        best = sorted((score[j] for j in candidates), reverse=True)[:60]
        assert sorted((score[j] for j in chosen), reverse=True) == pytest.approx(best)


def test_neighbours_in_gray_rank_differ_in_one_sign() -> None:
    words = torch.arange(128)[:, None] >> torch.arange(6, -1, -1) & 1
    ranks = gray_rank(words.bool())
    assert torch.equal(ranks.sort().values, torch.arange(128))
    in_order = words[ranks.argsort()]
    assert bool((in_order.diff(dim=0).abs().sum(1) == 1).all())


@pytest.mark.parametrize("angle", [0.2, 0.8, 1.5, 2.6])
def test_signs_agree_as_often_as_the_angle_says(angle: float) -> None:
    """Two vectors at an angle t lie on the same side of a random plane with chance 1 - t / pi."""
    generator = torch.Generator().manual_seed(0)
    frame, _ = torch.linalg.qr(torch.randn(4000, 16, 2, generator=generator, dtype=torch.float64))
    x = frame[..., 0]
    y = math.cos(angle) * x + math.sin(angle) * frame[..., 1]
    signs = [v @ sorted_blocks._directions(16, 7) > 0 for v in (x, y)]
    assert float((signs[0] == signs[1]).double().mean()) == pytest.approx(
        1 - angle / math.pi, abs=0.015
    )


def test_a_key_that_is_the_query_lies_beside_it_on_every_line() -> None:
    """Of keys of one norm, F(q) = G(k) for the key that points where the query does."""
    inputs = text(400)
    names = ("balanced.query_map", "balanced.key_map")
    fitted = dict.fromkeys(names, torch.eye(16).expand(4, 16, 16))
    fitted |= {"balanced.key_mean": torch.zeros(4, 16)}
    key = torch.nn.functional.normalize(inputs.key, dim=-1)
    query = inputs.query.clone()
    query[:, :, 256:] = 5 * key[:, list(inputs.kv_head), 44:188]
    inputs = dataclasses.replace(inputs, query=query, key=key, fitted=fitted)
    kept = Smyrf(4, window=64, segment=256, rounds=1).keep(inputs)
    i = torch.arange(256, 400)
    assert bool(kept[:, :, i, i - 212].all())


@pytest.mark.parametrize(
    ("name", "gain"), [("smyrf", 1.15), ("sorted_blocks", 1.5), ("routing", 3)]
)
def test_clustered_keys_are_found_more_often_than_by_chance(name: str, gain: float) -> None:
    """Mass of the chosen keys, over that of as many random ones: their share of the past."""
    inputs = text(1000)
    selector = method(name, top=48).near
    assert isinstance(selector, SegmentTokens)
    kept = selector.keep(inputs)[:, :, 768:]
    i, j = torch.arange(768, 1000)[:, None], torch.arange(1000)
    past = (j >= 4) & (j < i - i % 256 - 64)
    logits = inputs.query[:, :, 768:] @ inputs.key[:, list(inputs.kv_head)].mT * inputs.scale
    mass = torch.softmax(logits.masked_fill(~past, float("-inf")), -1)
    held = float((mass * kept).sum(-1).mean())
    assert held > gain * 48 / int(past.sum(-1)[0])


@pytest.mark.parametrize("name", [*BY_SEGMENT, "moba"])
@pytest.mark.parametrize("last", [0, 63, 200, 333, 511, 512, 640])
def test_what_comes_after_a_query_changes_no_choice(name: str, last: int) -> None:
    """Not even in its own segment or block, and not even NaN."""
    inputs = text()
    knobs = {"top": 16, "segment": 128} if name in BY_SEGMENT else {"top": 2}
    selector = method(name, **knobs).near
    later = (slice(None), slice(None), slice(last + 1, None))
    before = selector.keep(inputs)[:, :, : last + 1]
    read = selector.near(inputs, all_blocks(inputs)).counts(700, 700)[:, :, : last + 1]
    for other in (float("nan"), 50.0):
        query, key = inputs.query.clone(), inputs.key.clone()
        query[later], key[later] = other, other
        changed = dataclasses.replace(inputs, query=query, key=key)
        assert torch.equal(selector.keep(changed)[:, :, : last + 1], before)
    again = selector.near(changed, all_blocks(inputs)).counts(700, 700)
    assert torch.equal(again[:, :, : last + 1], read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*BY_SEGMENT, "moba"])
def test_hazards_give_finite_numbers(name: str, dtype: torch.dtype) -> None:
    """Keys of huge norm, equal keys, zero keys and zero queries."""
    inputs = text(dtype=dtype)
    key, query = inputs.key.clone(), inputs.query.clone()
    key[:, :, 70] *= 1000
    key[:, :, 80:160] = key[:, :, 80:81]
    key[:, :, 200:210] = 0
    query[:, :, 400:410] = 0
    query[:, :, 500:510] *= 1000
    inputs = dataclasses.replace(inputs, key=key, query=query)
    approximation = method(name, top=32 if name in BY_SEGMENT else 3)
    tiles, _ = approximation.tiles(inputs, all_blocks(inputs))
    counts = tiles.counts(700, 700)
    assert int(counts.max()) == 1 and int((counts * ~causal(inputs)).sum()) == 0
    output = run(approximation, inputs, cpu_prefill.attend).float()
    assert bool(output.isfinite().all())
    assert float(output.abs().amax()) <= 1.01 * float(inputs.value.float().abs().amax())


@pytest.mark.parametrize("name", BY_SEGMENT)
def test_selection_is_counted_where_there_is_something_to_select(name: str) -> None:
    near = method(name, top=200).near
    assert near.cost(AttentionShape(1, 4, 2, 380, 380, 16)).selection == 0
    assert near.cost(AttentionShape(1, 4, 2, 700, 700, 16)).selection > 0


def moba_of_the_paper(query: Tensor, key: Tensor, value: Tensor, block: int, top: int) -> Tensor:
    """One head as its authors' plain version (moba_naive.py) has it, own block counted in `top`."""
    length = query.shape[0]
    count = -(-length // block)
    means = torch.stack([key[n * block : (n + 1) * block].mean(0) for n in range(count)])
    gate = query @ means.T
    for n in range(count):
        gate[: (n + 1) * block, n] = float("-inf")
        gate[n * block : (n + 1) * block, n] = float("inf")
    best = gate.topk(min(top, count), dim=-1)
    attend = gate >= best.values.amin(-1, keepdim=True)
    attend &= torch.zeros_like(attend).scatter_(1, best.indices, True)
    keep = attend.repeat_interleave(block, 1)[:, :length].tril()
    return torch.softmax((query @ key.T * 0.25).masked_fill(~keep, float("-inf")), -1) @ value


@pytest.mark.parametrize("top", [1, 3, 8])
@pytest.mark.parametrize("queries", [64, 500, 640])
def test_moba_without_sinks_is_that_of_its_authors(queries: int, top: int) -> None:
    inputs = text(queries)
    output = run(method("moba", top=top, sinks=0), inputs)
    for head in range(4):
        key, value = inputs.key[0, head // 2], inputs.value[0, head // 2]
        expected = moba_of_the_paper(inputs.query[0, head], key, value, 64, top + 1)
        torch.testing.assert_close(output[0, head], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("start", [0, 30, 63, 64, 100])
@pytest.mark.parametrize("sinks", [0, 4, 70])
def test_moba_reads_sinks_wherever_they_lie(start: int, sinks: int) -> None:
    inputs = text(400, start=(start,))
    selector = method("moba", top=1, sinks=sinks).near
    counts = selector.near(inputs, all_blocks(inputs)).counts(400, 400)
    assert torch.equal(counts > 0, selector.keep(inputs)) and int(counts.max()) == 1
    assert bool((counts[:, :, start + sinks :, start : start + sinks] == 1).all())


def test_moba_chooses_for_every_query_on_its_own() -> None:
    """Two kinds of queries in turn, each with a block of its own to find."""
    inputs = text(64 * 9)
    key, query = inputs.key.clone(), inputs.query.clone()
    wanted = torch.nn.functional.one_hot(torch.tensor([2, 5]), 16).to(key) * 9
    query[:, :, 512:] = wanted[torch.arange(64) % 2]
    for block, direction in zip((1, 4), wanted, strict=True):
        key[:, :, 64 * block : 64 * (block + 1)] = direction
    inputs = dataclasses.replace(inputs, key=key, query=query)
    kept = method("moba", top=1).near.keep(inputs)[:, :, 512:]
    assert bool(kept[:, :, 0::2, 64:128].all()) and not bool(kept[:, :, 1::2, 64:128].any())
    assert bool(kept[:, :, 1::2, 256:320].all()) and not bool(kept[:, :, 0::2, 256:320].any())
