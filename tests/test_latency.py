"""The cost model of layers: what it fits, predicts and refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from attnplan.search.latency import (
    LatencyFit,
    LatencyModel,
    fit_latency,
    non_negative_least_squares,
)

NAMES = ("dense", "window", "loki", "centroid")
DYNAMIC = (False, False, True, True)
TRUE = LatencyModel(
    dense_layer_ms=9.0,
    overhead_ms=0.5,
    head_ms=np.array([1.2, 0.2, 0.5, 0.4]),
    method_overhead_ms=np.array([0.0, 0.0, 0.8, 0.3]),
    rest_ms=20.0,
)


def timings(rows: int = 60, noise: float = 0.0) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Counts and times of layers of 9 heads, and of some of 6; the first three are dense."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(9, [0.25] * 4, rows)
    counts[10:30] = rng.multinomial(6, [0.25] * 4, 20)
    counts[:3] = [9, 0, 0, 0]
    ms = np.array([TRUE.layer_ms(np.repeat(np.arange(4), row)[None])[0] for row in counts])
    return counts, ms * np.exp(rng.normal(0, noise, rows))


def fit(noise: float = 0.0) -> LatencyFit:
    counts, ms = timings(noise=noise)
    return fit_latency(counts, ms, rest_ms=20.0, names=NAMES, dynamic=DYNAMIC)


def test_exact_timings_give_the_coefficients_back() -> None:
    result = fit()
    assert result.model.dense_layer_ms == pytest.approx(9.0)
    assert result.model.overhead_ms == pytest.approx(0.5)
    np.testing.assert_allclose(result.model.head_ms, TRUE.head_ms)
    np.testing.assert_allclose(result.model.method_overhead_ms, TRUE.method_overhead_ms)
    assert result.mape < 1e-9


def test_with_equally_many_heads_everywhere_the_heads_carry_the_overhead() -> None:
    counts, ms = timings()
    nine = counts.sum(1) == 9
    model = fit_latency(counts[nine], ms[nine], rest_ms=0, names=NAMES, dynamic=DYNAMIC).model
    assert model.overhead_ms == 0.0
    np.testing.assert_allclose(model.head_ms, TRUE.head_ms + 0.5 / 9)


def test_noise_of_five_percent_is_predicted_within_ten() -> None:
    result = fit(noise=0.05)
    assert len(result.errors) == 60
    assert 0.02 < result.mape < 0.1


def test_a_given_split_is_predicted_without_its_rows() -> None:
    counts, ms = timings()
    ms[-10:] *= 2.0
    holdout = np.arange(60) >= 50
    result = fit_latency(counts, ms, rest_ms=0.0, names=NAMES, dynamic=DYNAMIC, holdout=holdout)
    np.testing.assert_array_equal(result.rows, np.arange(50, 60))
    np.testing.assert_allclose(result.errors, -0.5, atol=1e-6)


ROWS = LatencyModel(
    dense_layer_ms=9.0,
    overhead_ms=0.0,
    head_ms=np.array([1.0, 0.1, 0.4 + 0.3, 0.2 + 0.2]),
    method_overhead_ms=np.array([0.0, 0.0, 0.8, 0.3]),
    rest_ms=0.0,
    work_ms=np.array([1.0, 0.1, 0.4, 0.2]),
    path_ms=np.array([6.0, 0.5, 3.0, 1.0]),
)
TILES = np.array([10.0, 1.0, 4.0, 2.0]), np.array([60.0, 5.0, 30.0, 10.0])


def test_a_layer_takes_as_long_as_its_longest_row() -> None:
    """Which of its heads that is; what chooses keys is paid beside."""
    assignment = np.array([[1, 1, 1], [0, 1, 1], [2, 1, 1], [1] * 3, [3, 3, 2]])
    wanted = [0.5, 6.0, 3.0 + 0.3 + 0.8, 0.5, 3.0 + 2 * 0.2 + 0.3 + 0.8 + 0.3]
    np.testing.assert_allclose(ROWS.layer_ms(assignment), wanted)
    many = np.ones((1, 50), np.int64)
    np.testing.assert_allclose(ROWS.layer_ms(many), 5.0)  # rows enough for all slots
    np.testing.assert_allclose(ROWS.calibrated(2.0).layer_ms(assignment), 2 * np.array(wanted))


def test_the_time_of_a_tile_is_found_whether_rows_are_many_or_few() -> None:
    rng = np.random.default_rng(1)
    counts = np.concatenate([rng.multinomial(n, [0.25] * 4, 40) for n in (4, 30)])
    counts = np.concatenate([np.array([[4, 0, 0, 0], [3, 1, 0, 0], [0, 4, 0, 0]]), counts])
    layers = [np.repeat(np.arange(4), row) for row in counts]
    ms = np.array([ROWS.layer_ms(layer[None])[0] for layer in layers])
    found = fit_latency(counts, ms, rest_ms=0.0, names=NAMES, dynamic=DYNAMIC, tiles=TILES).model
    np.testing.assert_allclose(found.works[:2], ROWS.works[:2], rtol=1e-6)
    np.testing.assert_allclose(found.paths[:2], ROWS.paths[:2], rtol=1e-6)
    mixed = np.array([[0, 1, 2, 3], [1, 1, 2, 2], [0, 0, 3, 3]])
    np.testing.assert_allclose(found.layer_ms(mixed), ROWS.layer_ms(mixed), rtol=1e-6)
    plain = fit_latency(counts, ms, rest_ms=0.0, names=NAMES, dynamic=DYNAMIC).model
    error = np.abs(plain.layer_ms(mixed) / ROWS.layer_ms(mixed) - 1)
    assert error.max() > 0.1, "sums of heads cannot say this"


def test_a_layer_is_dense_only_if_all_its_heads_are() -> None:
    assignment = np.array([[0, 0, 0], [0, 1, 1], [2, 2, 3]])
    np.testing.assert_allclose(
        TRUE.layer_ms(assignment),
        [9.0, 0.5 + 1.2 + 0.4, 0.5 + 2 * 0.5 + 0.4 + 0.8 + 0.3],
    )
    assert TRUE.predict(assignment) == pytest.approx(20.0 + 9.0 + 2.1 + 3.0)


def test_calibration_slows_mixed_layers_only() -> None:
    assignment = np.array([[0, 0, 0], [0, 1, 1]])
    slow = TRUE.calibrated(2.0)
    assert slow.predict(assignment) == pytest.approx(20.0 + 9.0 + 2 * 2.1)
    assert slow.predict(np.zeros_like(assignment)) == TRUE.predict(np.zeros_like(assignment))
    with pytest.raises(ValueError, match="must be positive, got 0"):
        TRUE.calibrated(0.0)


def test_the_factor_of_a_measurement_makes_the_prediction_equal_it() -> None:
    assignment = np.array([[0, 0, 0], [0, 1, 1]])
    factor = TRUE.factor(assignment, 40.0)
    assert TRUE.calibrated(factor).predict(assignment) == pytest.approx(40.0)
    assert TRUE.factor(np.zeros_like(assignment), 40.0) == 1.0


@pytest.mark.parametrize(
    ("drop", "message"), [("loki", "no timing of loki"), ("dense", "heads are all dense")]
)
def test_what_was_never_timed_is_named(drop: str, message: str) -> None:
    counts, ms = timings()
    if drop == "dense":
        keep = (counts[:, 1:] != 0).any(1)
    else:
        keep = counts[:, NAMES.index(drop)] == 0
    with pytest.raises(ValueError, match=message):
        fit_latency(counts[keep], ms[keep], rest_ms=0.0, names=NAMES, dynamic=DYNAMIC)


def test_times_must_be_positive() -> None:
    counts, ms = timings()
    ms[4] = 0.0
    with pytest.raises(ValueError, match="positive milliseconds, got 0"):
        fit_latency(counts, ms, rest_ms=0.0, names=NAMES, dynamic=DYNAMIC)


def test_one_pure_row_per_candidate_is_enough_to_predict_mixtures_roughly() -> None:
    counts = np.eye(4, dtype=int) * 9
    ms = np.array([TRUE.layer_ms(np.full((1, 9), c))[0] for c in range(4)])
    result = fit_latency(counts, ms, rest_ms=0.0, names=NAMES, dynamic=DYNAMIC)
    assert np.isnan(result.mape)
    for c in range(4):
        assert result.model.layer_ms(np.full((1, 9), c))[0] == pytest.approx(ms[c])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 12), columns=st.integers(1, 8))
def test_non_negative_least_squares_meets_its_optimality_conditions(
    seed: int, rows: int, columns: int
) -> None:
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(rows, columns)), rng.normal(size=rows)
    x = non_negative_least_squares(matrix, target)
    gradient = matrix.T @ (target - matrix @ x)
    assert (x >= 0).all()
    assert (gradient <= 1e-8).all()
    np.testing.assert_allclose(gradient * x, 0, atol=1e-8)


def test_a_model_refuses_times_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="must be finite and not negative, got -1"):
        LatencyModel(1.0, -1.0, np.ones(2), np.zeros(2), 0.0)
    with pytest.raises(ValueError, match="dense has no overhead of its own"):
        LatencyModel(1.0, 1.0, np.ones(2), np.ones(2), 0.0)
    with pytest.raises(ValueError, match="one number per candidate"):
        LatencyModel(1.0, 1.0, np.ones(2), np.zeros(3), 0.0)
    with pytest.raises(ValueError, match="one number per candidate, got shapes"):
        LatencyModel(1.0, 1.0, np.ones(2), np.zeros(2), 0.0, path_ms=np.zeros(3))
