"""The study of a search, begun from what the solver says: the same for prefill and for caches."""

from __future__ import annotations

from collections.abc import Callable

from attnplan.pipeline.progress import Progress
from attnplan.search.budget import Budget
from attnplan.search.problem import Assignment, Problem
from attnplan.search.solve import front, limits_of, meets, solve
from attnplan.search.study import StudyResult, run_study

FRONT = 16
"""Prices at which the solver looks for a second assignment to begin from."""


def study(
    problem: Problem,
    budget: Budget,
    evaluate: Callable[[Assignment, int], float],
    *,
    resource: str,
    steps: int,
    trials: int,
    database: str,
    name: str,
    seed: int,
    progress: Progress,
) -> StudyResult:
    """Correct the scores of a problem by what is measured of assignments.

    It begins from the solver's answer, and from the best assignment within the budget that lies on
    the front of predicted KL against one resource.

    Args:
        problem: scores and costs.
        budget: limits and objective.
        evaluate: the measured KL, in nats per token, of an assignment on one text.
        resource: of the front: 'latency_ms', 'density' or 'kv_share'.
        steps: texts that a trial may be measured on.
        trials: of the study.
        database: URL of the store, which holds the study.
        name: of the study; unique for everything that its trials depend on.
        seed: of everything random.
        progress: where it reports to.

    Raises:
        BudgetError: the budget is out of reach by the cost models alone.
    """
    progress.stage("Searching", trials)
    limits = limits_of(problem, budget)
    others = [s.assignment for s in front(problem, resource, FRONT) if meets(s.prediction, limits)]
    return run_study(
        problem,
        budget,
        evaluate,
        steps=steps,
        trials=trials,
        storage_url=database,
        study_name=name,
        seed=seed,
        warm_start=[solve(problem, budget).assignment, *others[:1]],
        progress=lambda done, total, kl: progress.advance(
            "" if kl is None else f"best KL {kl:.4f}"
        ),
    )
