"""The Optuna study: which corrections of the separable model give the best measured plan.

A trial is one set of `Corrections`; the solver turns it into an assignment, and the assignment is
measured sequence by sequence. Two kinds of study:

- KL is minimised at a bounded cost: one objective. The cost holds by construction, so trials that
  fall behind on the same sequences are pruned.
- Latency or memory is minimised at a bounded KL: objectives (kl, latency, and memory where it
  counts), limits as constraints. Optuna does not prune such studies; a trial whose KL is far above
  the limit stops early.

A study lives in a database and is continued there: trials of a killed process are failed and
queued again, a finished study is read back.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from attnplan.search.budget import Budget
from attnplan.search.corrections import (
    Choice,
    Corrections,
    Real,
    first_params,
    from_params,
    space,
)
from attnplan.search.evaluation import (
    Evaluate,
    Evaluated,
    MeasureLatency,
    finite_kl,
    pareto,
    ranked,
)
from attnplan.search.problem import Assignment, Problem, digest, from_lists, to_lists
from attnplan.search.solve import limits_of

Progress = Callable[[int, int, float | None], None]
"""Called with trials done, trials in total and the best measured KL so far."""

KEEP = 0.25
"""A trial goes on while it is among this share of the completed ones, on the same sequences."""
WAIT_S = 60.0
"""How long to wait for other processes that write to the same SQLite file."""
HOPELESS = 2.0
"""Where KL is bounded, a trial stops at this multiple of the limit."""


@dataclass(frozen=True)
class TrialRow:
    """One line of the study's table.

    Attributes:
        origin: 'warm start', 'sampled', or what the queued trial tried.
        state: 'complete' or 'pruned'.
        kl: mean over the sequences that were measured.
        steps: how many sequences that was.
        reused: nothing was measured: the assignment had been evaluated before.
    """

    number: int | None
    origin: str
    state: str
    digest: str
    kl: float
    steps: int
    density: float
    latency_ms: float
    kv_share: float
    reused: bool
    params: dict[str, Any]


@dataclass(frozen=True, eq=False)
class StudyResult:
    """What a study found.

    Attributes:
        ranked: what was evaluated and the corrections that led to it (neutral for a warm start):
            lowest objective within the budget as measured first, then by violation.
        feasible: whether the first is within the budget.
        trials: warm starts first, then trials by number.
        front: assignments that nothing beats in both measured KL and cost.
    """

    ranked: tuple[tuple[Evaluated, Corrections], ...]
    feasible: bool
    trials: tuple[TrialRow, ...]
    front: tuple[Evaluated, ...]

    @property
    def best(self) -> Evaluated:
        return self.ranked[0][0]

    @property
    def corrections(self) -> Corrections:
        return self.ranked[0][1]


def run_study(
    problem: Problem,
    budget: Budget,
    evaluate: Evaluate,
    *,
    steps: int,
    trials: int,
    storage_url: str,
    study_name: str,
    seed: int = 0,
    warm_start: Sequence[Assignment] = (),
    measure_latency: MeasureLatency | None = None,
    progress: Progress | None = None,
) -> StudyResult:
    """Run, continue or read back a study.

    Args:
        problem: scores and costs.
        budget: limits and objective.
        evaluate: measured KL of an assignment on sequence 0 to steps - 1. A value that is not
            finite counts as `BROKEN_KL`.
        steps: calibration sequences.
        trials: how many the study has in the end, those of earlier runs included.
        storage_url: any SQLAlchemy URL.
        study_name: unique per problem and budget.
        seed: of the sampler; a continued study samples on, not again.
        warm_start: assignments to measure first, on all sequences, beside the trials.
        measure_latency: called for trials that were not pruned, where latency counts.
        progress: called after every trial.

    Raises:
        BudgetError: the budget is out of reach.
        ValueError: the name belongs to a study of another problem.
    """
    with _quiet():
        storage = _storage(storage_url)
        try:
            study = _Study(problem, budget, evaluate, steps, measure_latency, storage)
            study.open(study_name, seed, trials)
            study.measure_warm_starts(warm_start)
            study.run(trials, progress)
            return study.result()
        finally:
            storage.remove_session()
            storage.engine.dispose()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna logs every trial and warns of features that are new: neither is for our users."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _storage(url: str) -> optuna.storages.RDBStorage:
    arguments = {"timeout": WAIT_S, "factory": _Connection} if url.startswith("sqlite") else {}
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": arguments})
        except Exception as error:  # of SQLAlchemy, which only the store imports
            # Two processes create the tables of a new database: the later one looks again.
            raced = any(text in str(error) for text in ("already exists", "alembic_version"))
            if not raced or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class _Connection(sqlite3.Connection):
    """A connection to a database in write-ahead mode, which survives a killed process too.

    Optuna commits about thirty times per trial: 13 ms each with SQLite's default journal.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        deadline = time.monotonic() + WAIT_S
        while True:  # the change of mode does not wait for other connections by itself
            try:
                self.execute("PRAGMA journal_mode = WAL").fetchall()
                break
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self.execute("PRAGMA synchronous = NORMAL")


class PairedPruner(optuna.pruners.BasePruner):  # type: ignore[misc]
    """Prunes a trial whose running mean is not among the best on the same sequences.

    Optuna's percentile pruner compares the best value over all steps so far; here steps are
    sequences of different difficulty, so only values at the same step compare.
    """

    def __init__(self, keep: float, startup: int, others: list[list[float]]) -> None:
        self.keep = keep
        self.startup = startup
        self.others = others  # running means of the warm starts

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        step = trial.last_step
        if step is None:
            return False
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        values = [t.intermediate_values[step] for t in done if step in t.intermediate_values]
        values += [means[step] for means in self.others]
        if len(values) < self.startup:
            return False
        return bool(trial.intermediate_values[step] > np.quantile(values, self.keep))


class _Study:
    """One run of a study: the objective, and what earlier trials have measured."""

    def __init__(
        self,
        problem: Problem,
        budget: Budget,
        evaluate: Evaluate,
        steps: int,
        measure_latency: MeasureLatency | None,
        storage: optuna.storages.RDBStorage,
    ) -> None:
        self.problem = problem
        self.budget = budget
        self.evaluate = evaluate
        self.steps = steps
        self.storage = storage
        self.limits = limits_of(problem, budget)
        self.single = budget.objective == "kl"
        timed = budget.max_latency is not None or budget.objective == "latency"
        self.measure_latency = measure_latency if timed else None
        self.variables = space(problem, budget, timed=self.measure_latency is not None)
        self.cost = 2 if timed else (3 if np.isfinite(self.limits[3]) else 1)
        self.known: dict[str, list[float]] = {}
        self.known_ms: dict[str, float] = {}
        self.warm_means: list[list[float]] = []

    # Opening and continuing.

    def open(self, name: str, seed: int, trials: int) -> None:
        """Create or load the study, clean up after killed processes, queue first trials."""
        objectives = 1
        if not self.single:
            memory = np.isfinite(self.limits[3]) or self.budget.objective == "memory"
            objectives = 3 if memory else 2
        self.objectives = objectives
        self.study = optuna.create_study(
            storage=self.storage,
            study_name=name,
            load_if_exists=True,
            directions=["minimize"] * objectives,
            pruner=PairedPruner(KEEP, 4, self.warm_means),
        )
        self._check_identity(name)
        _fail_zombies(self.study)
        before = self.study.get_trials(deepcopy=False)
        # A continued study must not draw the same random numbers again.
        self.study.sampler = _sampler(seed + 7919 * len(before), trials)
        for trial in before:
            self._remember(trial.user_attrs)
        self._queue(before, trials)

    def _check_identity(self, name: str) -> None:
        identity = {
            "candidates": list(self.problem.names),
            "layers": self.problem.layers,
            "heads": self.problem.heads,
            "budget": self.budget.canonical(),
            "steps": self.steps,
        }
        known = self.study.user_attrs.get("identity")
        if known is None:
            self.study.set_user_attr("identity", identity)
        elif known != json.loads(json.dumps(identity)):
            different = [key for key in identity if known.get(key) != identity[key]]
            raise ValueError(f"study {name!r} has other {', '.join(different)}: use another name")

    def _queue(self, before: Sequence[FrozenTrial], trials: int) -> None:
        origins = {t.user_attrs.get("origin") for t in before}
        retried = {t.user_attrs.get("retry_of") for t in before}
        for trial in before:
            complete = len(trial.params) == len(self.variables)
            if trial.state == TrialState.FAIL and complete and trial.number not in retried:
                attributes = {"retry_of": trial.number}
                if "origin" in trial.user_attrs:
                    attributes["origin"] = trial.user_attrs["origin"]
                self.study.enqueue_trial(trial.params, user_attrs=attributes)
        for origin, params in first_params(self.variables, trials):
            if origin not in origins:
                self.study.enqueue_trial(params, user_attrs={"origin": origin})

    def _remember(self, attributes: dict[str, Any]) -> None:
        key, values = attributes.get("digest"), attributes.get("kl_steps", [])
        if key is not None:
            if len(values) > len(self.known.get(key, [])):
                self.known[key] = list(values)
            if attributes.get("latency_ms") is not None:
                self.known_ms[key] = attributes["latency_ms"]

    # Measuring.

    def measure_warm_starts(self, assignments: Sequence[Assignment]) -> None:
        """Measure assignments that no corrections need to lead to; each only once."""
        stored = {k: v for k, v in self.study.user_attrs.items() if k.startswith("warm:")}
        for attributes in stored.values():
            self._remember(attributes)
        for assignment in assignments:
            self.problem.check(assignment)
            key = digest(assignment)
            if f"warm:{key}" not in stored:
                values = self.known.get(key, [])
                values = values + [
                    finite_kl(self.evaluate(assignment, s)) for s in range(len(values), self.steps)
                ]
                attributes = {
                    "assignment": to_lists(assignment),
                    "digest": key,
                    "kl_steps": values,
                    "latency_ms": self._latency(assignment, key),
                }
                self.study.set_user_attr(f"warm:{key}", attributes)
                stored[f"warm:{key}"] = attributes
                self._remember(attributes)
        self.warm_means.extend(_running_means(a["kl_steps"]) for a in stored.values())

    def _latency(self, assignment: Assignment, key: str) -> float | None:
        if self.measure_latency is None:
            return None
        if key not in self.known_ms:
            measured = self.measure_latency(assignment)
            if measured is None:
                return None
            self.known_ms[key] = float(measured)
        return self.known_ms[key]

    def run(self, trials: int, progress: Progress | None) -> None:
        """Go on until `trials` have ended, whoever ran them."""
        while (done := self._done()) < trials:
            self._try()
            if progress is not None:
                evaluated = [e.kl for e in self._evaluated()]
                progress(min(done + 1, trials), trials, min(evaluated, default=None))

    def _try(self) -> None:
        """One trial.

        SQLite lets two processes take the same queued trial: the one that ends first counts.
        """
        trial = self.study.ask()
        state: TrialState | None = None
        values: float | tuple[float, ...] | None = None
        try:
            values = self._objective(trial)
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except optuna.exceptions.UpdateFinishedTrialError:
            return
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        self.study.tell(trial, values, state=state, skip_if_finished=True)

    def _done(self) -> int:
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        return len(self.study.get_trials(deepcopy=False, states=states))

    def _objective(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        corrections = _suggest(trial, self.variables)
        assignment = corrections.solve(self.problem, self.budget)
        key = digest(assignment)
        known = self.known.get(key, [])
        trial.set_user_attr("digest", key)
        trial.set_user_attr("assignment", to_lists(assignment))
        trial.set_user_attr("reused", len(known) > 0)
        prediction = self.problem.predict(assignment)
        self._constrain(trial, 1, prediction.density)
        self._constrain(trial, 3, prediction.kv_share)

        values: list[float] = []
        for step in range(self.steps):
            if step < len(known):
                values.append(known[step])
            else:
                values.append(finite_kl(self.evaluate(assignment, step)))
            trial.set_user_attr("kl_steps", values)
            kl = sum(values) / len(values)
            if self.single:
                trial.report(kl, step)
                if step + 1 < self.steps and trial.should_prune():
                    self._constrain(trial, 2, prediction.latency_ms)
                    self.known[key] = max(values, known, key=len)
                    raise optuna.TrialPruned
            elif len(values) > 1 and kl > HOPELESS * self.limits[0]:
                break
        self.known[key] = max(values, known, key=len)

        latency_ms = self._latency(assignment, key)
        trial.set_user_attr("latency_ms", latency_ms)
        latency_ms = prediction.latency_ms if latency_ms is None else latency_ms
        self._constrain(trial, 2, latency_ms)
        if self.single:
            return kl
        self._constrain(trial, 0, kl)
        return (kl, latency_ms, prediction.kv_share)[: self.objectives]

    def _constrain(self, trial: optuna.Trial, resource: int, value: float) -> None:
        limit = self.limits[resource]
        if np.isfinite(limit):
            excess = value / limit - 1
            trial.set_constraint(str(resource), excess if excess > 1e-9 else 0.0)

    # Reading back.

    def _evaluated(self) -> list[Evaluated]:
        """Every assignment that was measured on all sequences, or on all that it deserved."""
        rows = [v for k, v in self.study.user_attrs.items() if k.startswith("warm:")]
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        rows += [t.user_attrs for t in done]
        unique: dict[str, Evaluated] = {}
        for row in rows:
            if row["digest"] not in unique:
                assignment = from_lists(row["assignment"])
                prediction = self.problem.predict(assignment)
                values = tuple(row["kl_steps"])
                unique[row["digest"]] = Evaluated(
                    assignment, prediction, values, row.get("latency_ms")
                )
        return list(unique.values())

    def result(self) -> StudyResult:
        """The best of all runs of this study.

        Raises:
            ValueError: nothing was evaluated.
        """
        evaluated = self._evaluated()
        if not evaluated:
            raise ValueError("the study has no completed trial: give at least one trial")
        best = ranked(evaluated, self.limits, self.budget.objective)
        rows = [
            self._row(None, "warm start", "complete", v, {})
            for k, v in sorted(self.study.user_attrs.items())
            if k.startswith("warm:")
        ]
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        for t in self.study.get_trials(deepcopy=False, states=states):
            origin = t.user_attrs.get("origin", "sampled")
            rows.append(self._row(t.number, origin, t.state.name.lower(), t.user_attrs, t.params))
        params = {row.digest: row.params for row in reversed(rows)}
        return StudyResult(
            ranked=tuple(
                (e, from_params(params[e.digest]) if params[e.digest] else Corrections())
                for e in best
            ),
            feasible=best[0].violation(self.limits) == 0,
            trials=tuple(rows),
            front=pareto(evaluated, self.cost),
        )

    def _row(
        self,
        number: int | None,
        origin: str,
        state: str,
        attributes: dict[str, Any],
        params: dict[str, Any],
    ) -> TrialRow:
        prediction = self.problem.predict(from_lists(attributes["assignment"]))
        values = attributes["kl_steps"]
        measured = attributes.get("latency_ms")
        return TrialRow(
            number=number,
            origin=origin,
            state=state,
            digest=attributes["digest"],
            kl=sum(values) / len(values),
            steps=len(values),
            density=prediction.density,
            latency_ms=prediction.latency_ms if measured is None else measured,
            kv_share=prediction.kv_share,
            reused=attributes.get("reused", False),
            params=dict(params),
        )


def _running_means(values: Sequence[float]) -> list[float]:
    means: NDArray[np.float64] = np.cumsum(values) / np.arange(1, len(values) + 1)
    return [float(m) for m in means]


def _fail_zombies(study: optuna.Study) -> None:
    """Fail the running trials of processes that are gone.

    A process of this machine is gone if no process has its number; one of another machine is given
    a day. Trials of this very process were left by an exception.
    """
    here, me = socket.gethostname(), os.getpid()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, _, pid = trial.user_attrs.get("worker", ":").rpartition(":")
        started = trial.datetime_start or datetime.now()
        age = datetime.now() - started
        if not pid:  # killed between being created and naming its process
            gone = age > timedelta(minutes=1)
        elif host == here:
            gone = int(pid) == me or not _is_alive(int(pid))
        else:
            gone = age > timedelta(days=1)
        if gone:
            study.tell(trial.number, state=TrialState.FAIL)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _suggest(trial: optuna.Trial, variables: dict[str, Real | Choice]) -> Corrections:
    params: dict[str, Any] = {}
    for name, variable in variables.items():
        if isinstance(variable, Real):
            params[name] = trial.suggest_float(name, variable.low, variable.high, log=variable.log)
        else:
            params[name] = trial.suggest_categorical(name, variable.values)
    return from_params(params)


def _sampler(seed: int, trials: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(
        seed=seed, multivariate=True, n_startup_trials=max(4, min(10, trials // 3))
    )
