"""From a budget to a plan: score, time, solve, search, refine, verify, write.

Everything that a search learns is in the store. Another budget on the same model, data and device
starts from the solver; the same budget again reads back what was measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attnplan.costs.prefill import DeviceCosts, candidate_name, engine_of, measure_device
from attnplan.costs.target import target_costs
from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.models.load import LoadedModel
from attnplan.pipeline.score_methods import ScoreTable, score, scout
from attnplan.pipeline.verify import Layers, Measured, copies, fast, measure, misses, running
from attnplan.profiles.capture.capture_files import CaptureFiles
from attnplan.profiles.records import records
from attnplan.profiles.records.digest import digest
from attnplan.profiles.store.database import Store
from attnplan.profiles.text.calibration import TokenSet
from attnplan.profiling.profiling import Workload, fitted_tensors, model_record, profile
from attnplan.quality.prefill import Reference, induction_accuracy, original, prefill_latency
from attnplan.search import baselines
from attnplan.search.budget import Budget, BudgetError, Limit
from attnplan.search.candidates import candidates as offered
from attnplan.search.corrections import Corrections as SearchCorrections
from attnplan.search.evaluation import Evaluated
from attnplan.search.problem import Assignment, Problem
from attnplan.search.problem import digest as assignment_digest
from attnplan.search.refine import refine
from attnplan.search.solve import Solution, front, limits_of, meets, solve
from attnplan.search.study import run_study

COPYING = 0.2
"""Weight of the repeated random string among the scores; raised when the induction gate fails."""
HELD_OUT = 1.15
"""How much more a plan is expected to lose on held-out than on calibration text."""
MARGIN = 0.8
"""Attention under a plan must be predicted below this share of dense: no plan may be slower."""
STRIDE = 4
"""The study compares every fourth position; verification compares all."""
MEASURED_MARGIN = 0.85
"""The same, once the prediction is corrected by a plan that was verified."""
CALIBRATIONS = 2
"""Prefills of solved plans that the cost model is corrected by, at most."""
CLOSE = 0.05
"""A predicted prefill this close to the measured one needs no further correction."""
ATTEMPTS = 5
"""Searches before a budget is given up."""
GATED = 4
"""Plans of one search, best first, of which the first that passes the gates is taken."""


class Progress(Protocol):
    """Where long steps report to."""

    def stage(self, name: str, total: int | None) -> Any:
        """Begin a stage of `total` units, or of an unknown number."""

    def advance(self, detail: str = "") -> None:
        """One unit is done, or begins with what `detail` says."""


class Quiet:
    """No progress."""

    def stage(self, name: str, total: int | None) -> None:
        pass

    def advance(self, detail: str = "") -> None:
        pass


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
class Corrections:
    """What measurements taught about the predictions.

    Attributes:
        copying: weight of the repeated random string among the scores.
        kl: by what a limit on KL is divided, so that held-out text keeps it: a plan that is
            chosen by its KL on calibration text loses more on other text.
        ms: measured over predicted time of mixed layers.
        margin: what attention may take of dense, as predicted; wider once a plan was measured.
    """

    copying: float = COPYING
    kl: float = HELD_OUT
    ms: float = 1.0
    margin: float = MARGIN

    def tightened(self, budget: Budget) -> Budget:
        """The budget with limits on KL that leave room for held-out text."""
        if budget.max_kl is not None:
            budget = replace(budget, max_kl=budget.max_kl / self.kl)
        if budget.max_ppl_ratio is not None:
            budget = replace(budget, max_ppl_ratio=budget.max_ppl_ratio ** (1 / self.kl))
        return budget

    def copying_more(self) -> Corrections:
        """Corrections under which the repeated string counts for more."""
        return replace(self, copying=self.copying * 5)

    def late(
        self, plan_ms: float, dense_ms: float, assignment: Assignment, problem: Problem
    ) -> Corrections:
        """Corrections under which a measured prefill would have been predicted."""
        here = plan_ms * problem.predict(problem.dense).latency_ms / dense_ms
        ms = self.ms * problem.latency.factor(assignment, here)
        return replace(self, ms=ms, margin=MEASURED_MARGIN)

    def learn(
        self, choice: Choice, assignment: Assignment, problem: Problem, budget: Budget
    ) -> Corrections:
        """Corrections under which the broken limits would have been seen coming."""
        measured = choice.measured
        learnt = self
        if not copies(measured.induction, measured.induction_dense):
            learnt = learnt.copying_more()
        excess = 1.0
        if budget.max_kl is not None:
            excess = max(excess, measured.quality.kl_per_token / budget.max_kl)
        if budget.max_ppl_ratio is not None:
            loss = math.log(max(measured.quality.perplexity_ratio, 1.0))
            excess = max(excess, loss / math.log(budget.max_ppl_ratio))
        if excess > 1:
            learnt = replace(learnt, kl=learnt.kl * excess * 1.1)
        if not fast(measured.latency_ms, measured.dense_ms, budget):
            learnt = learnt.late(measured.latency_ms, measured.dense_ms, assignment, problem)
        return learnt


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


@dataclass
class Planner:
    """A search in progress: the model, its scores and costs, and what has been measured."""

    loaded: LoadedModel
    work: Workload
    holdout: TokenSet
    store: Store
    database: str
    request: Request
    progress: Progress
    run: records.ProfileRun
    scores: ScoreTable
    costs: DeviceCosts
    fitted: dict[int, dict[str, Tensor]]
    calibration: Reference = field(init=False)
    reference: Reference = field(init=False)
    measured_kl: dict[tuple[str, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calibration = Reference(self.loaded.model, self.work.tokens.tokens)
        self.reference = Reference(self.loaded.model, self.holdout.tokens)

    @property
    def shape(self) -> AttentionShape:
        return self.loaded.identity.prefill_shape(self.work.context)

    def problem(self, corrections: Corrections) -> Problem:
        """The separable problem with corrections learnt from measurements."""
        choices = self.scores.candidates
        model = self.costs.fit.model.calibrated(corrections.ms)
        fisher = self.scores.texts + corrections.copying * self.scores.copying
        return Problem(
            names=tuple(candidate_name(a) for a in choices),
            families=tuple(a.family for a in choices),
            windows=tuple(self._window(a) for a in choices),
            fisher=fisher,
            density=np.array([a.density(self.shape) for a in choices]),
            kv_bytes=np.ones(len(choices)),
            group=self.shape.group,
            latency=model,
            cache_bytes=self._cache_bytes(),
        )

    def _cache_bytes(self) -> float:
        """The dense KV cache of one sequence."""
        shape, model = self.shape, self.loaded.model
        values = 2 * self.loaded.identity.layers * shape.kv_heads * shape.keys * shape.head_dim
        return float(values * model.dtype.itemsize)

    def _window(self, approximation: Approximation) -> int:
        """Nearest keys that a candidate always keeps."""
        near = approximation.near
        return self.work.context if approximation.is_dense else int(getattr(near, "window", 0))

    def layers(self, assignment: Assignment) -> Layers:
        choices = self.scores.candidates
        return [[choices[c] for c in row] for row in assignment.tolist()]

    def evaluate(self, assignment: Assignment, step: int) -> float:
        """Measured KL of an assignment on one calibration text; kept in the store."""
        name = assignment_digest(assignment)
        if (name, step) not in self.measured_kl:
            key = self._key("calibration kl", assignment, {"step": step, "stride": STRIDE})
            values = self.store.load_measurement(key)
            if values is None:
                layers = self.layers(assignment)
                kl, _, _ = self.calibration.compare(
                    lambda: running(self.loaded.model, layers, self.fitted), step, STRIDE
                )
                values = {"kl": kl}
                self.store.save_measurement(key, values)
            self.measured_kl[name, step] = float(values["kl"])
        return self.measured_kl[name, step]

    def measure(self, assignment: Assignment, *, lengths: bool = True) -> Measured:
        """Everything about an assignment on held-out text and on the device; kept in the store."""
        conditions = {
            **self._device_conditions(assignment),
            "holdout": self.holdout.digest,
            "lengths": lengths,
            "repeats": self.request.repeats,
        }
        if not self.costs.is_here:
            conditions["predicted_ms"] = self.prefill(assignment)
        key = self._key("verification", assignment, conditions)
        values = self.store.load_measurement(key)
        if values is None:
            found = measure(
                self.loaded.model,
                self.layers(assignment),
                self.fitted,
                self.reference,
                self.shape,
                prefill=self.prefill(assignment),
                induction=self.induction(assignment),
                induction_dense=self.induction(None),
                repeats=self.request.repeats,
                lengths=lengths,
                advance=self.progress.advance,
            )
            self.store.save_measurement(key, found.as_dict())
            return found
        return Measured.from_dict(values)

    def prefill(self, assignment: Assignment) -> tuple[float, float]:
        """Prefill times (plan, dense) in ms of an assignment; kept in the store.

        Measured, or as predicted for a device that is not here.
        """
        if not self.costs.is_here:
            model = self.costs.fit.model
            return model.predict(assignment), model.predict(np.zeros_like(assignment))
        conditions = {**self._device_conditions(assignment), "repeats": self.request.repeats}
        key = self._key("prefill", assignment, conditions)
        values = self.store.load_measurement(key)
        if values is None:
            layers = self.layers(assignment)
            timing = prefill_latency(
                self.loaded.model,
                lambda: running(self.loaded.model, layers, self.fitted),
                self.work.tokens.tokens[0],
                repeats=self.request.repeats,
            )
            values = {"plan_ms": timing.median_ms, "dense_ms": timing.dense_ms}
            self.store.save_measurement(key, values)
        return float(values["plan_ms"]), float(values["dense_ms"])

    def _device_conditions(self, assignment: Assignment) -> dict[str, Any]:
        """What the times of an assignment depend on: the device, and the code of its methods."""
        engine = self.costs.engine
        if self.costs.is_here:
            run = {a for layer in self.layers(assignment) for a in layer}
            engine = engine_of(self.costs.device.kind, run)
        return {"device": self.costs.device.digest, "engine": engine}

    def induction(self, assignment: Assignment | None) -> float:
        """What the model copies under an assignment, or as it is; kept in the store."""
        key = self._key(
            "induction", assignment, {"seed": self.request.seed, "length": self.work.string}
        )
        values = self.store.load_measurement(key)
        if values is None:
            layers = None if assignment is None else self.layers(assignment)
            accuracy = induction_accuracy(
                self.loaded.model,
                lambda: (
                    original()
                    if layers is None
                    else running(self.loaded.model, layers, self.fitted)
                ),
                length=self.work.string,
                seed=self.request.seed,
            )
            values = {"accuracy": accuracy}
            self.store.save_measurement(key, values)
        return float(values["accuracy"])

    def copies(self, assignment: Assignment) -> bool:
        """Whether the model under an assignment passes the induction gate."""
        return copies(self.induction(assignment), self.induction(None))

    def is_fast(self, assignment: Assignment) -> bool:
        """Whether the prefill under an assignment, as measured, is within the budget."""
        return fast(*self.prefill(assignment), self.request.budget)

    def passes(self, assignment: Assignment) -> bool:
        """Whether an assignment passes what can be measured without held-out text."""
        return self.copies(assignment) and self.is_fast(assignment)

    def _key(
        self, kind: str, assignment: Assignment | None, conditions: dict[str, Any]
    ) -> records.MeasurementKey:
        names = None
        if assignment is not None:
            names = [[catalog.key(a) for a in row] for row in self.layers(assignment)]
        return records.MeasurementKey(
            model=model_record(self.loaded),
            kind=kind,
            subject=digest(names),
            conditions={"run": self.run.id, "context": self.work.context, **conditions},
        )


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
    study = _study_name(planner, problem, corrections.tightened(budget))
    key = records.SearchKey(planner.run.id, planner.costs.device, request.canonical, request.seed)
    search = store.open_search(key, study)

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
        choice = _measured(planner, "per head", best.assignment, problem)
        attempts.append(choice)
        if not choice.misses:
            break
        corrections = corrections.learn(choice, best.assignment, problem, request.budget)
    chosen = attempts[-1] if not attempts[-1].misses else None
    progress.stage("Measuring baselines", None)
    others = _baselines(planner, planner.problem(Corrections(copying=0.0)))
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
        progress.stage("Searching", trials)
        warm = [s.assignment for s in front(problem, points=16) if _within(s, problem, budget)]
        result = run_study(
            problem,
            budget,
            planner.evaluate,
            steps=steps,
            trials=trials,
            storage_url=planner.database,
            study_name=_study_name(planner, problem, budget),
            seed=request.seed,
            warm_start=[solve(problem, budget).assignment, *warm[:1]],
            progress=lambda done, total, kl: progress.advance(
                "" if kl is None else f"best KL {kl:.4f}"
            ),
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


def _within(solution: Solution, problem: Problem, budget: Budget) -> bool:
    return meets(solution.prediction, limits_of(problem, budget))


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


def _measured(planner: Planner, name: str, assignment: Assignment, problem: Problem) -> Choice:
    """Verify an assignment against the budget."""
    predicted = problem.predict(assignment)
    lengths = name == "per head" and planner.costs.is_here
    measured = planner.measure(assignment, lengths=lengths)
    dense_ms = problem.predict(problem.dense).latency_ms
    return Choice(
        name=name,
        layers=planner.layers(assignment),
        predicted_kl=predicted.kl,
        predicted_ms=predicted.latency_ms * measured.dense_ms / dense_ms,
        measured=measured,
        misses=tuple(misses(measured, planner.request.budget)),
    )


def _baselines(planner: Planner, problem: Problem) -> list[Choice]:
    """Best uniform and best per-layer plan at the same budget, by measured KL."""
    budget = planner.request.budget
    found = []
    steps = range(planner.work.texts)
    uniform = _best_uniform(planner, problem, budget)
    if uniform is not None:
        found.append(_measured(planner, "uniform", uniform, problem))
    try:
        layered = baselines.per_layer(problem, budget).assignment
    except BudgetError:
        return found
    if uniform is not None:  # one method for all layers is a per-layer plan too
        layered = min(
            (layered, uniform), key=lambda a: sum(planner.evaluate(a, step) for step in steps)
        )
    found.append(_measured(planner, "per layer", layered, problem))
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
