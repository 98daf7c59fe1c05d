"""What the separable model cannot know, as a few numbers: corrections of its scores and limits.

Errors of different heads are not quite additive, some kinds of approximation do more harm than
their Fisher score says, and the choice of the lowest of many noisy scores is biased. Corrections
change the scores, and the solver finds the best assignment for the changed ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnplan.search.budget import Budget, BudgetError, Limit
from attnplan.search.problem import Assignment, Problem
from attnplan.search.solve import solve

LAYER_GROUPS = 5
DISCOURAGED = 1e3
"""Factor on the scores of what is switched off: used only where the budget leaves nothing else."""


@dataclass(frozen=True)
class Corrections:
    """Neutral by default: then the solver's own answer comes out.

    Attributes:
        groups: logarithms of factors on the scores of each group of consecutive layers.
        families: logarithms of factors on the scores of each family.
        disabled: families to avoid.
        min_window: candidates with a shorter local window are avoided.
        power: scores grow as score^(1 + power): above 0, large errors count for more.
        spread: layers that approximate more heads than the mean count for more, as the ratio to
            this power.
        kl_scale: factor on the KL limit, where KL is a limit: predictions are too low or too high.
        latency_share: factor on the latency limit, where latency is one.
    """

    groups: tuple[float, ...] = ()
    families: Mapping[str, float] = field(default_factory=dict)
    disabled: frozenset[str] = frozenset()
    min_window: int = 0
    power: float = 0.0
    spread: float = 0.0
    kl_scale: float = 1.0
    latency_share: float = 1.0

    def multipliers(self, problem: Problem) -> NDArray[np.float64]:
        """Factors on the scores, [layers, heads, candidates]."""
        factors = np.ones(problem.fisher.shape)
        if self.groups:
            factors *= np.exp(np.array(self.groups))[layer_groups(problem, len(self.groups))]
        by_candidate = np.array([np.exp(self.families.get(f, 0.0)) for f in problem.families])
        avoided = np.array([f in self.disabled for f in problem.families])
        avoided |= np.array(problem.windows) < self.min_window
        by_candidate[avoided] *= DISCOURAGED
        by_candidate[0] = 1.0
        factors *= by_candidate
        if self.power:
            scored = np.isfinite(problem.fisher) & (problem.fisher > 0)
            if scored.any():
                typical = np.median(problem.fisher[scored])
                factors[scored] *= (problem.fisher[scored] / typical) ** self.power
        return factors

    def solve(self, problem: Problem, budget: Budget) -> Assignment:
        """The best assignment for the corrected scores and limits.

        Corrected scores may lose more than a KL limit allows although the real ones would not:
        then the assignment of least corrected KL within the other limits comes out.

        Raises:
            BudgetError: density, latency or memory are out of reach.
        """
        factors = self.multipliers(problem)
        assignment = self._solve(problem, budget, factors)
        if self.spread:
            approximated = 1.0 + (assignment != 0).sum(1)
            by_layer = (approximated / approximated.mean()) ** self.spread
            assignment = self._solve(problem, budget, factors * by_layer[:, None, None])
        return assignment

    def _solve(self, problem: Problem, budget: Budget, factors: NDArray[np.float64]) -> Assignment:
        if budget.objective != "kl":
            assert budget.kl_limit is not None
            scaled = replace(budget, max_kl=budget.kl_limit * self.kl_scale, max_ppl_ratio=None)
            try:
                return self._within_latency(problem, scaled, factors)
            except BudgetError:
                if not budget.bounds_cost:
                    raise
        if not budget.bounds_cost:
            return problem.dense
        costs = replace(budget, max_kl=None, max_ppl_ratio=None, minimize="kl")
        return self._within_latency(problem, costs, factors)

    def _within_latency(
        self, problem: Problem, budget: Budget, factors: NDArray[np.float64]
    ) -> Assignment:
        if budget.max_latency is not None and self.latency_share < 1:
            limit = Limit(budget.max_latency.value * self.latency_share, budget.max_latency.unit)
            try:
                return solve(problem, replace(budget, max_latency=limit), factors).assignment
            except BudgetError:  # only the whole limit can be met
                pass
        return solve(problem, budget, factors).assignment


def layer_groups(problem: Problem, groups: int = LAYER_GROUPS) -> NDArray[np.int64]:
    """The group of consecutive layers that every layer is in, int64 [layers, 1, 1]."""
    groups = min(groups, problem.layers)
    group = np.arange(problem.layers) * groups // problem.layers
    return group[:, None, None]


@dataclass(frozen=True)
class Real:
    """A variable between two bounds."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """A variable with unordered values."""

    values: tuple[bool | int, ...]


def space(problem: Problem, budget: Budget, *, timed: bool) -> dict[str, Real | Choice]:
    """The corrections worth searching, by parameter name.

    Args:
        problem: its families and windows become variables.
        budget: its limits do.
        timed: latency is measured, so that the predicted limit may have to be tighter.
    """
    variables: dict[str, Real | Choice] = {}
    for group in range(min(LAYER_GROUPS, problem.layers)):
        variables[f"group_{group}"] = Real(-1.5, 1.5)
    families = sorted(set(problem.families[1:]) - {problem.families[0]})
    if len(families) > 1:
        for family in families:
            variables[f"family_{family}"] = Real(-1.5, 1.5)
            variables[f"use_{family}"] = Choice((True, False))
    windows = sorted({0, *problem.windows[1:]})
    if len(windows) > 1:
        variables["min_window"] = Choice(tuple(windows[:6]))
    variables["power"] = Real(-0.5, 0.5)
    variables["spread"] = Real(-1.0, 2.0)
    if budget.objective != "kl":
        variables["kl_scale"] = Real(0.25, 4.0, log=True)
    if budget.max_latency is not None and timed:
        variables["latency_share"] = Real(0.75, 1.0)
    return variables


def first_params(
    variables: Mapping[str, Real | Choice], trials: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to try before sampling, each with a name: at most half of all trials.

    The solver's own answer, points of its front (where the limit on KL is a variable), and one
    change at a time.
    """
    neutral: dict[str, Any] = {name: 0.0 for name in variables}
    neutral |= {name: True for name in variables if name.startswith("use_")}
    special = {"kl_scale": 1.0, "latency_share": 1.0, "min_window": 0}
    neutral |= {name: value for name, value in special.items() if name in variables}
    changes: list[dict[str, Any]] = [{}]
    if "kl_scale" in variables:
        changes += [{"kl_scale": scale} for scale in (0.5, 0.7, 1.4)]
    if "latency_share" in variables:
        changes += [{"latency_share": 0.9}]
    changes += [{"spread": 1.0}, {"power": 0.25}, {"power": -0.25}]
    changes += [{name: 0.7} for name in variables if name.startswith(("group_", "family_"))]
    changes += [{name: -0.7} for name in variables if name.startswith("group_")]
    for change in changes[: max(1, trials // 2)]:
        name = ", ".join(f"{k} {v:g}" for k, v in change.items()) or "neutral"
        yield name, neutral | change


def from_params(params: Mapping[str, Any]) -> Corrections:
    """The corrections that parameters of `space` mean."""

    def named(prefix: str) -> dict[str, Any]:
        return {n.removeprefix(prefix): v for n, v in params.items() if n.startswith(prefix)}

    return Corrections(
        groups=tuple(named("group_").values()),
        families=named("family_"),
        disabled=frozenset(family for family, used in named("use_").items() if not used),
        min_window=params.get("min_window", 0),
        power=params["power"],
        spread=params["spread"],
        kl_scale=params.get("kl_scale", 1.0),
        latency_share=params.get("latency_share", 1.0),
    )
