"""What the same budget buys without a choice per head."""

from __future__ import annotations

import numpy as np

from attnplan.pipeline.measured import Planner, verified
from attnplan.pipeline.request import Choice
from attnplan.search import baselines
from attnplan.search.budget import Budget, BudgetError
from attnplan.search.problem import Assignment, Problem
from attnplan.search.solve import limits_of, meets


def best_baselines(planner: Planner, problem: Problem) -> list[Choice]:
    """Best uniform and best per-layer plan at the same budget, by measured KL."""
    budget = planner.request.budget
    found = []
    steps = range(planner.work.texts)
    uniform = _best_uniform(planner, problem, budget)
    if uniform is not None:
        found.append(verified(planner, "uniform", uniform, problem))
    try:
        layered = baselines.per_layer(problem, budget).assignment
    except BudgetError:
        return found
    if uniform is not None:  # one method for all layers is a per-layer plan too
        layered = min(
            (layered, uniform), key=lambda a: sum(planner.evaluate(a, step) for step in steps)
        )
    found.append(verified(planner, "per layer", layered, problem))
    return found


def _best_uniform(planner: Planner, problem: Problem, budget: Budget) -> Assignment | None:
    """One candidate for all heads: of the two best by prediction, the best by measurement."""
    limits = limits_of(problem, budget)
    objective = {"kl": "kl", "latency": "latency_ms", "memory": "kv_share"}[budget.objective]
    fits = {c: p for c, p in baselines.uniforms(problem).items() if meets(p, limits)}
    ranked = sorted(fits, key=lambda c: (getattr(fits[c], objective), fits[c].kl))
    if budget.objective != "kl":
        chosen = ranked[:1]
    else:
        chosen = ranked[:2]
    assignments = [np.full_like(problem.dense, c) for c in chosen]
    steps = range(planner.work.texts)
    return min(
        assignments,
        key=lambda a: sum(planner.evaluate(a, step) for step in steps),
        default=None,
    )
