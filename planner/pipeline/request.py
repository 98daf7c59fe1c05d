"""What a search is asked for, and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from attnplan.costs.prefill import DeviceCosts
from attnplan.pipeline.verify import Layers, Measured
from attnplan.search.budget import Budget


@dataclass(frozen=True)
class Request:
    """What to search for.

    Attributes:
        budget: limits and objective.
        trials: of the Optuna study.
        swaps: proposals that refinement may measure.
        repeats: pairs of timed runs.
        seed: of everything random.
        methods: names of the methods to consider; None for the whole catalog.
        target: table of timings of the device to plan for; None for this one.
    """

    budget: Budget
    trials: int = 24
    swaps: int = 10
    repeats: int = 3
    seed: int = 0
    methods: frozenset[str] | None = None
    target: Path | None = None

    @property
    def canonical(self) -> dict[str, Any]:
        """What a search is known by, beside its seed."""
        asked = self.budget.canonical()
        return asked if self.methods is None else {**asked, "methods": sorted(self.methods)}


@dataclass(frozen=True)
class Choice:
    """One way to spend the budget, predicted and measured.

    Attributes:
        name: 'per head', 'per layer', 'uniform' or 'dense'.
        layers: the assignment.
        predicted_kl: of the scores.
        predicted_ms: of the cost model, at the speed that the machine had when it was measured.
        measured: on held-out text and on the device.
        misses: what it breaks, empty when feasible.
    """

    name: str
    layers: Layers
    predicted_kl: float
    predicted_ms: float
    measured: Measured
    misses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        plan: the chosen assignment; None when nothing met the budget.
        attempts: all verified per-head plans, in order.
        baselines: best uniform and best per-layer plan at the same budget, where there is one.
        costs: the device's cost model.
        search: id in the store.
        run: id of the profile run.
        fitted: layer to fitted data.
        solver_seconds: from the stored scores to the solver's answer.
    """

    plan: Choice | None
    attempts: tuple[Choice, ...]
    baselines: tuple[Choice, ...]
    costs: DeviceCosts
    search: int
    run: int
    fitted: dict[int, dict[str, Tensor]]
    solver_seconds: float
    evaluations: int = 0
