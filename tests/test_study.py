"""The study and the refinement on a synthetic model with interactions that scores miss."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from attnplan.search.budget import Budget, Limit
from attnplan.search.corrections import Corrections, first_params, from_params, space
from attnplan.search.evaluation import BROKEN_KL, Evaluated, kl_calibration
from attnplan.search.latency import LatencyModel
from attnplan.search.problem import Assignment, Problem, digest
from attnplan.search.refine import refine
from attnplan.search.solve import limits_of, meets, solve
from attnplan.search.study import StudyResult, run_study

STEPS = 3
LAYERS, HEADS = 10, 6
FAMILIES = ("dense", *("sparse", "low-rank", "hybrid") * 5)


def make_problem() -> Problem:
    rng = np.random.default_rng(0)
    candidates = len(FAMILIES)
    density = np.concatenate([[1.0], rng.uniform(0.05, 0.8, candidates - 1)])
    sensitivity = np.exp(rng.normal(0, 1.0, (LAYERS, HEADS, 1)))
    fisher = sensitivity * np.exp(rng.normal(0, 0.7, (LAYERS, HEADS, candidates)))
    fisher = fisher * (1 / density - 1) * 1e-4
    return Problem(
        names=("dense", *(f"c{i}" for i in range(1, candidates))),
        families=FAMILIES,
        windows=(0, *(64 * (1 + i % 3) for i in range(candidates - 1))),
        fisher=fisher,
        density=density,
        kv_bytes=np.ones(candidates),
        group=3,
        latency=LatencyModel(
            6.0, 0.3, density + np.linspace(0.1, 0, candidates), np.zeros(candidates), 10.0
        ),
    )


PROBLEM = make_problem()


class Model:
    """True KL: late layers matter more, low-rank heads more, and errors within a layer compound."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.fail_at = fail_at

    def __call__(self, assignment: Assignment, step: int) -> float:
        if self.fail_at is not None and len(self.calls) >= self.fail_at:
            raise RuntimeError("out of memory")
        self.calls.append((digest(assignment), step))
        return self.kl(assignment) * (1.0, 3.0, 0.5)[step]

    @staticmethod
    def kl(assignment: Assignment) -> float:
        layer, head = np.ogrid[:LAYERS, :HEADS]
        scores = PROBLEM.fisher[layer, head, assignment]
        late = np.linspace(0.4, 2.5, LAYERS)[:, None]
        low_rank = np.array([3.0 if f == "low-rank" else 1.0 for f in FAMILIES])
        by_layer = (scores * late * low_rank[assignment]).sum(1)
        return float((by_layer + 100 * by_layer**2).sum())


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def run(folder: Path, model: Model, budget: Budget, trials: int, **options: object) -> StudyResult:
    return run_study(
        PROBLEM,
        budget,
        model,
        steps=STEPS,
        trials=trials,
        storage_url=url(folder),
        study_name="s",
        **options,  # type: ignore[arg-type]
    )


def measured(model: Model, assignment: Assignment) -> Evaluated:
    values = tuple(model(assignment, step) for step in range(STEPS))
    return Evaluated(assignment, PROBLEM.predict(assignment), values)


DENSITY = Budget(max_density=0.35)


def test_the_study_and_the_refinement_each_beat_the_solver(tmp_path: Path) -> None:
    solver = measured(Model(), solve(PROBLEM, DENSITY).assignment)
    result = run(tmp_path, Model(), DENSITY, 24)
    assert result.feasible
    assert result.best.kl < 0.8 * solver.kl
    alone = refine(PROBLEM, DENSITY, solver, Model(), evaluations=40)
    assert alone.best.kl < 0.9 * solver.kl
    both = refine(
        PROBLEM,
        DENSITY,
        result.best,
        Model(),
        evaluations=40,
        multipliers=result.corrections.multipliers(PROBLEM),
    )
    assert both.best.kl < result.best.kl
    for refined in (alone, both):
        assert 0 < refined.evaluations <= 40
        assert refined.best.kl == pytest.approx(measured(Model(), refined.best.assignment).kl)
        assert meets(PROBLEM.predict(refined.best.assignment), limits_of(PROBLEM, DENSITY))


def test_refinement_measures_a_hopeless_proposal_on_half_of_the_sequences_only() -> None:
    model = Model()
    solver = measured(Model(), solve(PROBLEM, DENSITY).assignment)
    refined = refine(PROBLEM, DENSITY, solver, model, evaluations=20)
    assert refined.evaluations == 20
    assert len(model.calls) == len(set(model.calls)) < 20 * STEPS
    assert all(change < 0 for _, change, accepted in refined.history if accepted)


def test_calibration_is_the_median_ratio_of_measured_to_predicted_kl() -> None:
    prediction = PROBLEM.predict(solve(PROBLEM, DENSITY).assignment)
    evaluated = [
        Evaluated(PROBLEM.dense, prediction, (factor * prediction.kl,)) for factor in (1, 2, 9)
    ]
    assert kl_calibration(evaluated) == pytest.approx(2.0)
    assert kl_calibration([]) == 1.0


def test_no_assignment_is_measured_twice_on_a_sequence(tmp_path: Path) -> None:
    model = Model()
    result = run(tmp_path, model, DENSITY, 18, warm_start=[solve(PROBLEM, DENSITY).assignment])
    assert len(model.calls) == len(set(model.calls))
    assert [t.number for t in result.trials if t.number is not None] == list(range(18))
    pruned = [t for t in result.trials if t.state == "pruned"]
    assert pruned
    assert all(t.steps < STEPS for t in pruned), "pruned by sequence"
    assert all(t.steps == STEPS for t in result.trials if t.state == "complete")
    neutral = next(t for t in result.trials if t.origin == "neutral")
    assert neutral.reused
    assert result.trials[0].origin == "warm start"
    assert neutral.kl == result.trials[0].kl


def test_an_interrupted_study_goes_on_to_the_same_number_of_trials(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, Model(fail_at=14), DENSITY, 10)
    rest = Model()
    result = run(tmp_path, rest, DENSITY, 10)
    assert len(result.trials) == 10
    (tmp_path / "whole").mkdir()
    whole = Model()
    assert len(run(tmp_path / "whole", whole, DENSITY, 10).trials) == 10
    assert len(rest.calls) == len(set(rest.calls)) < len(whole.calls)
    again = Model()
    assert run(tmp_path, again, DENSITY, 10).best.digest == result.best.digest
    assert again.calls == [], "a finished study is read back"


def start(
    folder: Path, trials: int, *, kill_at: int = -1, seed: int = 0
) -> subprocess.Popen[bytes]:
    """Another process that runs the study, and kills itself at a measurement."""
    script = f"""
        import importlib.util, os
        from pathlib import Path
        spec = importlib.util.spec_from_file_location("t", {__file__!r})
        t = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(t)
        class Killed(t.Model):
            def __call__(self, assignment, step):
                if len(self.calls) == {kill_at}:
                    os.kill(os.getpid(), 9)
                return super().__call__(assignment, step)
        t.run(Path({str(folder)!r}), Killed(), t.DENSITY, {trials}, seed={seed})
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])


def test_a_killed_process_leaves_a_study_that_can_be_finished(tmp_path: Path) -> None:
    assert start(tmp_path, 12, kill_at=12).wait() == -9
    result = run(tmp_path, Model(), DENSITY, 12)
    assert len({t.number for t in result.trials}) == len(result.trials) == 12
    origins = [t.origin for t in result.trials if t.origin != "sampled"]
    assert len(origins) == len(set(origins)), "each queued trial ends once"


def test_two_processes_work_on_one_study(tmp_path: Path) -> None:
    both = [start(tmp_path, 10, seed=seed) for seed in (1, 2)]
    assert [process.wait() for process in both] == [0, 0]
    result = run(tmp_path, Model(), DENSITY, 10)
    assert 10 <= len(result.trials) <= 11, "the last trials of both may end together"
    assert result.feasible


def test_the_same_seed_gives_the_same_study(tmp_path: Path) -> None:
    results = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        results.append(run(tmp_path / name, Model(), DENSITY, 10, seed=3))
    assert [t.digest for t in results[0].trials] == [t.digest for t in results[1].trials]


def test_the_least_latency_within_a_kl_is_found_as_measured(tmp_path: Path) -> None:
    budget = Budget(max_kl=0.05)
    model = Model()
    plain = measured(model, solve(PROBLEM, budget).assignment)
    assert plain.kl > 0.05, "the separable model is too optimistic here"
    result = run(tmp_path, model, budget, 24)
    assert result.feasible
    assert result.best.kl <= 0.05
    assert result.best.prediction.latency_ms < PROBLEM.predict(PROBLEM.dense).latency_ms
    losses = [e.kl for e in result.front]
    assert len(losses) > 2
    assert losses == sorted(losses)
    refined = refine(PROBLEM, budget, result.best, model, evaluations=30)
    assert refined.best.kl <= 0.05
    assert refined.best.prediction.latency_ms < result.best.prediction.latency_ms


def test_refinement_repairs_a_plan_above_the_limit_on_kl() -> None:
    budget = Budget(max_kl=0.05)
    model = Model()
    plain = measured(model, solve(PROBLEM, budget).assignment)
    refined = refine(PROBLEM, budget, plain, model, evaluations=40)
    assert plain.kl > 0.05 >= refined.best.kl


def test_measured_latency_decides_what_is_feasible(tmp_path: Path) -> None:
    budget = Budget(max_latency=Limit(0.6, "x"))
    limit = limits_of(PROBLEM, budget)[2]

    def slower(assignment: Assignment) -> float:
        return 1.1 * PROBLEM.predict(assignment).latency_ms

    result = run(tmp_path, Model(), budget, 12, measure_latency=slower)
    assert result.feasible
    assert result.best.latency_ms is not None
    assert result.best.latency_ms <= limit
    neutral = next(t for t in result.trials if t.origin == "neutral")
    assert neutral.latency_ms > limit


def test_an_overflowing_assignment_counts_as_very_bad(tmp_path: Path) -> None:
    calls = []

    def overflowing(assignment: Assignment, step: int) -> float:
        calls.append(step)
        return float("nan") if len(calls) <= STEPS else Model.kl(assignment)

    result = run_study(
        PROBLEM,
        DENSITY,
        overflowing,
        steps=STEPS,
        trials=6,
        storage_url=url(tmp_path),
        study_name="s",
    )
    assert result.trials[0].kl == BROKEN_KL
    assert result.best.kl < 1


def test_a_study_of_another_budget_is_refused_under_the_same_name(tmp_path: Path) -> None:
    run(tmp_path, Model(), DENSITY, 1)
    with pytest.raises(ValueError, match="study 's' has other budget: use another name"):
        run(tmp_path, Model(), Budget(max_density=0.3), 1)


def test_no_trial_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give at least one trial"):
        run(tmp_path, Model(), DENSITY, 0)


def test_warm_starts_alone_are_a_result(tmp_path: Path) -> None:
    assignment = solve(PROBLEM, DENSITY).assignment
    result = run(tmp_path, Model(), DENSITY, 0, warm_start=[assignment])
    np.testing.assert_array_equal(result.best.assignment, assignment)


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float | None]] = []
    run(tmp_path, Model(), DENSITY, 5, progress=lambda *state: seen.append(state))
    assert [done for done, _, _ in seen] == [1, 2, 3, 4, 5]
    assert all(total == 5 for _, total, _ in seen)
    best = [kl for _, _, kl in seen if kl is not None]
    assert best == sorted(best, reverse=True)


def test_neutral_corrections_give_the_solvers_answer() -> None:
    neutral = dict(first_params(space(PROBLEM, DENSITY, timed=False), 10))["neutral"]
    expected = solve(PROBLEM, DENSITY).assignment
    np.testing.assert_array_equal(from_params(neutral).solve(PROBLEM, DENSITY), expected)
    np.testing.assert_array_equal(Corrections().solve(PROBLEM, DENSITY), expected)


@pytest.mark.parametrize(
    ("corrections", "avoided"),
    [
        (Corrections(disabled=frozenset({"low-rank"})), np.array(FAMILIES) == "low-rank"),
        (Corrections(min_window=128), (np.array(PROBLEM.windows) < 128) & (np.arange(16) > 0)),
    ],
)
def test_what_is_switched_off_is_not_used(
    corrections: Corrections, avoided: NDArray[np.bool_]
) -> None:
    assert not avoided[corrections.solve(PROBLEM, DENSITY)].any()
    assert avoided[Corrections().solve(PROBLEM, DENSITY)].any()


def test_switching_everything_off_still_meets_the_budget() -> None:
    off = Corrections(disabled=frozenset(FAMILIES[1:]))
    assignment = off.solve(PROBLEM, DENSITY)
    assert meets(PROBLEM.predict(assignment), limits_of(PROBLEM, DENSITY))


def test_a_charged_layer_group_gets_denser() -> None:
    late = Corrections(groups=(0.0, 0.0, 0.0, 0.0, 1.5)).solve(PROBLEM, DENSITY)
    plain = Corrections().solve(PROBLEM, DENSITY)
    assert PROBLEM.density[late[8:]].mean() > PROBLEM.density[plain[8:]].mean()
    assert PROBLEM.density[late[:8]].mean() < PROBLEM.density[plain[:8]].mean()
