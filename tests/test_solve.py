"""The solver against brute force, bounds and identities; baselines."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from attnplan.search.baselines import per_layer, uniform
from attnplan.search.budget import Budget, BudgetError, Limit
from attnplan.search.latency import LatencyModel
from attnplan.search.moves import find_moves
from attnplan.search.problem import Assignment, Problem, digest, from_lists, to_lists
from attnplan.search.solve import Solution, front, limits_of, meets, solve


def random_problem(
    seed: int,
    layers: int = 2,
    heads: int = 2,
    candidates: int = 3,
    *,
    group: int = 1,
    overheads: bool = True,
    caches: bool = False,
    forbidden: float = 0.0,
    rows: bool = False,
) -> Problem:
    rng = np.random.default_rng(seed)
    density = np.concatenate([[1.0], rng.uniform(0.05, 0.9, candidates - 1)])
    sensitivity = np.exp(rng.normal(0, 1.5, (layers, heads, 1)))
    fisher = sensitivity * np.exp(rng.normal(0, 1, (layers, heads, candidates)))
    fisher = fisher * (1 / density - 1) * 1e-3
    fisher[..., 1:][rng.random((layers, heads, candidates - 1)) < forbidden] = np.inf
    once = np.where(rng.random(candidates) < 0.5, 0.3, 0.0) * overheads
    once[0] = 0.0
    head_ms = density + rng.uniform(0, 0.2, candidates)
    kv_bytes = rng.choice([1.0, 0.5, 0.25], candidates) if caches else np.ones(candidates)
    kv_bytes[0] = 1.0
    return Problem(
        names=("dense", *(f"c{i}" for i in range(1, candidates))),
        families=("dense", *("sparse" if i % 2 else "hybrid" for i in range(1, candidates))),
        windows=(0, *(64 * 2 ** (i % 3) for i in range(1, candidates))),
        fisher=fisher,
        density=density,
        kv_bytes=kv_bytes,
        group=group,
        latency=LatencyModel(
            dense_layer_ms=float(heads),
            overhead_ms=0.2 * overheads,
            head_ms=head_ms,
            method_overhead_ms=once,
            rest_ms=3.0,
            work_ms=0.8 * head_ms if rows else None,
            path_ms=2.5 * head_ms if rows else None,
        ),
        cache_bytes=1024.0,
    )


def everything(problem: Problem) -> Assignment:
    """All assignments, [n, layers, heads]."""
    heads = problem.layers * problem.heads
    choices = itertools.product(range(problem.candidates), repeat=heads)
    return np.array(list(choices)).reshape(-1, problem.layers, problem.heads)


def all_totals(problem: Problem) -> NDArray[np.float64]:
    totals = problem.layer_totals(everything(problem)).sum(-2)
    totals[:, 2] += problem.latency.rest_ms
    return totals


def largest_step(problem: Problem) -> float:
    """The most that the KL of one layer can change."""
    finite = np.where(np.isfinite(problem.fisher), problem.fisher, 0)
    return float(finite.max(-1).sum(-1).max())


budgets = st.one_of(
    st.builds(Budget, max_density=st.floats(0.2, 1.0)),
    st.builds(Budget, max_latency=st.builds(Limit, st.floats(0.5, 1.1), st.just("x"))),
    st.builds(
        Budget,
        max_density=st.floats(0.2, 1.0),
        max_latency=st.builds(Limit, st.floats(0.5, 1.1), st.just("x")),
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    budget=budgets,
    overheads=st.booleans(),
    group=st.sampled_from([1, 2]),
    rows=st.booleans(),
)
def test_the_answer_lies_between_the_bound_and_one_layers_step_above_the_optimum(
    seed: int, budget: Budget, overheads: bool, group: int, rows: bool
) -> None:
    problem = random_problem(seed, overheads=overheads, group=group, forbidden=0.1, rows=rows)
    limits = limits_of(problem, budget)
    totals = all_totals(problem)
    feasible = (totals <= limits * (1 + 1e-9)).all(-1) & np.isfinite(totals[:, 0])
    if not feasible.any():
        with pytest.raises(BudgetError):
            solve(problem, budget)
        return
    optimum = totals[feasible, 0].min()
    solution = solve(problem, budget)
    assert meets(solution.prediction, limits)
    assert solution.lower_bound <= optimum * (1 + 1e-9) + 1e-15
    assert optimum <= solution.prediction.kl * (1 + 1e-9)
    assert solution.prediction.kl <= optimum + largest_step(problem)


def test_almost_all_small_problems_are_solved_exactly() -> None:
    exact = 0
    for seed in range(60):
        problem = random_problem(seed)
        totals = all_totals(problem)
        limit = (1 + problem.density.min()) / 2
        optimum = totals[totals[:, 1] <= limit, 0].min()
        solution = solve(problem, Budget(max_density=limit))
        exact += solution.prediction.kl <= optimum * (1 + 1e-9)
    assert exact >= 54, exact


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), max_kl=st.floats(1e-4, 0.1))
def test_the_fastest_plan_within_a_kl_is_bounded_by_brute_force(seed: int, max_kl: float) -> None:
    problem = random_problem(seed)
    totals = all_totals(problem)
    optimum = totals[totals[:, 0] <= max_kl, 2].min()
    solution = solve(problem, Budget(max_kl=max_kl))
    assert solution.prediction.kl <= max_kl * (1 + 1e-9)
    assert solution.lower_bound <= optimum * (1 + 1e-9)
    assert optimum <= solution.prediction.latency_ms * (1 + 1e-9)
    layer_step = problem.latency.layer_ms(everything(problem)).max()
    assert solution.prediction.latency_ms <= optimum + layer_step


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.3, 1.0))
def test_memory_is_saved_only_where_a_whole_group_agrees(seed: int, share: float) -> None:
    problem = random_problem(seed, group=2, caches=True)
    totals = all_totals(problem)
    budget = Budget(max_memory=Limit(share, "x"))
    feasible = totals[:, 3] <= share * (1 + 1e-9)
    if not feasible.any():
        with pytest.raises(BudgetError, match="kv_share"):
            solve(problem, budget)
        return
    optimum = totals[feasible, 0].min()
    solution = solve(problem, budget)
    assert solution.prediction.kv_share <= share * (1 + 1e-9)
    assert solution.lower_bound <= optimum * (1 + 1e-9) + 1e-15
    assert solution.prediction.kl <= optimum + largest_step(problem)


def test_a_bigger_budget_never_gives_a_worse_plan() -> None:
    problem = random_problem(3, layers=8, heads=6, candidates=12, group=3)
    losses = [
        solve(problem, Budget(max_density=d)).prediction.kl for d in np.linspace(0.2, 1.0, 30)
    ]
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert losses[-1] == 0.0


def test_a_realistic_problem_is_solved_within_half_a_percent_of_the_bound() -> None:
    problem = random_problem(4, layers=12, heads=9, candidates=30, group=3, overheads=False)
    solution = solve(problem, Budget(max_density=0.4))
    assert solution.prediction.kl <= solution.lower_bound * 1.005
    assert solution.prices["density"] > 0


@pytest.mark.parametrize("seed", range(5))
def test_dense_meets_density_one(seed: int) -> None:
    problem = random_problem(seed, overheads=True)
    solution = solve(problem, Budget(max_density=1.0))
    assert solution.prediction.kl == 0.0
    assert meets(problem.predict(problem.dense), limits_of(problem, Budget(max_density=1.0)))


def test_equal_calls_give_equal_assignments() -> None:
    problem = random_problem(5, layers=6, heads=6, candidates=10)
    first, second = (solve(problem, Budget(max_density=0.3)).assignment for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_multipliers_steer_the_choice_but_not_the_reported_kl() -> None:
    problem = random_problem(6, layers=4, heads=4, candidates=6)
    factors = np.ones((4, 1, 1))
    factors[0] = 100.0
    budget = Budget(max_density=0.4)
    plain, steered = solve(problem, budget), solve(problem, budget, factors)
    assert (
        problem.density[steered.assignment[0]].mean() > problem.density[plain.assignment[0]].mean()
    )
    assert steered.prediction == problem.predict(steered.assignment)
    assert steered.prediction.kl >= plain.prediction.kl


def test_calibration_scales_the_predicted_kl() -> None:
    problem = random_problem(7)
    scaled = replace(problem, calibration=2.0)
    assignment = np.ones((2, 2), np.int64)
    assert scaled.predict(assignment).kl == pytest.approx(2 * problem.predict(assignment).kl)


@pytest.mark.parametrize(
    ("budget", "resource"),
    [
        (Budget(max_density=0.01), "density"),
        (Budget(max_latency=Limit(0.1, "ms")), "latency_ms"),
        (Budget(max_memory=Limit(100.0, "B")), "kv_share"),
        (Budget(max_density=0.5, max_kl=1e-9), "kl"),
    ],
)
def test_a_budget_out_of_reach_says_what_is_reachable(budget: Budget, resource: str) -> None:
    problem = random_problem(8)
    with pytest.raises(BudgetError, match=f"{resource} of at most.*smallest found is") as caught:
        solve(problem, budget)
    assert caught.value.resource == resource
    assert (
        caught.value.smallest
        > limits_of(problem, budget)[["kl", "density", "latency_ms", "kv_share"].index(resource)]
    )


def test_the_front_trades_kl_for_cost() -> None:
    problem = random_problem(9, layers=6, heads=6, candidates=10)
    for resource in ("density", "latency_ms"):
        solutions = front(problem, resource)
        assert len(solutions) > 5
        assert solutions[0].prediction.kl == 0.0
        losses = [s.prediction.kl for s in solutions]
        costs = [getattr(s.prediction, resource) for s in solutions]
        assert losses == sorted(losses)
        assert costs == sorted(costs, reverse=True)
        assert all(s.lower_bound <= s.prediction.kl + 1e-12 for s in solutions)
    with pytest.raises(ValueError, match="a front needs one of"):
        front(problem, "bytes")


@pytest.mark.parametrize("rows", [False, True], ids=["sums", "longest rows"])
@pytest.mark.parametrize("caches", [False, True])
def test_a_moves_price_is_the_difference_of_two_predictions(caches: bool, rows: bool) -> None:
    problem = random_problem(10, layers=3, heads=4, candidates=5, group=2, caches=caches, rows=rows)
    rng = np.random.default_rng(0)
    neighbours = rng.integers(0, 5, (2, 3, 4))
    for assignment in (problem.dense, rng.integers(0, 5, (3, 4)), np.eye(3, 4, dtype=np.int64)):
        before = problem.layer_totals(assignment).sum(0)
        moves = find_moves(problem, problem.fisher, assignment, neighbours)
        assert len(moves.delta) >= 3 * 4 * 4
        for move in range(len(moves.delta)):
            after = problem.layer_totals(moves.apply(assignment, move, neighbours)).sum(0)
            np.testing.assert_allclose(moves.delta[move], after - before, atol=1e-12)


def test_baselines_are_no_better_than_the_per_head_plan() -> None:
    problem = random_problem(11, layers=6, heads=4, candidates=12)
    budget = Budget(max_density=0.45)
    solutions: list[Solution] = [f(problem, budget) for f in (solve, per_layer, uniform)]
    per_head, layered, same = (s.prediction.kl for s in solutions)
    assert per_head < layered <= same
    assert len(np.unique(solutions[2].assignment)) == 1
    for row in solutions[1].assignment:
        assert len(np.unique(row)) == 1
    for s in solutions:
        assert meets(s.prediction, limits_of(problem, budget))


def test_per_layer_is_the_optimum_of_all_plans_with_one_method_per_layer() -> None:
    problem = random_problem(12, layers=3, heads=3, candidates=4)
    choices = np.array(list(itertools.product(range(4), repeat=3)))
    totals = problem.layer_totals(np.repeat(choices[..., None], 3, axis=-1)).sum(-2)
    budget = Budget(max_density=0.5)
    optimum = totals[totals[:, 1] <= 0.5, 0].min()
    assert per_layer(problem, budget).prediction.kl == pytest.approx(optimum)


def test_no_uniform_choice_within_the_budget_names_the_nearest() -> None:
    problem = random_problem(13, candidates=4)
    with pytest.raises(BudgetError, match=r"the nearest, c[0-9], has density"):
        uniform(problem, Budget(max_density=0.001))


def test_assignments_survive_json_and_are_told_apart() -> None:
    assignment = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(from_lists(to_lists(assignment)), assignment)
    assert digest(assignment) == digest(assignment.copy())
    assert digest(assignment) != digest(assignment.reshape(3, 2))


def test_a_problem_refuses_numbers_that_cannot_be() -> None:
    problem = random_problem(14)
    with pytest.raises(ValueError, match="density has 2 candidates, names has 3"):
        replace(problem, density=np.ones(2))
    with pytest.raises(ValueError, match="layer 0, head 1: KL of c1 must not be negative"):
        fisher = problem.fisher.copy()
        fisher[0, 1, 1] = -1.0
        replace(problem, fisher=fisher)
    with pytest.raises(ValueError, match="candidates are numbered 0 to 2"):
        problem.predict(np.full((2, 2), 3))
