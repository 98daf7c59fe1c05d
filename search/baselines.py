"""What a per-head plan has to beat: one method for all heads, and one method per layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from attnplan.search.budget import Budget, BudgetError
from attnplan.search.problem import Prediction, Problem
from attnplan.search.solve import RESOURCES, Solution, limits_of, meets, solve


def uniforms(problem: Problem) -> dict[int, Prediction]:
    """The prediction of every candidate that all heads are offered, given to all heads."""
    offered = np.flatnonzero(np.isfinite(problem.fisher).all((0, 1)))
    return {int(c): problem.predict(np.full_like(problem.dense, c)) for c in offered}


def uniform(problem: Problem, budget: Budget) -> Solution:
    """The best choice of one candidate for all heads.

    Raises:
        BudgetError: none meets the budget; says which comes nearest.
    """
    limits = limits_of(problem, budget)
    objective = {"kl": "kl", "latency": "latency_ms", "memory": "kv_share"}[budget.objective]
    predictions = uniforms(problem)
    feasible = [c for c, prediction in predictions.items() if meets(prediction, limits)]
    if not feasible:
        worst = {c: _excess(p, limits) for c, p in predictions.items()}
        nearest = min(worst, key=lambda c: worst[c][0])
        resource = RESOURCES[worst[nearest][1]]
        value = float(getattr(predictions[nearest], resource))
        raise BudgetError(
            f"no method given to all heads meets the budget: the nearest, "
            f"{problem.names[nearest]}, has {resource} {value:.4g} where "
            f"{limits[worst[nearest][1]]:.4g} is the limit",
            resource,
            value,
        )
    best = min(feasible, key=lambda c: (getattr(predictions[c], objective), predictions[c].kl))
    value = float(getattr(predictions[best], objective))
    return Solution(np.full_like(problem.dense, best), predictions[best], value, {})


def _excess(prediction: Prediction, limits: NDArray[np.float64]) -> tuple[float, int]:
    ratios = [getattr(prediction, r) / limits[k] for k, r in enumerate(RESOURCES)]
    worst = int(np.argmax(ratios))
    return ratios[worst], worst


def per_layer(problem: Problem, budget: Budget) -> Solution:
    """The best plan whose layers each use one candidate for all their heads.

    Raises:
        BudgetError: no such plan meets the budget.
    """
    model = problem.latency
    layers = replace(
        problem,
        fisher=problem.fisher.sum(1, keepdims=True),
        group=1,
        latency=replace(model, head_ms=model.head_ms * problem.heads),
    )
    solution = solve(layers, budget)
    assignment = np.repeat(solution.assignment, problem.heads, axis=1)
    return replace(solution, assignment=assignment, prediction=problem.predict(assignment))
