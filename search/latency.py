"""What a layer's attention costs on a device, given the methods of its heads.

    all heads dense:  dense_layer_ms                            (the layer goes to SDPA)
    otherwise:        overhead_ms + sum over heads of head_ms[c]
                      + sum over the methods present of method_overhead_ms

The coefficients are fitted to timings of whole layers by non-negative least squares on the
relative error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Milliseconds of attention, per layer; candidate 0 is dense.

    Attributes:
        dense_layer_ms: a layer whose heads are all dense.
        overhead_ms: what a mixed layer costs beside its heads.
        head_ms: float64 [candidates]; entry 0 is a dense head inside a mixed layer.
        method_overhead_ms: float64 [candidates], paid once by a layer for each method in which
            it occurs (choosing keys for all its heads at once); 0 for dense, and for candidates
            that do not stand for their method.
        rest_ms: everything of the prefill that is not attention.
        method: int64 [candidates], for each candidate the one that stands for its method: they
            pay the overhead together. None where every candidate is a method of its own.
    """

    dense_layer_ms: float
    overhead_ms: float
    head_ms: Floats
    method_overhead_ms: Floats
    rest_ms: float
    method: Ints | None = None

    def __post_init__(self) -> None:
        if self.method is None:
            object.__setattr__(self, "method", np.arange(len(self.head_ms)))
        if self.head_ms.shape != self.method_overhead_ms.shape or self.head_ms.ndim != 1:
            raise ValueError(
                "head_ms and method_overhead_ms need one number per candidate, got shapes "
                f"{self.head_ms.shape} and {self.method_overhead_ms.shape}"
            )
        scalars = [self.dense_layer_ms, self.overhead_ms, self.rest_ms]
        costs = np.concatenate([scalars, self.head_ms, self.method_overhead_ms])
        if not (np.isfinite(costs).all() and (costs >= 0).all()):
            raise ValueError(f"milliseconds must be finite and not negative, got {costs.min()}")
        if self.method_overhead_ms[0] != 0:
            raise ValueError(
                f"dense has no overhead of its own, got {self.method_overhead_ms[0]} ms"
            )

    @property
    def candidates(self) -> int:
        return len(self.head_ms)

    @property
    def methods(self) -> Ints:
        """For each candidate, the one that stands for its method."""
        assert self.method is not None  # set by __post_init__
        return self.method

    def layer_ms(self, assignment: Ints) -> Floats:
        """Attention time of every layer: [..., layers, heads] to [..., layers]."""
        ms: Floats = self.overhead_ms + self.head_ms[assignment].sum(-1)
        if self.method_overhead_ms.any():
            ms = ms + presence(self.methods[assignment], self.candidates) @ self.method_overhead_ms
        return np.where((assignment == 0).all(-1), self.dense_layer_ms, ms)

    def predict(self, assignment: Ints) -> float:
        """Prefill time of a whole assignment [layers, heads], in ms."""
        return float(self.layer_ms(assignment).sum() + self.rest_ms)

    def calibrated(self, factor: float) -> LatencyModel:
        """The model with every mixed layer `factor` times as slow.

        Dense layers and the rest stay: the dense prefill is measured itself.
        """
        if not (np.isfinite(factor) and factor > 0):
            raise ValueError(f"a calibration factor must be positive, got {factor}")
        return replace(
            self,
            overhead_ms=self.overhead_ms * factor,
            head_ms=self.head_ms * factor,
            method_overhead_ms=self.method_overhead_ms * factor,
        )

    def factor(self, assignment: Ints, measured_ms: float) -> float:
        """What to calibrate with so that this assignment's prediction is `measured_ms`.

        1 where the assignment has no mixed layer; at least 0.1, in case the measured prefill is
        below what the dense layers and the rest alone should take.
        """
        layers = self.layer_ms(assignment)
        mixed = layers[(assignment != 0).any(-1)].sum()
        if mixed <= 0:
            return 1.0
        others = layers.sum() - mixed + self.rest_ms
        return float(max((measured_ms - others) / mixed, 0.1))


def presence(assignment: Ints, candidates: int) -> Floats:
    """1 where a candidate occurs in a layer: [..., layers, heads] to [..., layers, candidates]."""
    present = np.zeros((*assignment.shape[:-1], candidates))
    np.put_along_axis(present, assignment, 1.0, axis=-1)
    return present


@dataclass(frozen=True, eq=False)
class LatencyFit:
    """A fitted model and how well it predicts layers that it was not fitted to.

    Attributes:
        model: fitted to all rows.
        rows: int64 [n], the held-out rows.
        errors: float64 [n], (predicted - measured) / measured of those rows.
    """

    model: LatencyModel
    rows: Ints
    errors: Floats

    @property
    def mape(self) -> float:
        """Mean absolute relative error on held-out rows; nan if none could be held out."""
        return float(np.abs(self.errors).mean()) if len(self.errors) else float("nan")


def fit_latency(
    counts: NDArray[Any],
    ms: NDArray[Any],
    *,
    rest_ms: float,
    names: Sequence[str],
    dynamic: Sequence[bool],
    method: Sequence[int] | None = None,
    holdout: NDArray[np.bool_] | None = None,
) -> LatencyFit:
    """Fit the cost model to timings of single layers.

    Args:
        counts: [rows, candidates], how many heads of the layer have each candidate.
        ms: [rows], median time of the layer's attention.
        rest_ms: time of the prefill outside attention; passed through to the model.
        names: of the candidates; the first is dense.
        dynamic: whether a candidate pays an overhead once per layer.
        method: for each candidate the one that stands for its method; candidates of one method
            pay the overhead together. By default each is a method of its own.
        holdout: bool [rows], rows to hold out together when errors are estimated. By default
            every row is held out in turn, if its candidates also occur in other rows.

    Raises:
        ValueError: a candidate was never timed, no layer was all dense, or a time is not positive.
    """
    counts, ms = np.asarray(counts, np.float64), np.asarray(ms, np.float64)
    if counts.shape != (len(ms), len(names)) or len(dynamic) != len(names):
        raise ValueError(
            f"timings of {len(names)} candidates need counts [{len(ms)}, {len(names)}], got "
            f"{list(counts.shape)}, and one dynamic flag each, got {len(dynamic)}"
        )
    if not (np.isfinite(ms).all() and (ms > 0).all()):
        raise ValueError(f"timings must be positive milliseconds, got {ms.min()}")
    _check_coverage(counts, names)
    once = np.asarray(dynamic, bool)
    groups = np.arange(len(names)) if method is None else np.asarray(method, np.int64)

    model = _fit(counts, ms, once, groups, rest_ms)
    if holdout is not None:
        _check_coverage(counts[~holdout], names)
        rows = np.flatnonzero(holdout)
        held_out = _fit(counts[~holdout], ms[~holdout], once, groups, rest_ms)
        predicted = _apply(held_out, counts[rows])
    else:
        occurrences = (counts > 0).sum(0)
        is_dense = (counts[:, 1:] == 0).all(1)
        known = ((counts == 0) | (occurrences > 1)).all(1) & (~is_dense | (is_dense.sum() > 1))
        rows = np.flatnonzero(known)
        predicted = np.empty(len(rows))
        for i, row in enumerate(rows):
            others = np.arange(len(ms)) != row
            left_out = _fit(counts[others], ms[others], once, groups, rest_ms)
            predicted[i] = _apply(left_out, counts[row : row + 1])[0]
    return LatencyFit(model, rows, (predicted - ms[rows]) / ms[rows])


def _check_coverage(counts: Floats, names: Sequence[str]) -> None:
    is_dense = (counts[:, 1:] == 0).all(1)
    if not is_dense.any():
        raise ValueError("no timing of a layer whose heads are all dense; run: attnplan bench")
    missing = np.flatnonzero((counts[:, 1:] == 0).all(0)) + 1
    if len(missing):
        raise ValueError(f"no timing of {names[missing[0]]}; run: attnplan bench")


def _features(counts: Floats, once: NDArray[np.bool_], method: Ints) -> Floats:
    """Columns: mixed layer, heads per candidate, presence of methods with an overhead."""
    return np.hstack([np.ones((len(counts), 1)), counts, (_by_method(counts, method) > 0) & once])


def _by_method(counts: Floats, method: Ints) -> Floats:
    """Heads per method, in the column of the candidate that stands for it."""
    return counts @ np.eye(len(method))[method]


def _fit(
    counts: Floats, ms: Floats, once: NDArray[np.bool_], method: Ints, rest_ms: float
) -> LatencyModel:
    is_dense = (counts[:, 1:] == 0).all(1)
    # The weighted mean that minimises the sum of squared relative errors.
    dense_layer_ms = float((1 / ms[is_dense]).sum() / (1 / ms[is_dense] ** 2).sum())
    mixed, mixed_ms = counts[~is_dense], ms[~is_dense]
    # With one count alone, cost per head and cost per layer cannot be told apart; with equally
    # many heads in all layers, neither can the overhead: the heads then carry it.
    by_method = _by_method(mixed, method)
    stands = method == np.arange(len(method))
    once = once & stands & np.array([len(set(c[c > 0])) > 1 for c in by_method.T], bool)
    once[0] = False
    columns = _features(mixed, once, method)
    identified: NDArray[np.bool_] = np.asarray((columns > 0).any(0))
    identified[0] = len(set(mixed.sum(1))) > 1
    solution = np.zeros(columns.shape[1])
    solution[identified] = non_negative_least_squares(
        columns[:, identified] / mixed_ms[:, None], np.ones(len(mixed_ms))
    )
    candidates = counts.shape[1]
    head_ms, method_overhead_ms = solution[1 : 1 + candidates], solution[1 + candidates :]
    if not mixed[:, 0].any():  # no dense head was timed beside others
        head_ms[0] = dense_layer_ms / counts[is_dense].sum(1).mean()
    overhead_ms = float(solution[0])
    return LatencyModel(dense_layer_ms, overhead_ms, head_ms, method_overhead_ms, rest_ms, method)


def _apply(model: LatencyModel, counts: Floats) -> Floats:
    present = _by_method(counts, model.methods) > 0
    ms = model.overhead_ms + counts @ model.head_ms + present @ model.method_overhead_ms
    return np.where((counts[:, 1:] == 0).all(1), model.dense_layer_ms, ms)


def non_negative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """x >= 0 that minimises ||matrix x - target||_2.

    Source: Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23.
    """
    scale = np.linalg.norm(matrix, axis=0)
    matrix = matrix / np.where(scale > 0, scale, 1.0)
    x = np.zeros(matrix.shape[1])
    free = np.zeros(matrix.shape[1], bool)
    tolerance = 1e-10 * max(float(np.linalg.norm(target)), 1e-30)
    for _ in range(10 * matrix.shape[1]):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[free] = -np.inf
        if free.all() or gradient.max() <= tolerance:
            break
        free[gradient.argmax()] = True
        while free.any():
            trial = np.zeros_like(x)
            trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            blocked = free & (trial <= 0)
            if not blocked.any():
                x = trial
                break
            step = (x[blocked] / (x[blocked] - trial[blocked])).min()
            x = x + step * (trial - x)
            free &= x > 1e-14
            x[~free] = 0.0
    return x / np.where(scale > 0, scale, 1.0)
