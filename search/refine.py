"""Greedy swaps on the incumbent, judged by real evaluations.

A proposal upgrades heads in one place (a group of layers, or the heads that now use one family)
and downgrades heads elsewhere, or the other way round, so that the cost stays within the limits.
It is accepted if the KL measured on the same sequences falls. A direction that succeeds is tried
again; one that fails speaks for its opposite, and gets a smaller step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from attnplan.search.budget import Budget
from attnplan.search.corrections import LAYER_GROUPS, layer_groups
from attnplan.search.evaluation import Evaluate, Evaluated, finite_kl
from attnplan.search.moves import find_moves
from attnplan.search.problem import Assignment, Problem, digest
from attnplan.search.solve import OBJECTIVES, limits_of

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

FIRST_STEP, LAST_STEP = 0.04, 0.002
"""Share of the cost that a proposal moves, at first and at least."""
GIVE_UP = 1.1
"""A proposal is dropped when it is worse by this factor after half of the sequences."""


@dataclass(frozen=True, eq=False)
class RefineResult:
    """The incumbent after refinement.

    Attributes:
        best: what to keep.
        history: for each measured proposal what was tried, by what share it changed the KL on the
            sequences that were measured, and whether it was accepted.
    """

    best: Evaluated
    history: tuple[tuple[str, float, bool], ...]

    @property
    def evaluations(self) -> int:
        return len(self.history)


def refine(
    problem: Problem,
    budget: Budget,
    incumbent: Evaluated,
    evaluate: Evaluate,
    *,
    evaluations: int,
    multipliers: Floats | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> RefineResult:
    """Improve an evaluated assignment by swaps.

    Where latency or memory is minimised, a plan above the limit on KL is upgraded until it is
    within; one below it is downgraded as far as the measured KL stays within; and swaps at equal
    cost lower the KL, so that more can be downgraded.

    Args:
        problem: scores and costs.
        budget: limits and objective.
        incumbent: with its KL on all sequences; within the limits on cost.
        evaluate: KL of an assignment on one sequence.
        evaluations: at most so many proposals are measured.
        multipliers: on the scores that proposals are made with, such as those of the corrections
            that led to the incumbent.
        progress: called with proposals measured, the most there can be, and the incumbent's KL.
    """
    refinement = _Refinement(problem, budget, incumbent, evaluate, multipliers)
    while len(refinement.history) < evaluations and refinement.step():
        if progress is not None:
            progress(len(refinement.history), evaluations, refinement.best.kl)
    return RefineResult(refinement.best, tuple(refinement.history))


@dataclass(eq=False)
class _Direction:
    """Heads to upgrade, or to downgrade, at the cost of the others."""

    name: str
    heads: Callable[[Assignment], Mask]
    upgrade: bool
    step: float = FIRST_STEP
    hope: float = np.inf
    """Expected relative fall of KL per step; infinite before the first try."""


class _Refinement:
    """The incumbent, the directions that are left, and what was tried."""

    def __init__(
        self,
        problem: Problem,
        budget: Budget,
        incumbent: Evaluated,
        evaluate: Evaluate,
        multipliers: Floats | None,
    ) -> None:
        self.problem = problem
        self.fisher = problem.fisher * (1.0 if multipliers is None else multipliers)
        self.evaluate = evaluate
        self.best = incumbent
        self.seen = {incumbent.digest}
        self.history: list[tuple[str, float, bool]] = []
        self.objective = OBJECTIVES[budget.objective]
        self.limits = limits_of(problem, budget)
        self.kl_limit = float(self.limits[0])
        self.limits[0] = np.inf
        self.cost = self.objective or self._tightest()
        self.trade_step = FIRST_STEP if self.objective else 0.0
        self._hold_cost()
        self.directions = [
            _Direction(name, heads, upgrade)
            for name, heads in self._places()
            for upgrade in (True, False)
        ]

    def _tightest(self) -> int:
        used = self._totals(self.best.assignment)
        return 1 + int((used / self.limits)[1:].argmax())

    def _hold_cost(self) -> None:
        """Swaps may not use more of what is minimised, or of density where nothing is bounded."""
        if self.objective or np.isinf(self.limits[self.cost]):
            self.limits[self.cost] = self._totals(self.best.assignment)[self.cost] * (1 + 1e-9)

    def _totals(self, assignment: Assignment) -> Floats:
        totals = self.problem.layer_totals(assignment, self.fisher).sum(0)
        totals[2] += self.problem.latency.rest_ms
        return np.asarray(totals)

    def _places(self) -> list[tuple[str, Callable[[Assignment], Mask]]]:
        groups = layer_groups(self.problem)[:, 0]
        places: list[tuple[str, Callable[[Assignment], Mask]]] = []
        for group in range(min(LAYER_GROUPS, self.problem.layers)):
            rows = np.broadcast_to(groups == group, self.best.assignment.shape)
            places.append((f"layer group {group}", partial(_fixed, rows)))
        families = np.array(self.problem.families)
        for family in sorted(set(self.problem.families)):
            if len(set(self.problem.families)) > 2:
                places.append((family, partial(_using, families == family)))
        return places

    def step(self) -> bool:
        """Measure one proposal, if there is any left to measure."""
        while True:
            if self.trade_step >= LAST_STEP:
                if self._trade():
                    return True
                continue
            if not self.directions:
                return False
            if self._swap(max(self.directions, key=lambda d: d.hope)):
                return True

    def _swap(self, direction: _Direction) -> bool:
        """Measure an exchange of cost between a place and the rest."""
        proposal = self._exchange(direction)
        if proposal is None:
            self._shrink(direction)
            return False
        verb = "upgrade" if direction.upgrade else "downgrade"
        evaluated, change = self._measure(proposal, GIVE_UP)
        accepted = len(evaluated.kl_steps) == len(self.best.kl_steps) and change < 0
        direction.hope = -change / direction.step
        self.history.append((f"{verb} {direction.name}", change, accepted))
        if accepted:
            self.best = evaluated
            self._hold_cost()
            if self.objective:
                self.trade_step = max(self.trade_step, 2 * LAST_STEP)
        else:
            for other in self.directions:
                if other.name == direction.name and other.upgrade != direction.upgrade:
                    other.hope = max(other.hope, -direction.hope / 2)
            self._shrink(direction)
        return True

    def _shrink(self, direction: _Direction) -> None:
        direction.step /= 2
        direction.hope = min(direction.hope, 0.0)
        if direction.step < LAST_STEP:
            self.directions.remove(direction)

    def _trade(self) -> bool:
        """Measure more KL for less cost, or less for more while the limit on KL is exceeded."""
        over = self.best.kl > self.kl_limit
        amount = self.trade_step * self._totals(self.best.assignment)[self.cost]
        everywhere = np.ones(self.best.assignment.shape, bool)
        move = self._upgrade if over else self._downgrade
        proposal = move(self.best.assignment, everywhere, amount)
        if digest(proposal) in self.seen:
            self.trade_step /= 2
            return False
        evaluated, change = self._measure(proposal, np.inf)
        accepted = evaluated.kl < self.best.kl if over else evaluated.kl <= self.kl_limit
        self.history.append(("upgrade" if over else "downgrade", change, accepted))
        if accepted:
            self.best = evaluated
            self._hold_cost()
        else:
            self.trade_step /= 2
        return True

    def _measure(self, proposal: Assignment, give_up: float) -> tuple[Evaluated, float]:
        """KL on the sequences of the incumbent, on half of them where it falls far behind.

        Returns:
            The proposal, and its KL over that of the incumbent on the same sequences, less 1.
        """
        self.seen.add(digest(proposal))
        values: list[float] = []
        base = self.best.kl_steps
        for step in range(len(base)):
            values.append(finite_kl(self.evaluate(proposal, step)))
            half = 2 * len(values) >= len(base)
            if half and sum(values) > give_up * sum(base[: len(values)]):
                break
        evaluated = Evaluated(proposal, self.problem.predict(proposal), tuple(values))
        incumbent = max(sum(base[: len(values)]) / len(values), 1e-12)
        return evaluated, evaluated.kl / incumbent - 1

    def _exchange(self, direction: _Direction) -> Assignment | None:
        """The incumbent with cost moved to or from a place; None if nothing new comes out."""
        start = self.best.assignment
        place = np.asarray(direction.heads(start))
        amount = direction.step * self._totals(start)[self.cost]
        if direction.upgrade:
            proposal = self._upgrade(start, place, amount)
            excess = self._totals(proposal)[self.cost] - self.limits[self.cost]
            proposal = self._downgrade(proposal, ~place, excess)
        else:
            proposal = self._downgrade(start, place, amount)
            room = self.limits[self.cost] - self._totals(proposal)[self.cost]
            proposal = self._upgrade(proposal, ~place, room, strictly=True)
        fits = bool((self._totals(proposal) <= self.limits * (1 + 1e-9)).all())
        return proposal if fits and digest(proposal) not in self.seen else None

    def _upgrade(
        self, assignment: Assignment, place: Mask, amount: float, *, strictly: bool = False
    ) -> Assignment:
        """Lower the predicted KL of some heads for a cost of about (strictly: at most) `amount`."""
        return self._walk(assignment, place, amount, -1.0, strictly)

    def _downgrade(self, assignment: Assignment, place: Mask, amount: float) -> Assignment:
        """Save at least `amount` of the cost on some heads, where it adds least predicted KL."""
        return self._walk(assignment, place, amount, 1.0, False)

    def _walk(
        self, assignment: Assignment, place: Mask, amount: float, sign: float, strictly: bool
    ) -> Assignment:
        """Take the moves of best ratio until `amount` of cost is saved (sign 1) or spent (-1)."""
        none = np.empty((0, *assignment.shape), np.int64)
        left = amount
        for _ in range(assignment.size):
            if left <= 1e-12 * abs(amount):
                break
            moves = find_moves(self.problem, self.fisher, assignment, none)
            lost, saved = sign * moves.delta[:, 0], -sign * moves.delta[:, self.cost]
            useful = place[moves.layer, moves.head] & (saved > 0)
            if sign < 0:
                useful &= lost > 0  # an upgrade lowers the KL
                if strictly:
                    useful &= saved <= left
            if not useful.any():
                break
            among = np.flatnonzero(useful)
            ratio = lost[among] / saved[among]
            move = int(among[ratio.argmin() if sign > 0 else ratio.argmax()])
            left -= saved[move]
            assignment = moves.apply(assignment, move, none)
        return assignment


def _fixed(rows: Mask, assignment: Assignment) -> Mask:
    return rows


def _using(candidates: Mask, assignment: Assignment) -> Mask:
    return np.asarray(candidates[assignment])
