"""From a budget to a plan: score, time, solve, search, refine, verify, write.

Everything that a search learns is in the store. Another budget on the same model, data and device
starts from the solver; the same budget again reads back what was measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attnplan.costs.prefill import DeviceCosts, measure_device
from attnplan.costs.target import target_costs
from attnplan.models.load import LoadedModel
from attnplan.pipeline.baselines import best_baselines
from attnplan.pipeline.learnt import MARGIN, Corrections
from attnplan.pipeline.measured import Planner, verified
from attnplan.pipeline.progress import Progress, Quiet
from attnplan.pipeline.request import Choice, Outcome, Request
from attnplan.pipeline.score_methods import ScoreTable, score, scout
from attnplan.pipeline.study import study
from attnplan.profiles.capture.capture_files import CaptureFiles
from attnplan.profiles.records import records
from attnplan.profiles.records.digest import digest
from attnplan.profiles.store.database import Store
from attnplan.profiles.text.calibration import TokenSet
from attnplan.profiling.profiling import Workload, fitted_tensors, profile
from attnplan.search.budget import Budget, BudgetError, Limit
from attnplan.search.candidates import candidates as offered
from attnplan.search.corrections import Corrections as SearchCorrections
from attnplan.search.evaluation import Evaluated
from attnplan.search.problem import Assignment, Problem
from attnplan.search.refine import refine
from attnplan.search.solve import limits_of, solve

CALIBRATIONS = 2
"""Prefills of solved plans that the cost model is corrected by, at most."""
CLOSE = 0.05
"""A predicted prefill this close to the measured one needs no further correction."""
ATTEMPTS = 5
"""Searches before a budget is given up."""
GATED = 4
"""Plans of one search, best first, of which the first that passes the gates is taken."""


def prepare(
    loaded: LoadedModel,
    work: Workload,
    store: Store,
    files: CaptureFiles,
    repeats: int,
    progress: Progress,
    *,
    methods: frozenset[str] | None = None,
    thorough: bool = False,
    target: Path | None = None,
) -> tuple[records.ProfileRun, ScoreTable, DeviceCosts]:
    """What every candidate loses on every head and costs here; only what is missing is measured.

    Unless methods are named or `thorough` is set, what no head could want is dropped after a look
    at a few layers; `thorough` also scores on all texts what the first one shows to be hopeless.
    """
    candidates = offered(loaded.identity.prefill_shape(work.context), methods)
    if len(candidates) < 2:
        raise ValueError(
            f"none of the methods saves anything at {work.context} tokens: name other methods, or "
            "a longer context"
        )
    progress.stage("Profiling", work.texts + 1)
    run = profile(loaded, work, store, files, progress.advance)
    if not thorough and methods is None:
        progress.stage("Scouting candidates", None)
        candidates = scout(loaded, work, store, files, run, candidates)
    if target is not None:
        candidates, costs = target_costs(loaded, work.context, candidates, target)
    else:
        progress.stage("Timing kernels", None)
        costs = measure_device(
            loaded, work, store, run, candidates, repeats=repeats, advance=progress.advance
        )
    progress.stage("Scoring candidates", work.texts + 1)
    head_ms = None if thorough else costs.fit.model.head_ms
    scores = score(loaded, work, store, files, run, candidates, progress.advance, head_ms=head_ms)
    return run, scores, costs


def plan(
    loaded: LoadedModel,
    work: Workload,
    holdout: TokenSet,
    store: Store,
    database: str,
    files: CaptureFiles,
    request: Request,
    progress: Progress | None = None,
) -> Outcome:
    """Search for the best plan within a budget, and verify it.

    Args:
        loaded: the model, not patched.
        work: calibration texts.
        holdout: texts that share nothing with them, of the same length.
        store: where everything that is learnt is kept.
        database: URL of the same store, for the study.
        files: captured tensors between profiling and scoring.
        request: budget and effort.
        progress: where long steps report to.

    Raises:
        BudgetError: the budget is out of reach by the cost models alone.
    """
    progress = progress or Quiet()
    run, scores, costs = prepare(
        loaded,
        work,
        store,
        files,
        request.repeats,
        progress,
        methods=request.methods,
        target=request.target,
    )
    planner = Planner(
        loaded,
        work,
        holdout,
        store,
        database,
        request,
        progress,
        run,
        scores,
        costs,
        fitted_tensors(store, run.id),
    )
    return _search(planner)


def _search(planner: Planner) -> Outcome:
    """Solve, search, refine and verify until a plan holds what it promises."""
    request, store, progress = planner.request, planner.store, planner.progress
    began = time.perf_counter()
    corrections = Corrections()
    problem = planner.problem(corrections)
    budget = never_slower(request.budget, problem)
    with _told(problem, request.budget):
        first = solve(problem, budget).assignment
        solver_seconds = time.perf_counter() - began
        progress.stage("Calibrating latency", CALIBRATIONS)
        corrections = _calibrated(planner, corrections, first, budget)
    problem = planner.problem(corrections)
    study_name = _study_name(planner, problem, corrections.tightened(budget))
    key = records.SearchKey(planner.run.id, planner.costs.device, request.canonical, request.seed)
    search = store.open_search(key, study_name)

    attempts: list[Choice] = []
    for attempt in range(ATTEMPTS):
        problem = planner.problem(corrections)
        within = corrections.tightened(never_slower(request.budget, problem, corrections.margin))
        trials = request.trials if attempt == 0 else -(-request.trials // 2)
        try:
            with _told(problem, request.budget):
                best = _best(planner, problem, within, trials)
        except BudgetError:
            if attempts:
                break  # corrected by what was measured, the budget is out of reach
            store.finish_search(search.id, "infeasible", {"attempts": []})
            raise
        if attempt + 1 < ATTEMPTS and not planner.copies(best.assignment):
            corrections = corrections.copying_more()
            continue
        if attempt + 1 < ATTEMPTS and not planner.is_fast(best.assignment):
            prefill = planner.prefill(best.assignment)
            corrections = corrections.late(*prefill, best.assignment, problem)
            continue
        progress.stage(f"Verifying plan {len(attempts) + 1}", None)
        choice = verified(planner, "per head", best.assignment, problem, lengths=True)
        attempts.append(choice)
        if not choice.misses:
            break
        corrections = corrections.learn(choice, best.assignment, problem, request.budget)
    chosen = attempts[-1] if not attempts[-1].misses else None
    progress.stage("Measuring baselines", None)
    problem = planner.problem(Corrections(copying=0.0))
    others = best_baselines(planner, problem)
    better = best_of(chosen, others, request.budget)
    if better is not None and better is not chosen:
        index = {candidate: c for c, candidate in enumerate(planner.scores.candidates)}
        assignment = np.array([[index[a] for a in row] for row in better.layers])
        better = verified(planner, better.name, assignment, problem, lengths=True)
        chosen = chosen if better.misses else better
    store.finish_search(
        search.id,
        "complete" if chosen else "infeasible",
        {
            "attempts": [{"misses": list(c.misses), **c.measured.as_dict()} for c in attempts],
            "solver_seconds": solver_seconds,
        },
    )
    return Outcome(
        plan=chosen,
        attempts=tuple(attempts),
        baselines=tuple(others),
        costs=planner.costs,
        search=search.id,
        run=planner.run.id,
        fitted=planner.fitted,
        solver_seconds=solver_seconds,
        evaluations=len(planner.measured_kl),
    )


def best_of(found: Choice | None, others: Sequence[Choice], budget: Budget) -> Choice | None:
    """The plan of a search, or a baseline that holds the budget too and does better, as measured.

    Args:
        found: None where no plan per head held the budget.
        others: the baselines.
        budget: says what is minimised.
    """

    def value(choice: Choice) -> float:
        measured = choice.measured
        if budget.objective == "latency":
            return measured.latency_ms / measured.dense_ms
        return measured.quality.kl_per_token

    feasible = [other for other in others if not other.misses and other.measured.crossover]
    return min([*([] if found is None else [found]), *feasible], key=value, default=None)


@contextmanager
def _told(problem: Problem, asked: Budget) -> Iterator[None]:
    """Says that a budget is out of reach in terms of what was asked for."""
    try:
        yield
    except BudgetError as error:
        if error.resource != "latency_ms" or asked.max_latency is not None:
            raise
        dense_ms = problem.predict(problem.dense).latency_ms
        raise BudgetError(
            f"no plan within the budget is predicted to be faster than dense: the fastest needs "
            f"{error.smallest:.4g} ms, dense {dense_ms:.4g} ms",
            error.resource,
            error.smallest,
        ) from None


def _calibrated(
    planner: Planner, corrections: Corrections, assignment: Assignment, budget: Budget
) -> Corrections:
    """The cost model corrected by the prefill that the solver's own answers really take."""
    for _ in range(CALIBRATIONS):
        planner.progress.advance()
        problem = planner.problem(corrections)
        plan_ms, dense_ms = planner.prefill(assignment)
        here = plan_ms * problem.predict(problem.dense).latency_ms / dense_ms
        ratio = here / problem.predict(assignment).latency_ms
        corrections = replace(
            corrections, ms=corrections.ms * problem.latency.factor(assignment, here)
        )
        if abs(ratio - 1) < CLOSE:
            break
        assignment = solve(planner.problem(corrections), budget).assignment
    return corrections


def never_slower(budget: Budget, problem: Problem, margin: float = MARGIN) -> Budget:
    """The budget with a latency limit below dense, whatever else it says."""
    dense_ms = problem.predict(problem.dense).latency_ms
    attention_ms = dense_ms - problem.latency.rest_ms
    limit = Limit(1 - (1 - margin) * attention_ms / dense_ms, "x")
    if budget.max_latency is not None:
        limit = min(limit, budget.max_latency, key=lambda each: each.of(dense_ms))
    return replace(budget, max_latency=limit, minimize=budget.objective)


def _best(planner: Planner, problem: Problem, budget: Budget, trials: int) -> Evaluated:
    """The best assignment by measured KL on the calibration texts."""
    request, progress = planner.request, planner.progress
    steps = planner.work.texts
    if trials > 0:
        result = study(
            problem,
            budget,
            planner.evaluate,
            resource="latency_ms",
            steps=steps,
            trials=trials,
            database=planner.database,
            name=_study_name(planner, problem, budget),
            seed=request.seed,
            progress=progress,
        )
        progress.stage("Checking gates", None)
        limits = limits_of(problem, budget)
        incumbent, learnt = gated(result.ranked, limits, planner.passes)
        multipliers = learnt.multipliers(problem)
    else:
        solution = solve(problem, budget)
        kls = tuple(planner.evaluate(solution.assignment, step) for step in range(steps))
        incumbent = Evaluated(solution.assignment, solution.prediction, kls)
        multipliers = None
    if request.swaps < 1:
        return incumbent
    progress.stage("Refining", request.swaps)
    refined = refine(
        problem,
        budget,
        incumbent,
        planner.evaluate,
        evaluations=request.swaps,
        multipliers=multipliers,
        progress=lambda done, total, kl: progress.advance(f"KL {kl:.4f}"),
    )
    progress.stage("Checking gates", None)
    if planner.passes(incumbent.assignment) and not planner.passes(refined.best.assignment):
        return incumbent
    return refined.best


def gated(
    ranked: Sequence[tuple[Evaluated, SearchCorrections]],
    limits: NDArray[np.float64],
    passes: Callable[[Assignment], bool],
) -> tuple[Evaluated, SearchCorrections]:
    """The first of some plans, best first, within the limits that passes; else the best."""
    for evaluated, corrections in ranked[:GATED]:
        if evaluated.violation(limits) == 0 and passes(evaluated.assignment):
            return evaluated, corrections
    return ranked[0]


def _study_name(planner: Planner, problem: Problem, budget: Budget) -> str:
    """Unique for everything that a study's trials depend on."""
    found = digest(
        [
            planner.run.id,
            planner.costs.device.digest,
            budget.canonical(),
            planner.request.seed,
            list(problem.names),
            problem.fisher.tolist(),
            problem.latency.head_ms.round(3).tolist(),
        ]
    )
    return f"attnplan-{found[:24]}"
