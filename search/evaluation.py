"""Assignments that were run on the model: their values, and which of them is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnplan.search.problem import Assignment, Prediction, digest
from attnplan.search.solve import OBJECTIVES

Evaluate = Callable[[Assignment, int], float]
"""KL of an assignment on calibration sequence `step`, in nats per token."""
MeasureLatency = Callable[[Assignment], float | None]
"""Time of the prefill under an assignment, in ms; None where it cannot be measured."""

BROKEN_KL = 100.0
"""Stands for a KL that is not finite: more than any distribution over a vocabulary loses."""


def finite_kl(value: float) -> float:
    """The value, or `BROKEN_KL` for an assignment that overflowed."""
    return float(value) if math.isfinite(value) else BROKEN_KL


@dataclass(frozen=True, eq=False)
class Evaluated:
    """An assignment with its measured KL.

    Attributes:
        assignment: [layers, heads].
        prediction: of the problem that it was searched with.
        kl_steps: measured KL on each calibration sequence, in order.
        latency_ms: measured, or None where only the prediction is known.
    """

    assignment: Assignment
    prediction: Prediction
    kl_steps: tuple[float, ...]
    latency_ms: float | None = None

    @property
    def digest(self) -> str:
        return digest(self.assignment)

    @property
    def kl(self) -> float:
        """Mean measured KL."""
        return sum(self.kl_steps) / len(self.kl_steps)

    @property
    def totals(self) -> NDArray[np.float64]:
        """(kl, density, latency_ms, kv_share), measured where it was."""
        latency_ms = self.prediction.latency_ms if self.latency_ms is None else self.latency_ms
        return np.array([self.kl, self.prediction.density, latency_ms, self.prediction.kv_share])

    def violation(self, limits: NDArray[np.float64]) -> float:
        """By what share the worst limit is exceeded; 0 within all."""
        excess = float((self.totals / limits).max()) - 1
        return excess if excess > 1e-9 else 0.0


def ranked(
    evaluated: Sequence[Evaluated], limits: NDArray[np.float64], objective: str
) -> list[Evaluated]:
    """The lowest objective within the limits first; then those outside, by violation."""
    k = OBJECTIVES[objective]

    def rank(candidate: Evaluated) -> tuple[float, float, float]:
        return candidate.violation(limits), float(candidate.totals[k]), candidate.kl

    return sorted(evaluated, key=rank)


def pareto(evaluated: Sequence[Evaluated], resource: int) -> tuple[Evaluated, ...]:
    """Those that no other beats in both KL and one resource, from lowest KL to cheapest."""
    front: list[Evaluated] = []
    for candidate in sorted(evaluated, key=lambda e: (e.kl, e.totals[resource])):
        if not front or candidate.totals[resource] < front[-1].totals[resource]:
            front.append(candidate)
    return tuple(front)


def kl_calibration(evaluated: Sequence[Evaluated]) -> float:
    """Median ratio of measured to predicted KL: what to scale the scores of a problem by.

    1 where nothing that loses anything was evaluated.
    """
    ratios = [e.kl / e.prediction.kl for e in evaluated if e.prediction.kl > 0 and e.kl > 0]
    return float(np.median(ratios)) if ratios else 1.0
