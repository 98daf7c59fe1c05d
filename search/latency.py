"""What a layer's attention costs on a device, given the methods of its heads.

    all heads dense:  dense_layer_ms                            (the layer goes to SDPA)
    otherwise:        overhead_ms + sum over heads of head_ms[c]
                      + max(0, max over heads of path_ms[c] - sum over heads of work_ms[c])
                      + sum over the methods present of method_overhead_ms

The third term is for GPUs, where rows of queries go to program slots: heads add up as long as rows
are many, but a layer takes as long as its longest row, and slots idle meanwhile.

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
        work_ms: float64 [candidates], the part of head_ms that is attention over tiles, in all
            slots of a GPU; path_ms: float64 [candidates], the longest row in one slot. None for 0.
    """

    dense_layer_ms: float
    overhead_ms: float
    head_ms: Floats
    method_overhead_ms: Floats
    rest_ms: float
    method: Ints | None = None
    work_ms: Floats | None = None
    path_ms: Floats | None = None

    def __post_init__(self) -> None:
        for name in ("work_ms", "path_ms"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.zeros(len(self.head_ms)))
        if self.method is None:
            object.__setattr__(self, "method", np.arange(len(self.head_ms)))
        if not self.works.shape == self.paths.shape == self.head_ms.shape:
            raise ValueError(
                "work_ms and path_ms need one number per candidate, got shapes "
                f"{self.works.shape} and {self.paths.shape}"
            )
        if self.head_ms.shape != self.method_overhead_ms.shape or self.head_ms.ndim != 1:
            raise ValueError(
                "head_ms and method_overhead_ms need one number per candidate, got shapes "
                f"{self.head_ms.shape} and {self.method_overhead_ms.shape}"
            )
        scalars = [self.dense_layer_ms, self.overhead_ms, self.rest_ms]
        costs = np.concatenate(
            [scalars, self.head_ms, self.method_overhead_ms, self.works, self.paths]
        )
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

    @property
    def works(self) -> Floats:
        """`work_ms`, 0 where it is none."""
        assert self.work_ms is not None  # set by __post_init__
        return self.work_ms

    @property
    def paths(self) -> Floats:
        """`path_ms`, 0 where there are none."""
        assert self.path_ms is not None  # set by __post_init__
        return self.path_ms

    def layer_ms(self, assignment: Ints) -> Floats:
        """Attention time of every layer: [..., layers, heads] to [..., layers]."""
        ms: Floats = self.overhead_ms + self.head_ms[assignment].sum(-1)
        if self.paths.any():
            idle = self.paths[assignment].max(-1) - self.works[assignment].sum(-1)
            ms = ms + np.maximum(idle, 0.0)
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
            work_ms=self.works * factor,
            path_ms=self.paths * factor,
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
    tiles: tuple[Floats, Floats] | None = None,
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
        tiles: float64 [candidates] each, the work of a head and its longest row, in a common unit,
            whose time is fitted. None where heads only add up.

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
    model = _fit(counts, ms, once, groups, tiles, rest_ms)
    if holdout is not None:
        _check_coverage(counts[~holdout], names)
        rows = np.flatnonzero(holdout)
        held_out = _fit(counts[~holdout], ms[~holdout], once, groups, tiles, rest_ms)
        predicted = _apply(held_out, counts[rows])
    else:
        occurrences = (counts > 0).sum(0)
        is_dense = (counts[:, 1:] == 0).all(1)
        known = ((counts == 0) | (occurrences > 1)).all(1) & (~is_dense | (is_dense.sum() > 1))
        rows = np.flatnonzero(known)
        predicted = np.empty(len(rows))
        for i, row in enumerate(rows):
            others = np.arange(len(ms)) != row
            left_out = _fit(counts[others], ms[others], once, groups, tiles, rest_ms)
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
    counts: Floats,
    ms: Floats,
    once: NDArray[np.bool_],
    method: Ints,
    tiles: tuple[Floats, Floats] | None,
    rest_ms: float,
) -> LatencyModel:
    is_dense = (counts[:, 1:] == 0).all(1)
    # The weighted mean that minimises the sum of squared relative errors.
    dense_layer_ms = float((1 / ms[is_dense]).sum() / (1 / ms[is_dense] ** 2).sum())
    mixed, mixed_ms = counts[~is_dense], ms[~is_dense]
    candidates = counts.shape[1]
    work_ms = path_ms = np.zeros(candidates)
    kernel = np.zeros(len(mixed_ms))
    chooses = np.ones(candidates, bool)
    if tiles is not None:
        unit = _tile_ms(mixed, mixed_ms, once, tiles)
        work_ms, path_ms = unit * tiles[0], unit * tiles[1]
        kernel = np.maximum(mixed @ work_ms, ((mixed > 0) * path_ms).max(1, initial=0.0))
        chooses = once
    # With one count alone, cost per head and cost per layer cannot be told apart; with equally
    # many heads in all layers, neither can the overhead: the heads then carry it.
    by_method = _by_method(mixed, method)
    stands = method == np.arange(len(method))
    once = once & stands & np.array([len(set(c[c > 0])) > 1 for c in by_method.T], bool)
    once[0] = False
    columns = _features(mixed, once, method)
    identified: NDArray[np.bool_] = np.asarray((columns > 0).any(0))
    identified[0] = len(set(mixed.sum(1))) > 1
    identified[1 : 1 + candidates] &= chooses
    solution = np.zeros(columns.shape[1])
    solution[identified] = non_negative_least_squares(
        columns[:, identified] / mixed_ms[:, None], (mixed_ms - kernel) / mixed_ms
    )
    head_ms, method_overhead_ms = solution[1 : 1 + candidates], solution[1 + candidates :]
    if tiles is None and not mixed[:, 0].any():  # no dense head was timed beside others
        head_ms[0] = dense_layer_ms / counts[is_dense].sum(1).mean()
    return LatencyModel(
        dense_layer_ms,
        float(solution[0]),
        head_ms + work_ms,
        method_overhead_ms,
        rest_ms,
        method,
        work_ms,
        path_ms,
    )


def _tile_ms(
    counts: Floats, ms: Floats, once: NDArray[np.bool_], tiles: tuple[Floats, Floats]
) -> Floats:
    """What a unit of work takes, by candidate, from layers in which nothing is chosen.

    A candidate that chooses keys, or that no such layer has, costs what the tiles of the candidate
    cost whose longest row is most like its own: rows have a beginning and an end.
    """
    work, path = tiles
    plain = (counts[:, once] == 0).all(1)
    counts, ms = counts[plain], ms[plain]
    unit, known = np.ones(len(work)), (counts > 0).any(0)
    for _ in range(_ROUNDS if known.any() else 0):
        heads, longest = counts * work, (counts > 0) * (path * unit)
        alone = longest.max(1) > heads @ unit
        rows = np.where(alone[:, None], np.eye(len(path))[longest.argmax(1)] * path, heads)
        seen = (rows > 0).any(0)
        found = np.zeros(len(work))
        found[seen] = non_negative_least_squares(rows[:, seen] / ms[:, None], np.ones(len(ms)))
        told = np.flatnonzero(found > 0)
        alike = np.abs(np.log(path[:, None] / path[told])).argmin(1)
        before, unit = unit, np.where(found > 0, found, found[told[alike]])
        if np.allclose(before, unit, rtol=1e-6, atol=0):
            break
    return unit if known.any() else np.zeros(len(work))  # all of it is taken for choosing


_ROUNDS = 10
"""Of finding out which layers take as long as their longest row."""


def _apply(model: LatencyModel, counts: Floats) -> Floats:
    present = _by_method(counts, model.methods) > 0
    idle = ((counts > 0) * model.paths).max(1) - counts @ model.works
    heads = counts @ model.head_ms + np.maximum(idle, 0.0)
    ms = model.overhead_ms + heads + present @ model.method_overhead_ms
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
