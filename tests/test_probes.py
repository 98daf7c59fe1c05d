"""Probes against dense float64 formulas; statistics that merge; profiles of heads."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnplan.profiles.capture.capture import LayerCapture
from attnplan.profiles.records.records import HeadProfile
from attnplan.profiles.records.scalars import ARRAY_NAMES, SCALAR_NAMES
from attnplan.profiles.statistics import attention_rows, probes, spectra
from attnplan.profiles.statistics.attention_rows import attend, log_rows
from attnplan.profiles.statistics.clusters import cluster_inertia
from attnplan.profiles.statistics.head_profile import finalise
from attnplan.profiles.statistics.layer_statistics import (
    LATER,
    LayerStatistics,
    measure,
    measure_layers,
    merge,
    merge_all,
    moments,
)

SCALE = 0.4
shapes = st.fixed_dictionaries(
    {
        "kv_heads": st.integers(1, 2),
        "group": st.integers(1, 3),
        "tokens": st.one_of(st.integers(1, 10), st.integers(60, 70), st.integers(120, 420)),
        "head_dim": st.sampled_from([1, 4, 7, 16]),
        "spread": st.sampled_from([0.1, 1.0, 5.0, 1000.0]),
        "seed": st.integers(0, 99),
    }
)


def vectors(
    kv_heads: int, group: int, tokens: int, head_dim: int, spread: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 query [heads, tokens, head_dim], key and value [kv_heads, tokens, head_dim]."""
    generator = torch.Generator().manual_seed(seed)

    def randn(heads: int) -> Tensor:
        return torch.randn(heads, tokens, head_dim, generator=generator, dtype=torch.float64)

    return spread * randn(kv_heads * group) + 0.3, randn(kv_heads) + 0.5, randn(kv_heads)


def dense(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores (-inf above the diagonal) and probabilities [heads, tokens, tokens], and i, j."""
    tokens = query.shape[1]
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    scores = (query @ key.mT * SCALE).masked_fill(j > i, -math.inf)
    return scores, scores.softmax(-1), i, j


def by_blocks(p: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(p, (0, -p.shape[2] % 64))
    return padded.view(*p.shape[:2], -1, 64).sum(3)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_masses_and_entropies_are_those_of_dense_attention(shape: dict[str, int]) -> None:
    query, key, _ = vectors(**shape)
    scores, p, i, j = dense(query, key)
    found = probes.probe(query, key, scale=SCALE, rank=8)
    far = p * ((i - j >= 128) & (j >= 4))

    close(found.sink_mass, p[:, :, :4].sum((1, 2)))
    close(found.sink_mass_64, p[:, :, :64].sum((1, 2)))
    for w, window in enumerate(probes.WINDOWS):
        close(found.local_mass[:, w], (p * (i - j < window)).sum((1, 2)))
    close(found.far_mass, far.sum((1, 2)))
    best = by_blocks(far).sort(dim=2, descending=True).values
    for t, top in enumerate(probes.TOPS):
        close(found.top_block_mass[:, t], best[:, :, :top].sum((1, 2)))
    columns = far.sum(1).sort(dim=1, descending=True).values
    close(found.vertical_mass, columns[:, :32].sum(1))
    lines = [far.diagonal(-back, 1, 2).sum(1) for back in range(shape["tokens"])]
    close(found.slash_mass, torch.stack(lines, 1).sort(1, descending=True).values[:, :32].sum(1))
    close(found.entropy, -torch.special.xlogy(p, p).sum(2))
    close(found.collision, p.square().sum(2))
    close(found.max_logit, scores.amax((1, 2)))
    close(found.heat, by_blocks(by_blocks(p).mT).mT)
    assert found.cell == 64


@settings(max_examples=20, deadline=None)
@given(shapes)
def test_entropies_of_the_row_probes_equal_the_two_designed_value_formulas(
    shape: dict[str, int],
) -> None:
    """H_i = lse_i - scale q_i.(A K)_i, and log sum_j p^2 = lse_i(2 scale) - 2 lse_i(scale)."""
    shape["spread"] = 1
    query, key, _ = vectors(**shape)
    found = probes.probe(query, key, scale=SCALE)
    mean_key, mass = attend(query, key, key, scale=SCALE)
    _, doubled = attend(query, key, key, scale=2 * SCALE)
    close(found.entropy, mass - SCALE * (query * mean_key).sum(2))
    close(found.collision.log(), doubled - 2 * mass)


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(1, 40))
def test_attention_with_any_values_is_exact_on_both_paths(
    shape: dict[str, int], columns: int
) -> None:
    query, key, _ = vectors(**shape)
    scores, p, _, _ = dense(query, key)
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(columns, len(key), key.shape[1], generator=generator).double()
    value = value.permute(1, 2, 0)  # strides as awkward as they come
    expected = p @ value.repeat_interleave(shape["group"], dim=0)
    for way in (attend, attention_rows._attend_in_chunks):
        output, mass = way(query, key, value, scale=SCALE)
        close(output, expected)
        close(mass, scores.logsumexp(2))


@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (100, 3), (5000, 1), (5000, 6)])
def test_chunks_of_rows_stay_small(tokens: int, heads: int) -> None:
    query = torch.zeros(heads, tokens, 4)
    mass = torch.arange(1, tokens + 1).log().expand(heads, -1)
    seen = 0
    for first, log_p in log_rows(query, torch.zeros(tokens, 4), mass, 1.0):
        assert first == seen
        assert log_p.numel() <= max(attention_rows.CHUNK, 64 * heads * (tokens + 63))
        seen += log_p.shape[1]
    assert tokens <= seen < tokens + 64


def test_huge_logits_in_float32_leave_probabilities_finite_and_masses_right() -> None:
    query, key, _ = vectors(1, 2, 300, 16, 3000.0, 0)
    _, p, i, j = dense(query, key)
    found = probes.probe(query.float(), key.float(), scale=SCALE)
    for tensor in (found.entropy, found.collision, found.energy, found.heat):
        assert tensor.isfinite().all()
    expected = (p * (i - j < 64)).sum((1, 2))
    torch.testing.assert_close(found.local_mass[:, 0], expected, rtol=5e-3, atol=0)
    # scores near 1e4 have float32 spacing 1e-3: probabilities are good to about that


def test_bfloat16_tensors_are_probed_in_float32() -> None:
    query, key, _ = (t.bfloat16() for t in vectors(1, 2, 200, 16, 1.0, 0))
    low = probes.probe(query, key, scale=SCALE)
    high = probes.probe(query.double(), key.double(), scale=SCALE)
    torch.testing.assert_close(low.entropy, high.entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(low.energy, high.energy, rtol=1e-3, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(shapes)
def test_singular_values_are_exact_when_all_are_asked_for(shape: dict[str, int]) -> None:
    shape["tokens"] = min(shape["tokens"], 90)
    query, key, _ = vectors(**shape)
    found = probes.probe(query, key, scale=SCALE, rank=90)
    exact = torch.linalg.svdvals(dense(query, key)[1]).square()
    torch.testing.assert_close(found.energy, exact, rtol=1e-7, atol=1e-9)


def test_leading_singular_values_are_close_lower_bounds() -> None:
    query, key, _ = vectors(2, 2, 420, 16, 1.0, 0)
    found = probes.probe(query, key, scale=SCALE, rank=64).energy
    exact = torch.linalg.svdvals(dense(query, key)[1]).square()[:, :64]
    assert bool((found <= exact * (1 + 1e-9)).all())
    assert bool((found[:, :16] >= 0.9 * exact[:, :16]).all())
    torch.testing.assert_close(found[:, 0], exact[:, 0], rtol=2e-3, atol=0)


def test_slash_and_vertical_mass_tell_a_diagonal_from_a_column() -> None:
    tokens = 400
    one_hot = torch.eye(tokens, dtype=torch.float64)[None]
    previous = one_hot.roll(-200, 1)  # query i looks like key i - 200
    found = probes.probe(60 * previous, one_hot, scale=1.0)
    diagonal, everything = found.slash_mass[0], found.far_mass[0]
    assert float(everything) > 150 and float(diagonal / everything) > 0.95
    column = one_hot[:, 50:51].expand(-1, tokens, -1)  # every query looks for key 50
    found = probes.probe(60 * column, one_hot, scale=1.0)
    assert float(found.vertical_mass[0]) > 200
    assert float(found.vertical_mass[0] / found.far_mass[0]) > 0.99


def test_heat_maps_of_long_texts_have_coarser_cells() -> None:
    query, key, _ = vectors(1, 1, 64 * 64 + 1, 4, 1.0, 0)
    found = probes.probe(query.float(), key.float(), scale=SCALE, rank=4)
    assert found.cell == 128 and found.heat.shape == (1, 33, 33)
    rows = found.heat.sum(2)[0]
    expected = torch.full((33,), 128.0, dtype=torch.float64)
    expected[32] = 1
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=0)  # float32 sums


def test_inertia_is_zero_for_repeated_points_and_small_for_tight_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(1, 4, 8, generator=generator)
    points = centres.repeat(2, 50, 1)
    within, total = cluster_inertia(points, clusters=64)
    assert bool((within < 1e-3 * total).all())
    noisy = points + 0.1 * torch.randn(points.shape, generator=generator)
    within, total = cluster_inertia(noisy, clusters=64)
    assert bool((within < 1e-3 * total).all())
    uniform = torch.randn(1, 4000, 32, generator=generator)
    within, total = cluster_inertia(uniform, clusters=64)
    assert 0.7 < float(within / total) < 1.0
    within, total = cluster_inertia(uniform, clusters=1)
    torch.testing.assert_close(within, total, rtol=1e-5, atol=0)


def statistics_of(tokens: int, seed: int, **optional: bool) -> LayerStatistics:
    query, key, value = vectors(2, 2, tokens, 8, 1.0, seed)
    output, _ = attend(query, key, value, scale=SCALE)
    generator = torch.Generator().manual_seed(seed)
    slope = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return measure(
        3,
        query[None],
        key[None],
        value[None],
        output[None],
        scale=SCALE,
        gradient=slope[None] if optional.get("gradient", True) else None,
        projection=torch.arange(1.0, 5.0) if optional.get("projection", True) else None,
        query_pre_gram=query.mT @ query if optional.get("pre_rope", True) else None,
        key_pre_gram=key.mT @ key if optional.get("pre_rope", True) else None,
    )


@pytest.fixture(scope="module")
def texts() -> list[LayerStatistics]:
    """Texts of many lengths; one is long enough for coarser heat cells."""
    return [statistics_of(n, seed) for seed, n in enumerate([1, 63, 64, 200, 333, 64 * 64 + 5])]


def assert_same(a: LayerStatistics, b: LayerStatistics) -> None:
    assert a.arrays.keys() == b.arrays.keys()
    for name, x in a.arrays.items():
        scale = np.abs(x).max()
        np.testing.assert_allclose(x, b.arrays[name], rtol=1e-12, atol=1e-13 * scale, err_msg=name)
        if "counts" in name or "queries" in name or name in ("texts", "heat_cell"):
            assert np.array_equal(x, b.arrays[name]), name


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(6)), cuts=st.sets(st.integers(1, 5)))
def test_any_split_and_order_of_the_texts_merges_to_the_same_statistics(
    texts: list[LayerStatistics], order: list[int], cuts: set[int]
) -> None:
    edges = [0, *sorted(cuts), 6]
    shards = [merge_all([texts[t] for t in order[a:b]]) for a, b in itertools.pairwise(edges)]
    assert_same(merge_all(shards[::-1]), merge_all(texts))


def test_every_sum_is_the_sum_and_every_maximum_the_maximum(texts: list[LayerStatistics]) -> None:
    a, b = texts[3], texts[4]
    both = merge(a, b).arrays
    for name, x in a.arrays.items():
        if name == "heat_cell":
            continue
        expected = np.maximum(x, b.arrays[name]) if "max" in name else x + b.arrays[name]
        np.testing.assert_array_equal(both[name], expected, err_msg=name)


def test_statistics_survive_bytes(texts: list[LayerStatistics]) -> None:
    again = LayerStatistics.from_bytes(texts[3].to_bytes())
    assert (again.layer, again.scale, again.heads, again.kv_heads) == (3, SCALE, 4, 2)
    assert_same(again, texts[3])


def test_different_layers_do_not_merge(texts: list[LayerStatistics]) -> None:
    other = LayerStatistics(4, SCALE, texts[0].arrays)
    with pytest.raises(ValueError, match="different layers"):
        merge(texts[0], other)


def test_moments_are_means_over_all_queries_and_keys_of_all_texts() -> None:
    parts = [vectors(2, 2, n, 8, 1.0, seed) for seed, n in ((0, 50), (1, 70))]
    found = moments(merge(statistics_of(50, 0), statistics_of(70, 1)))
    query, key = (torch.cat([p[x] for p in parts], dim=1) for x in (0, 1))
    torch.testing.assert_close(found.query_mean, query.mean(1).float())
    torch.testing.assert_close(found.key_mean, key.mean(1).float())
    torch.testing.assert_close(found.query_gram, (query.mT @ query / 120).float())
    torch.testing.assert_close(found.key_gram, (key.mT @ key / 120).float())


def test_keys_are_multiplied_by_their_positions_in_complete_chunks() -> None:
    parts = [vectors(2, 2, n, 8, 1.0, seed)[1] for seed, n in ((0, 300), (1, 130), (2, 127))]
    found = moments(merge_all([statistics_of(n, s) for s, n in enumerate((300, 130, 127))]))
    rows = torch.cat([parts[0][:, :256].unflatten(1, (2, 128)), parts[1][:, None, :128]], 1)
    expected = torch.einsum("hcid,hcjd->hij", rows, rows) / 3
    assert found.key_position_gram is not None
    torch.testing.assert_close(found.key_position_gram, expected.float())


def test_statistics_stored_without_positions_merge_with_later_ones() -> None:
    new = statistics_of(300, 0)
    old = LayerStatistics(
        3, SCALE, {k: x for k, x in statistics_of(200, 1).arrays.items() if k not in LATER}
    )
    assert moments(old).key_position_gram is None
    assert moments(statistics_of(100, 0)).key_position_gram is None
    for both in (merge(new, old), merge(old, new)):
        assert both.arrays["queries"][0] == 500 and both.arrays["position_chunks"][0] == 2
        np.testing.assert_array_equal(
            both.arrays["key_position_gram"], new.arrays["key_position_gram"]
        )


def test_layers_measured_at_once_are_measured_alike() -> None:
    layers = []
    for layer in range(5):
        query, key, value = (t[None].float() for t in vectors(2, 2, 150, 8, 1.0, layer))
        output = attend(query[0], key[0], value[0], scale=SCALE)[0][None]
        layers.append(LayerCapture(layer, "", query, key, value, output, SCALE, output))
    threads = torch.get_num_threads()
    together = measure_layers(layers, seed=4)
    assert torch.get_num_threads() == threads
    for a, found in zip(layers, together, strict=True):
        alone = measure(
            a.layer, a.query, a.key, a.value, a.output, scale=SCALE, gradient=a.output, seed=4
        )
        assert found.layer == a.layer
        for name, x in alone.arrays.items():
            np.testing.assert_allclose(found.arrays[name], x, rtol=1e-4, atol=1e-4, err_msg=name)
    assert measure_layers([]) == []


def profile_of(*parts: LayerStatistics) -> list[HeadProfile]:
    return finalise(merge_all(parts))


def test_a_profile_has_every_name_and_finite_numbers(texts: list[LayerStatistics]) -> None:
    for head, profile in enumerate(profile_of(*texts)):
        assert (profile.layer, profile.head) == (3, head)
        assert tuple(profile.scalars) == SCALAR_NAMES and tuple(profile.arrays) == ARRAY_NAMES
        assert all(math.isfinite(x) for x in profile.scalars.values())
        assert all(np.isfinite(x).all() for x in profile.arrays.values())
        assert profile.arrays["block_heat"].shape == (33, 33)
        np.testing.assert_allclose(profile.arrays["block_heat"].sum(1), 1)


def test_a_profile_of_one_text_is_the_dense_formulas() -> None:
    tokens = 300
    query, key, value = vectors(2, 2, tokens, 8, 1.0, 7)
    scores, p, i, j = dense(query, key)
    output = p @ value.repeat_interleave(2, dim=0)
    generator = torch.Generator().manual_seed(7)
    slope = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    entropy = -torch.special.xlogy(p, p).sum(2)
    sigma = torch.linalg.svdvals(p)
    far = p * ((i - j >= 128) & (j >= 4))
    for head, profile in enumerate(profile_of(statistics_of(tokens, 7))):
        norm = key[head // 2].norm(dim=1)
        gram = np.linalg.eigvalsh((key[head // 2].T @ key[head // 2] / tokens).numpy())[::-1]
        expected = {
            "sink_mass": p[head, :, :4].sum(1).mean(),
            "sink_mass_64": p[head, :, :64].sum(1).mean(),
            "local_mass_128": (p[head] * (i - j < 128)).sum(1).mean(),
            "sink_local_mass": (p[head] * ((i - j < 128) | (j < 4))).sum(1).mean(),
            "top_block_mass_1": by_blocks(far)[head].amax(1).mean(),
            "entropy": entropy[head].mean(),
            "collision_entropy": -p[head].square().sum(1).log().mean(),
            "effective_keys": (1 / p[head].square().sum(1)).mean(),
            "max_logit": scores[head].max(),
            "output_energy": output[head].square().sum(1).mean(),
            "fisher_total": (slope[head] * output[head]).sum(1).square().mean(),
            "k_effective_rank": spectra.effective_rank(gram),
            "v_rank90": spectra.energy_rank(
                np.linalg.eigvalsh((value[head // 2].T @ value[head // 2]).numpy())[::-1], 0.9
            ),
            "value_spread": (value[head // 2] - value[head // 2].mean(0)).square().sum()
            / value[head // 2].square().sum(),
        }
        for name, x in expected.items():
            assert profile.scalars[name] == pytest.approx(float(x), rel=1e-6), name
        rough = {  # bins of 1/16 octave; a sketch of rank 64
            "key_norm_ratio": (float(norm.max() / norm.median()), 0.2),
            "a_stable_rank": (float(sigma[head].square().sum() / sigma[head, 0] ** 2), 0.02),
        }
        for name, (x, error) in rough.items():
            assert profile.scalars[name] == pytest.approx(x, abs=error), name
        for name, share in (("entropy_p10", 0.1), ("entropy_p90", 0.9)):
            low = float(entropy[head].quantile(share, interpolation="lower"))
            high = float(entropy[head].quantile(share, interpolation="higher"))
            assert low - 1 / 32 <= profile.scalars[name] <= high + 1 / 32
        exact = spectra.effective_rank(sigma[head].numpy())
        assert 0.5 * exact < profile.scalars["a_effective_rank"] < 1.2 * exact
        np.testing.assert_allclose(profile.arrays["k_spectrum"], gram)
        assert profile.scalars["q_pre_rank95"] == profile.scalars["q_rank95"]


def test_what_a_model_does_not_tell_is_nan_and_fisher_falls_back_to_the_projection() -> None:
    for head, profile in enumerate(
        profile_of(statistics_of(40, 0, gradient=False, pre_rope=False))
    ):
        scalars = profile.scalars
        assert math.isnan(scalars["q_pre_rank95"]) and math.isnan(scalars["k_pre_rank95"])
        assert math.isnan(scalars["vertical_mass"])  # 40 tokens have no far keys
        expected = (head + 1) ** 2 * scalars["output_energy"]
        assert scalars["fisher_total"] == pytest.approx(expected)
    blind = profile_of(statistics_of(40, 0, gradient=False, projection=False))[0]
    assert math.isnan(blind.scalars["fisher_total"])


def test_ranks_count_dimensions() -> None:
    energy = np.array([6.0, 3.0, 0.9, 0.1])
    assert [spectra.energy_rank(energy, s) for s in (0.6, 0.9, 0.95, 0.99, 1)] == [1, 2, 3, 3, 4]
    assert spectra.effective_rank(np.ones(5)) == pytest.approx(5)
    assert spectra.energy_rank(np.zeros(3), 0.9) == spectra.effective_rank(np.zeros(3)) == 0
    assert spectra.decay_exponent(np.arange(1, 20) ** -1.5) == pytest.approx(1.5)


def test_an_unknown_tail_counts_as_dimensions_of_the_last_known_size() -> None:
    known = np.full(4, 1.0)
    assert spectra.truncated_effective_rank(known, 10.0, 100) == pytest.approx(10)
    assert spectra.truncated_effective_rank(known, 4.0, 100) == pytest.approx(4)
    assert spectra.truncated_effective_rank(known, 4.0, 4) == pytest.approx(4)
    rng = np.random.default_rng(0)
    for _ in range(50):
        energy = np.sort(rng.gamma(0.3, size=40))[::-1]
        truth = spectra.effective_rank(np.sqrt(energy))
        bound = spectra.truncated_effective_rank(energy[:10], float(energy.sum()), 40)
        assert bound <= truth * (1 + 1e-9)


def test_balanced_scores_hold_the_variance_of_scores_and_the_least_norm() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 6))
    query_cov, key_cov = a @ a.T, b @ b.T
    values = spectra.balanced_scores(query_cov, key_cov)
    assert float((values**2).sum()) == pytest.approx(np.trace(query_cov @ key_cov))
    for _ in range(20):
        change = rng.normal(size=(6, 6))
        inverse = np.linalg.inv(change)
        total = np.trace(change @ query_cov @ change.T) + np.trace(inverse.T @ key_cov @ inverse)
        assert 2 * float(values.sum()) <= total * (1 + 1e-9)


@given(st.lists(st.floats(0.01, 15), min_size=1, max_size=60), st.floats(0.05, 0.95))
def test_quantiles_from_a_histogram_are_within_a_bin_of_a_sample(
    values: list[float], share: float
) -> None:
    edges = np.arange(0, 16.5, 0.5)
    counts = np.histogram(values, edges)[0].astype(np.float64)
    found = spectra.histogram_quantile(counts, edges, share)
    low, high = (
        np.quantile(values, share, method="lower"),
        np.quantile(values, share, method="higher"),
    )
    assert low - 0.5 <= found <= high + 0.5
