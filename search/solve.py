"""The best separable assignment under a budget: a multiple-choice knapsack, by Lagrangian prices.

At given prices of KL, density, latency and memory the problem falls apart: every kv head chooses
how much cache it keeps, every head takes its cheapest candidate, and every layer compares that
with going to SDPA all dense. The minimum over assignments of the priced total is a lower bound on
the best plan, so each solution says how far from optimal it can be at most.

Source: Everett, Generalized Lagrange multiplier method, Operations Research 11 (1963).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnplan.search.budget import Budget, BudgetError
from attnplan.search.latency import presence
from attnplan.search.moves import improve
from attnplan.search.problem import Assignment, Prediction, Problem

Floats = NDArray[np.float64]

RESOURCES = ("kl", "density", "latency_ms", "kv_share")
"""The totals of an assignment, in the order of every price and limit vector."""
OBJECTIVES = {"kl": 0, "latency": 2, "memory": 3}
"""Which total each objective of a budget minimises."""
_CHUNK = 1_000_000
_EPSILON = 1e-9


@dataclass(frozen=True, eq=False)
class Solution:
    """An assignment, and what is known about it without running a model.

    Attributes:
        assignment: [layers, heads].
        prediction: by the problem's own scores, whatever multipliers were used.
        lower_bound: no assignment within the limits has a lower objective, by the scores that were
            minimised.
        prices: of a unit of each resource, in units of the objective.
    """

    assignment: Assignment
    prediction: Prediction
    lower_bound: float
    prices: dict[str, float]


def limits_of(problem: Problem, budget: Budget) -> Floats:
    """The budget as upper limits on (kl, density, latency_ms, kv_share); +inf where unbounded.

    Raises:
        ValueError: memory in bytes for a problem that does not know the size of its cache.
    """
    limits = np.full(4, np.inf)
    if budget.kl_limit is not None:
        limits[0] = budget.kl_limit
    if budget.max_density is not None:
        limits[1] = budget.max_density
    if budget.max_latency is not None:
        limits[2] = budget.max_latency.of(problem.predict(problem.dense).latency_ms)
    if budget.max_memory is not None:
        if budget.max_memory.unit == "x":
            limits[3] = budget.max_memory.value
        elif problem.cache_bytes <= 0:
            raise ValueError(f"memory of {budget.max_memory} needs the cache size of the model")
        else:
            limits[3] = budget.max_memory.value / problem.cache_bytes
    return limits


def meets(prediction: Prediction, limits: Floats) -> bool:
    """Whether a prediction is within `limits_of` a budget."""
    return bool((_vector(prediction) <= limits * (1 + _EPSILON)).all())


def _vector(prediction: Prediction) -> Floats:
    return np.array([getattr(prediction, name) for name in RESOURCES])


def solve(
    problem: Problem, budget: Budget, multipliers: NDArray[np.float64] | None = None
) -> Solution:
    """The assignment with the lowest predicted objective within the budget.

    Args:
        problem: scores and costs.
        budget: limits and objective.
        multipliers: positive factors on the scores, broadcast to [layers, heads, candidates].

    Raises:
        BudgetError: no assignment meets the limits; says the smallest value that one reaches.
    """
    fisher = problem.fisher * problem.calibration
    if multipliers is not None:
        fisher = fisher * multipliers
    limits = limits_of(problem, budget)
    return _Solver(problem, fisher).solve(limits, OBJECTIVES[budget.objective])


def front(problem: Problem, resource: str = "latency_ms", points: int = 64) -> list[Solution]:
    """Assignments on the lower convex hull of predicted KL against one resource.

    Args:
        problem: scores and costs.
        resource: 'latency_ms', 'density' or 'kv_share'.
        points: prices to try.

    Returns:
        From dense-like to cheapest; each has a lower KL than all that are cheaper.
    """
    if resource not in RESOURCES[1:]:
        raise ValueError(f"a front needs one of {', '.join(RESOURCES[1:])}, got {resource!r}")
    k = RESOURCES.index(resource)
    solver = _Solver(problem, problem.fisher * problem.calibration)
    scale = solver.units[0] / solver.units[k]
    prices = np.logspace(-8, 4, points) * scale
    weights = np.zeros((points, 4))
    weights[:, 0], weights[:, k] = 1.0, prices
    assignments, bounds = solver.cheapest(weights)
    assignments = np.concatenate([problem.dense[None], assignments])
    totals = solver.totals(assignments)
    kept: list[Solution] = []
    best = np.inf
    for i in np.lexsort((totals[:, k], totals[:, 0])):
        if totals[i, k] < best:
            best = totals[i, k]
            price = 0.0 if i == 0 else float(prices[i - 1])
            bound = 0.0 if i == 0 else float(bounds[i - 1] - price * totals[i, k])
            prediction = problem.predict(assignments[i])
            kept.append(Solution(assignments[i], prediction, bound, {resource: price}))
    return kept


class _Solver:
    """One problem with its (possibly modified) scores, and all that prices have to look at."""

    def __init__(self, problem: Problem, fisher: Floats) -> None:
        self.problem = problem
        self.fisher = fisher
        finite = np.where(np.isfinite(fisher), fisher, 0.0)
        dense = self.totals(problem.dense[None])[0]
        self.units = np.maximum(dense, 1e-12)
        self.units[0] = max(float(finite.max(-1).sum()), 1e-12)
        self.levels = np.unique(problem.kv_bytes)

    def totals(self, assignments: Assignment) -> Floats:
        """[n, layers, heads] to [n, 4]."""
        totals = self.problem.layer_totals(assignments, self.fisher).sum(-2)
        totals[:, 2] += self.problem.latency.rest_ms
        return totals

    def cheapest(self, weights: Floats) -> tuple[Assignment, Floats]:
        """For each row of prices [n, 4], the cheapest assignment and a lower bound on all."""
        size = max(1, _CHUNK // self.fisher.size)
        chunks = [self._cheapest(weights[i : i + size]) for i in range(0, len(weights), size)]
        return np.concatenate([c[0] for c in chunks]), np.concatenate([c[1] for c in chunks])

    def _cheapest(self, weights: Floats) -> tuple[Assignment, Floats]:
        problem, model = self.problem, self.problem.latency
        w = weights[:, None, :]
        once = model.method_overhead_ms
        shared = once[model.methods] / problem.heads
        assignment, heads_cost = self._heads(weights, np.zeros((1, 1, 1)) + shared)
        mixed = w[..., 2] * model.overhead_ms + heads_cost
        dense_layer = self.problem.layer_totals(problem.dense)[0].copy()
        dense_layer[0] = 0.0
        dense = (w * dense_layer).sum(-1)
        # Sharing an overhead among all heads of the layer never overcharges: a lower bound.
        bounds = np.minimum(mixed, dense).sum(-1) + weights[:, 2] * model.rest_ms
        if once.any():
            assignment = self._settle_overheads(weights, assignment)
        if once.any() or model.paths.any():
            mixed = (problem.layer_totals(assignment, self.fisher) * w).sum(-1)
        assignment = np.where((dense <= mixed)[..., None], 0, assignment)
        return assignment, bounds

    def _settle_overheads(self, weights: Floats, assignment: Assignment) -> Assignment:
        """Share each overhead among the heads that just chose it, and choose again."""
        problem, method = self.problem, self.problem.latency.methods
        once = problem.latency.method_overhead_ms
        w = weights[:, None, :]
        best = assignment
        cost = (problem.layer_totals(best, self.fisher) * w).sum(-1)
        for _ in range(3):
            counts = np.zeros((*assignment.shape[:-1], problem.candidates))
            for head in range(problem.heads):
                counts += presence(method[assignment[..., head, None]], problem.candidates)
            shared = once / np.maximum(counts, 1.0)
            assignment, _ = self._heads(weights, shared[..., method])
            new_cost = (problem.layer_totals(assignment, self.fisher) * w).sum(-1)
            better = new_cost < cost
            best = np.where(better[..., None], assignment, best)
            cost = np.where(better, new_cost, cost)
        return best

    def _heads(self, weights: Floats, shared_ms: Floats) -> tuple[Assignment, Floats]:
        """Cheapest candidate of every head of mixed layers, and what the heads cost together.

        Args:
            weights: [n, 4].
            shared_ms: [n or 1, layers or 1, candidates], the part of an overhead that a head pays.
        """
        problem = self.problem
        n, (layers, heads, _) = len(weights), self.fisher.shape
        kl, density, latency, memory = (weights[:, i, None, None] for i in range(4))
        cost = density * problem.density / (layers * heads)
        cost = cost + latency * (problem.latency.head_ms + shared_ms)
        # A tiny price instead of none keeps forbidden candidates at +inf.
        value = np.maximum(kl, 1e-200)[..., None] * self.fisher + cost[:, :, None, :]
        if len(self.levels) == 1:
            choice = value.argmin(-1)
            total = np.take_along_axis(value, choice[..., None], -1)[..., 0].sum(-1)
            return choice, total + memory[:, 0] * self.levels[0] / layers

        kv_heads = heads // problem.group
        best = np.full((n, layers, kv_heads), np.inf)
        choice = np.zeros((n, layers, heads), np.int64)
        for level in self.levels:
            allowed = np.where(problem.kv_bytes <= level, value, np.inf)
            option = allowed.argmin(-1)
            least = np.take_along_axis(allowed, option[..., None], -1)[..., 0]
            group_cost = least.reshape(n, layers, kv_heads, problem.group).sum(-1)
            group_cost = group_cost + memory * level / (layers * kv_heads)
            better = group_cost < best
            best = np.where(better, group_cost, best)
            choice = np.where(np.repeat(better, problem.group, axis=-1), option, choice)
        return choice, best.sum(-1)

    def solve(self, limits: Floats, objective: int) -> Solution:
        """Minimise one total under limits on the others (and on itself)."""
        bounded = [k for k in range(4) if np.isfinite(limits[k]) and k != objective]
        self._check_reachable(limits)
        search = _PriceSearch(self, limits, objective, bounded)
        search.run()
        start = search.best
        if start is None:
            start = self._meet_jointly(limits, bounded)
        room = limits.copy()
        room[2] -= self.problem.latency.rest_ms
        room[objective] = np.inf
        assignment = improve(
            self.problem,
            self.fisher,
            start,
            search.neighbours(),
            room,
            objective,
            search.prices,
        )
        reached = self.totals(assignment[None])[0, objective]
        if reached > limits[objective] * (1 + _EPSILON):
            raise _error(objective, limits, reached, [RESOURCES[k] for k in bounded])
        prices = {RESOURCES[k]: float(search.prices[k]) for k in bounded}
        bound = min(search.lower_bound, float(reached))
        return Solution(assignment, self.problem.predict(assignment), bound, prices)

    def _check_reachable(self, limits: Floats) -> None:
        for k in np.flatnonzero(np.isfinite(limits)):
            smallest = self.smallest(int(k))
            if smallest > limits[k] * (1 + _EPSILON):
                raise _error(int(k), limits, smallest, [])

    def smallest(self, resource: int) -> float:
        """The smallest total found of one resource, whatever the others are."""
        return float(self.totals(self.extremes(resource))[:, resource].min())

    def extremes(self, resource: int) -> Assignment:
        """Dense, and the assignment that one resource alone asks for: [2, layers, heads]."""
        weights = 1e-9 / self.units
        weights[resource] = 1 / self.units[resource]
        return np.concatenate([self.problem.dense[None], self.cheapest(weights[None])[0]])

    def _meet_jointly(self, limits: Floats, bounded: list[int]) -> Assignment:
        """Each limit can be met alone: meet the last by minimising it within the others."""
        last = bounded[-1]
        free = limits.copy()
        free[last] = np.inf
        solution = self.solve(free, last)
        reached = self.totals(solution.assignment[None])[0, last]
        if reached > limits[last] * (1 + _EPSILON):
            raise _error(last, limits, reached, [RESOURCES[k] for k in bounded[:-1]])
        return solution.assignment


def _error(k: int, limits: Floats, smallest: float, beside: list[str]) -> BudgetError:
    within = f" within the limits on {', '.join(beside)}" if beside else ""
    return BudgetError(
        f"no assignment has {RESOURCES[k]} of at most {limits[k]:.4g}{within}: "
        f"the smallest found is {smallest:.4g}",
        RESOURCES[k],
        float(smallest),
    )


class _PriceSearch:
    """Coordinate-wise bisection of the prices; remembers the best assignment that fits."""

    def __init__(self, solver: _Solver, limits: Floats, objective: int, bounded: list[int]) -> None:
        self.solver = solver
        self.limits = limits
        self.objective = objective
        self.bounded = bounded
        self.prices = np.zeros(4)
        self.prices[objective] = 1.0
        self.best: Assignment | None = None
        self.lower_bound = -np.inf
        self._best_value = np.inf
        self._around: dict[int, Assignment] = {}

    def run(self) -> None:
        """Raise and lower each price until its limit is just met, the others held."""
        for k in self.bounded:
            extremes = self.solver.extremes(k)
            self._consider(extremes, self.solver.totals(extremes))
        rounds = 1 if len(self.bounded) <= 1 else 4
        if not self.bounded:
            self._try(self.prices[None])
        for _ in range(rounds):
            before = self.prices.copy()
            for k in self.bounded:
                self._bisect(k)
            if np.allclose(before, self.prices, rtol=1e-6, atol=0):
                break
        for _ in range(8):  # holding prices, not lowering them, makes limits agree
            if self.best is not None:
                break
            for k in self.bounded:
                self._bisect(k, at_least=self.prices[k])

    def neighbours(self) -> Assignment:
        """Assignments to take whole layers from: dense, and those around the last prices."""
        return np.concatenate([self.solver.problem.dense[None], *self._around.values()])

    def _bisect(self, k: int, at_least: float = 0.0) -> None:
        unit = self.solver.units[self.objective] / self.solver.units[k]
        grid = np.concatenate([[0.0], np.logspace(-10, 8, 55) * unit]) + at_least
        kept: list[Assignment] = []
        for _ in range(8):
            weights = np.tile(self.prices, (len(grid), 1))
            weights[:, k] = grid
            assignments, fits = self._try(weights, k)
            if fits[0]:
                first = 0
            elif not fits.any():
                first = len(grid) - 1
            else:
                first = int(fits.argmax())
            around = assignments[max(first - 1, 0) : first + 2]
            kept.append(around)
            self.prices[k] = grid[first]
            if first == 0 or not fits.any():
                break
            low, high = grid[first - 1], grid[first]
            if high - low <= 1e-12 * high or (around[0] == around[min(1, len(around) - 1)]).all():
                break
            grid = np.linspace(low, high, 17)
        self._around[k] = np.concatenate([kept[0], *kept[-2:]])

    def _try(self, weights: Floats, k: int | None = None) -> tuple[Assignment, NDArray[np.bool_]]:
        """Assignments at some prices, and which of them meet limit k."""
        assignments, bounds = self.solver.cheapest(weights)
        totals = self.solver.totals(assignments)
        paid = weights[:, self.bounded] @ self.limits[self.bounded] if self.bounded else 0.0
        self.lower_bound = max(self.lower_bound, float((bounds - paid).max()))
        self._consider(assignments, totals)
        fits = np.ones(len(weights), bool) if k is None else totals[:, k] <= self.limits[k]
        return assignments, fits

    def _consider(self, assignments: Assignment, totals: Floats) -> None:
        """Remember the best of some assignments, if it meets all limits."""
        limits = self.limits * (1 + _EPSILON)
        limits[self.objective] = np.inf
        feasible = np.flatnonzero((totals <= limits).all(-1))
        if len(feasible):
            i = feasible[totals[feasible, self.objective].argmin()]
            if totals[i, self.objective] < self._best_value:
                self._best_value = float(totals[i, self.objective])
                self.best = assignments[i]
