"""What the source of each method promises: exact limits, rates, theorems and hazards."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from tests.attention import all_blocks, error, moments, pair, run, text

from attnplan.kernels import catalog
from attnplan.kernels.compressors._chunk_slots import ChunkCompressor
from attnplan.kernels.compressors.sampled_columns import SampledColumns
from attnplan.kernels.compressors.wildcat import _pivots
from attnplan.kernels.engines.cpu import prefill as cpu_prefill
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.numerics import balance
from attnplan.kernels.numerics.clustering import pick, spread
from attnplan.kernels.numerics.gaussian import gaussian
from attnplan.kernels.selectors._scored_blocks import BlockGrid, first_masses, pooled_queries
from attnplan.kernels.selectors._static_pattern import causal
from attnplan.kernels.selectors.antidiagonal import Antidiagonal
from attnplan.kernels.selectors.block_topk import BlockTopK
from attnplan.kernels.selectors.heavy_hitters import HeavyHitters
from attnplan.kernels.selectors.leverage import leverage_scores, online_scores
from attnplan.kernels.selectors.random_blocks import RandomBlocks

FAR = [name for name, cls in catalog.FAR.items() if issubclass(cls, ChunkCompressor)]


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("wildcat", {}),
        ("nystrom", {"ridge": 12}),
        ("attention_matching", {}),
        ("centroid_t", {}),
        ("multipole", {}),
        ("sampled_columns", {"uniform": 100}),
    ],
    ids=["wildcat", "nystrom", "attention_matching", "centroid_t", "multipole", "sampled_columns"],
)
def test_one_landmark_per_key_is_exact(name: str, knobs: dict[str, int]) -> None:
    assert error(pair(name, chunk=64, slots=64, **knobs), text()) < 1e-6


@pytest.mark.parametrize("name", ["wildcat", "centroid_t", "multipole"])
def test_a_slot_per_distinct_key_is_exact(name: str) -> None:
    inputs = text()
    key = inputs.key.clone()
    key[:, :, 4:] = inputs.key[:, :, torch.arange(496) % 3]
    inputs = dataclasses.replace(inputs, key=key)
    assert error(pair(name, chunk=64, slots=8), inputs) < 1e-6


@pytest.mark.parametrize("name", [name for name in FAR if name != "linformer"])
def test_more_slots_lose_less(name: str) -> None:
    inputs = text()
    errors = [error(pair(name, chunk=64, slots=slots), inputs) for slots in (2, 8, 32)]
    dropped = error(catalog.from_dict({"near": {"name": "window", "window": 32}}), inputs)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5 * dropped


def test_seeds_of_clusters_differ_and_stay_where_they_do() -> None:
    weight = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)).double() ** 20
    for count in (1, 7, 39, 40):
        picked, _ = pick(weight, count, 0.1)
        apart = spread(picked, 40)
        assert bool((apart[:, 1:] > apart[:, :-1]).all())
        assert int(apart.min()) >= 0 and int(apart.max()) < 40
    lonely = torch.tensor([[0, 3, 9]])
    assert torch.equal(spread(lonely, 40), lonely)
    assert spread(torch.tensor([[2, 2, 2, 38, 39, 39]]), 40).tolist() == [[2, 3, 4, 37, 38, 39]]


def test_sampled_sums_are_right_on_average() -> None:
    """Masses and values over many seeds, within four standard errors, whatever the chances."""
    inputs, seeds = text(200), 300
    far = [SampledColumns(64, 4, 30, seed=seed) for seed in range(seeds)]
    sums = []
    for one in far:
        slots = one.compress(inputs, 2, (4,) * 4)
        assert slots is not None
        weight = (inputs.query[:, :, -1:] @ slots.key.mT * inputs.scale)[:, :, 0] + slots.log_weight
        sums.append((weight.exp()[..., None] * slots.value).sum(2))
    found = torch.stack(sums)
    heads = list(inputs.kv_head)
    exact = (inputs.query[:, :, -1:] @ inputs.key[:, heads, 4:128].mT * inputs.scale).exp()
    exact = (exact @ inputs.value[:, heads, 4:128])[:, :, 0]
    error = found.std(0) / seeds**0.5
    assert float(((found.mean(0) - exact).abs() / error).square().mean()) < 1.6


def test_every_seed_draws_other_blocks() -> None:
    drawn = {RandomBlocks(64, 3, seed=seed).reach(64 * 40, 64 * 41 - 1)[-1] for seed in range(8)}
    assert len(drawn) > 4


def test_draws_do_not_depend_on_what_follows() -> None:
    inputs = text(300)
    slots = [SampledColumns(64, 4).compress(inputs, chunks, (4,) * 4) for chunks in (2, 4)]
    assert slots[0] is not None and slots[1] is not None
    torch.testing.assert_close(slots[1].key[:, :, :8], slots[0].key[:, :, :8])


def test_sampled_sums_converge_with_the_square_root_of_the_sample() -> None:
    """Independent keys, equal chances: the error of a mean of n falls as 1 / sqrt(n)."""
    sizes = (8, 16, 32, 64)
    errors = [
        np.mean(
            [
                error(pair("sampled_columns", chunk=512, slots=n, uniform=100), text(700, seed=s))
                for s in range(3)
            ]
        )
        for n in sizes
    ]
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.2)


def test_centroids_never_count_more_mass_than_their_keys() -> None:
    """Jensen: n e^{q.mean k} <= sum e^{q.k}."""
    inputs = text()
    approximation = pair("multipole", chunk=64, slots=8)
    tiles, slots = approximation.tiles(inputs, all_blocks(inputs))
    options = {"scale": inputs.scale, "kv_head": inputs.kv_head}
    tensors = (inputs.query, inputs.key, inputs.value)
    _, mass = reference_prefill.attend(*tensors, **options, tiles=tiles, slots=slots)  # type: ignore[arg-type]
    all_keys = catalog.DENSE.tiles(inputs, all_blocks(inputs))[0]
    _, true = reference_prefill.attend(*tensors, **options, tiles=all_keys)  # type: ignore[arg-type]
    assert bool((mass <= true + 1e-12).all()) and bool((mass < true - 1e-3).any())


def test_balancing_keeps_products_and_shortens_vectors() -> None:
    inputs = text(4000)
    inputs = dataclasses.replace(inputs, key=inputs.key * 5)
    fitted = balance.fit(moments(inputs.query, inputs.key))
    query_map, key_map = (fitted[f"balanced.{n}"].double() for n in ("query_map", "key_map"))
    torch.testing.assert_close(
        query_map @ key_map.mT, torch.eye(16).double().expand(4, 16, 16), rtol=0, atol=1e-5
    )
    query = inputs.query[0] - inputs.query[0].mean(1, keepdim=True)
    key = inputs.key[0, list(inputs.kv_head)]
    key = key - key.mean(1, keepdim=True)
    plain = (query.square().sum(-1) + key.square().sum(-1)).mean()
    balanced = (query @ query_map).square().sum(-1) + (key @ key_map).square().sum(-1)
    assert float(balanced.mean()) < 0.5 * float(plain)


def test_pivots_factor_the_kernel() -> None:
    """F F^T is the Nystrom approximation K_:S K_SS^-1 K_S: on the drawn keys."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    drawn, factor = _pivots(x, torch.rand(2, 40, generator=generator).double(), 12)
    for row in range(2):
        kernel, s = gaussian(x[row], x[row]), drawn[row]
        assert len(set(s.tolist())) == 12
        exact = kernel[:, s] @ torch.linalg.solve(kernel[s][:, s], kernel[s])
        torch.testing.assert_close(factor[row] @ factor[row].mT, exact, rtol=0, atol=1e-9)


def test_leverage_is_the_diagonal_of_the_hat_matrix() -> None:
    key = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(1)).double()
    for row, scores in zip(key.numpy(), leverage_scores(key), strict=True):
        np.testing.assert_allclose(np.diag(row @ np.linalg.pinv(row)), scores, atol=1e-4)


def test_every_heavy_key_of_squared_attention_has_leverage() -> None:
    """(q.k_j)^2 >= e sum_l (q.k_l)^2 implies a leverage of at least e."""
    generator = torch.Generator().manual_seed(2)
    key = torch.randn(200, 8, generator=generator).double() * torch.rand(200, 1) ** 3
    query = torch.randn(5000, 8, generator=generator).double()
    squares = (query @ key.mT).square()
    share = (squares / squares.sum(-1, keepdim=True)).amax(0)
    scores = leverage_scores(key)
    assert bool((share <= scores * (1 + 1e-3) + 1e-9).all())
    assert float(scores.sum()) <= 8 + 1e-9


def test_quest_scores_bound_every_key() -> None:
    inputs = text(320)
    quest = catalog.from_dict({"near": {"name": "quest", "top": 1}}).near
    inputs = dataclasses.replace(inputs, query=inputs.query[:, :, :1].expand(-1, -1, 320, -1))
    scores = quest.scores(inputs, torch.arange(5))  # type: ignore[attr-defined]
    exact = inputs.query[:, :, :1] @ inputs.key[:, list(inputs.kv_head)].mT
    best = exact.unflatten(3, (5, 64)).amax(4)
    assert bool((scores >= best.expand_as(scores) - 1e-9).all())


@pytest.mark.parametrize("start", [0, 70])
def test_block_topk_scores_by_the_queries_up_to_the_first_of_a_block(start: int) -> None:
    inputs = dataclasses.replace(text(64 * 8), start=(start,))
    sink, method, blocks = start // 64, BlockTopK(2, 1), torch.arange(8)
    worth = method.worth(inputs, blocks, BlockGrid.of(inputs, blocks))
    for head, block, other in itertools.product(range(4), range(8), range(8)):
        if not sink < other < block:
            continue
        first = 64 * block
        query = inputs.query[0, head, max(first - 15, start) : first + 1].mean(0)
        keys = inputs.key[0, head // 2].unflatten(0, (8, 64)).mean(1)
        known = [j for j in (other - 1, other) if j > sink]
        expected = sum(math.exp(inputs.scale * float(query @ keys[j])) for j in known)
        assert float(worth[0, head, block, other]) == pytest.approx(math.log(expected), abs=1e-9)


@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (3, 1)])
def test_masses_of_blocks_are_those_of_their_keys(heads: tuple[int, ...]) -> None:
    whole = text(500)
    masses = first_masses(whole.heads(heads), torch.tensor([7, 2, 4]))
    for row, head in enumerate(heads):
        for n, block in enumerate((7, 2, 4)):
            query, key = whole.query[0, head, 64 * block], whole.key[0, head // 2]
            weight = (whole.scale * key[: 64 * block] @ query).exp()
            mass = weight.view(-1, 64).sum(1).log()
            torch.testing.assert_close(masses[0, row, n, :block], mass, rtol=0, atol=1e-12)


def test_masses_of_blocks_do_not_overflow() -> None:
    inputs = text(320)
    far = dataclasses.replace(inputs, query=inputs.query.float() * 1e4, key=inputs.key.float())
    assert bool(first_masses(far, torch.arange(5)).isfinite().all())


@pytest.mark.parametrize("padding", [0, 100])
def test_quest_asks_with_the_mean_of_the_queries_up_to_the_first(padding: int) -> None:
    inputs = dataclasses.replace(text(320), start=(padding,))
    pooled = pooled_queries(inputs, torch.arange(2, 5))
    for n, first in enumerate((128, 192, 256)):
        asking = inputs.query[0, :, max(first - 15, padding) : first + 1]
        torch.testing.assert_close(pooled[0, :, n], asking.mean(1), rtol=0, atol=1e-12)


def test_antidiagonal_scores_by_antidiagonals_and_the_first_query_of_a_block() -> None:
    inputs, method = text(64 * 6), Antidiagonal(2, 1, stride=8)
    scores = method.scores(inputs, torch.arange(6))
    for head, block in itertools.product(range(4), range(2, 6)):
        first, key = 64 * block, inputs.key[0, head // 2, 64 : 64 * block]
        exact = torch.softmax(inputs.scale * key @ inputs.query[0, head, first], 0)
        asking = inputs.query[0, head, first - 7 : first + 1]
        groups = [
            inputs.scale / 8 * sum(asking[7 - n] @ key[8 * g + n] for n in range(8))
            for g in range(len(key) // 8)
        ]
        sums = torch.softmax(torch.stack(groups), 0)
        expected = exact.view(-1, 64).sum(1) + sums.view(-1, 8).sum(1)
        torch.testing.assert_close(scores[0, head, block, 1:block], expected, rtol=0, atol=1e-12)


def test_antidiagonals_find_a_planted_block() -> None:
    inputs = text(64 * 12)
    key = inputs.key.clone()
    key[:, :, 64 * 4 : 64 * 5] += 4 * inputs.query[:, ::2, 64 * 11 :][:, :, :1]
    inputs = dataclasses.replace(inputs, key=key)
    method = catalog.from_dict({"near": {"name": "antidiagonal", "top": 1}}).near
    assert bool(method.keep(inputs)[:, ::2, 64 * 11 :, 64 * 4 : 64 * 5].all())


def test_heavy_hitters_find_a_planted_key() -> None:
    inputs = text()
    key = inputs.key.clone()
    key[:, :, 77] = 10 * inputs.query[:, ::2].mean(2)
    inputs = dataclasses.replace(inputs, key=key)
    method = catalog.from_dict({"near": {"name": "heavy_hitters", "top": 5, "segment": 128}}).near
    assert bool(method.keep(inputs)[:, :, 400:, 77].all())


def test_heavy_hitters_accumulate_what_is_attended_to_anyway() -> None:
    """Against H2O with a choice per segment, key by key; the last rows stand before no segment."""
    inputs = text(300)
    method = HeavyHitters(5, 8, 32, 4, observers=8, accumulate=1)
    kept = method.keep(inputs)
    for head, kv_head in enumerate(inputs.kv_head):
        logits = inputs.query[0, head] @ inputs.key[0, kv_head].mT * inputs.scale
        score, chosen = torch.zeros(300, dtype=torch.float64), []
        for end in range(32, 300, 32):
            recent = [j for j in range(max(end - 40, 0), end) if j >= 4]
            read = sorted({*range(4), *chosen, *recent})
            for i in range(end - 29, end, 4):  # every fourth query of the segment before `end`
                seen = [j for j in read if j <= i]
                score[seen] += logits[i, seen].softmax(0)
            aged = sorted({*chosen, *(j for j in recent if j < end - 8)}, reverse=True)
            chosen = sorted(aged, key=lambda j: -float(score[j]))[:5]
            for i in range(end, min(end + 32, 300)):
                want = {*range(4), *chosen, *range(end - 8, i + 1)}
                assert set(torch.nonzero(kept[0, head, i])[:, 0].tolist()) == want


def test_votes_of_a_continued_cache_begin_where_its_queries_do() -> None:
    """Without a vote the latest keys stay."""
    inputs = text(300)
    inputs = dataclasses.replace(inputs, query=inputs.query[:, :, 230:])
    kept = HeavyHitters(5, 8, 32, 4, observers=8, accumulate=1).keep(inputs)
    assert bool((kept[:, :, :26].sum(-1) > 0).all())
    assert set(torch.nonzero(kept[0, 0, 0])[:, 0].tolist()) == {
        *range(4), *range(211, 216), *range(216, 231)
    }  # fmt: skip


def test_online_leverage_is_that_of_the_keys_so_far() -> None:
    """In the last of the segments it is the leverage among all keys."""
    key = torch.randn(2, 200, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = online_scores(key, 64)
    assert found.shape == (2, 192)
    for end in (64, 128, 192):
        among = leverage_scores(key[:, :end])[:, end - 64 :]
        torch.testing.assert_close(found[:, end - 64 : end], among)


def test_more_hash_rounds_hold_more_mass() -> None:
    inputs = text()
    errors = [
        error(
            catalog.from_dict({"near": {"name": "lsh", "buckets": 8, "rounds": r, "top": 64}}),
            inputs,
        )
        for r in (1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_a_bucket_holds_more_mass_than_as_many_random_keys() -> None:
    """Mass of a query's own bucket against its share of the keys."""
    inputs = text(1000)
    method = catalog.from_dict(
        {"near": {"name": "lsh", "buckets": 8, "rounds": 1, "top": 1000, "window": 1, "sinks": 0}}
    ).near
    kept = method.keep(inputs)[:, :, 500:]
    logits = inputs.query[:, :, 500:] @ inputs.key[:, list(inputs.kv_head)].mT * inputs.scale
    mass = torch.softmax(logits.masked_fill(~causal(inputs)[:, :, 500:], float("-inf")), -1)
    held = float((mass * kept).sum(-1).mean())
    keys = float((kept.sum(-1) / causal(inputs)[:, :, 500:].sum(-1)).mean())
    assert held > 1.2 * keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAR)
def test_hazards_give_finite_numbers(name: str, dtype: torch.dtype) -> None:
    """A key of huge norm, equal keys and far queries in a far chunk, in low precision."""
    inputs = text(dtype=dtype)
    key, query = inputs.key.clone(), inputs.query.clone()
    key[:, :, 70] *= 60
    key[:, :, 80:120] = key[:, :, 80:81]
    query[:, :, 300:310] *= 8
    inputs = dataclasses.replace(inputs, key=key, query=query)
    chunk = 128 if name == "linformer" else 64  # it is fitted for one size
    output = run(pair(name, chunk=chunk, slots=8), inputs, cpu_prefill.attend)
    assert bool(output.isfinite().all())
    assert float(output.float().abs().amax()) < 50 * float(inputs.value.float().abs().amax())
