"""Which candidates are worth scoring on all heads, from what some heads lose under each.

A head takes the candidate of the lowest loss plus price times cost. A candidate is dispensable if
leaving it out raises the sum of these over the heads by next to nothing, at every price that a
budget may set. Candidates leave one after the other, the most dispensable first, until each that is
left would be missed: what remains is small where many settings are nearly as good as each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MISSED = 5e-4
"""A candidate whose leaving raises the optimum by this share, at some price, stays."""
BUDGETS = tuple(np.geomspace(0.03, 0.85, 16))
"""Mean costs, as shares of dense, that the prices stand for."""


def shortlist(
    fisher: Floats, cost: Floats, classes: Sequence[NDArray[np.bool_]], missed: float = MISSED
) -> list[int]:
    """The candidates that some of the heads would miss.

    Args:
        fisher: [heads, candidates], what a head loses; +inf where a candidate is not offered.
            Candidate 0 is dense: it loses nothing.
        cost: [candidates], as a share of dense.
        classes: masks [candidates]. A shortlist is made within each, and they are joined: kinds of
            methods whose time is not told by `cost` do not push one another out.
        missed: see `MISSED`.

    Returns:
        Ascending; 0 is always among them.
    """
    kept = {0}
    for mask in classes:
        some = np.flatnonzero(mask | (np.arange(len(cost)) == 0))
        kept.update(some[_indispensable(fisher[:, some], cost[some], missed)].tolist())
    return sorted(kept)


def _indispensable(fisher: Floats, cost: Floats, missed: float) -> NDArray[np.int64]:
    priced = np.stack([fisher + _price(fisher, cost, budget) * cost for budget in BUDGETS])
    best = priced.min(-1).sum(-1)  # [budgets]
    left = np.arange(len(cost))
    while len(left) > 1:
        some = priced[..., left]
        order = np.argpartition(some, 1, axis=-1)[..., :2]
        first, second = np.moveaxis(np.take_along_axis(some, order, -1), -1, 0)
        raised = np.repeat((first.sum(-1) - best)[:, None], len(left), 1)
        for budget, row in enumerate(raised):
            np.add.at(row, order[budget, :, 0], (second - first)[budget])
        worst = (raised / best[:, None]).max(0)
        worst[0] = np.inf  # dense stays
        out = int(worst.argmin())
        if worst[out] > missed:
            break
        left = np.delete(left, out)
    return left


def _price(fisher: Floats, cost: Floats, budget: float) -> float:
    """The lowest price at which heads choose a mean cost within the budget, or nearly."""
    usable = fisher[np.isfinite(fisher)]
    low, high = 0.0, float(usable.max()) / max(float(cost[cost > 0].min()), 1e-9) + 1.0
    for _ in range(60):
        middle = (max(low, 1e-15) * high) ** 0.5
        chosen = (fisher + middle * cost).argmin(-1)
        if cost[chosen].mean() > budget:
            low = middle
        else:
            high = middle
    return high
