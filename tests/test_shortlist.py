"""The shortlist of candidates against an exhaustive search over what may be left out."""

from itertools import combinations

import numpy as np
import pytest

from attnplan.search.shortlist import BUDGETS, shortlist


def optimum(fisher: np.ndarray, cost: np.ndarray, price: float, some: list[int]) -> float:
    return float((fisher[:, some] + price * cost[some]).min(-1).sum())


@pytest.mark.parametrize("seed", range(5))
def test_what_is_left_is_nearly_as_good_at_every_price(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost = np.concatenate([[1.0], rng.uniform(0.02, 0.9, 40)])
    fisher = rng.lognormal(sigma=1.5, size=(30, 41)) / cost
    fisher[:, 0] = 0
    everything = np.ones(41, bool)
    some = shortlist(fisher, cost, [everything], missed=1e-3)
    assert some[0] == 0 and len(some) < 41
    for price in np.geomspace(1e-3, 1e3, 60):
        best = optimum(fisher, cost, price, list(range(41)))
        assert optimum(fisher, cost, price, some) <= 1.02 * best


def test_a_candidate_that_is_never_the_best_leaves_and_one_of_a_single_head_stays() -> None:
    cost = np.array([1.0, 0.1, 0.2, 0.2, 0.3])
    fisher = np.array([[0.0, 5, 3, 2, 9], [0.0, 5, 3, 2, 9], [0.0, 5, 3, 4, 0.1]])
    everything = np.ones(5, bool)
    assert shortlist(fisher, cost, [everything]) == [0, 1, 3, 4]
    # among its own kind it is the only one
    kind = np.array([False, False, True, False, False])
    assert shortlist(fisher, cost, [everything, kind]) == [0, 1, 2, 3, 4]


def test_no_smaller_set_does_as_well() -> None:
    rng = np.random.default_rng(1)
    cost = np.array([1.0, 0.05, 0.1, 0.2, 0.3, 0.5])
    fisher = rng.lognormal(size=(6, 6)) * 0.1 / cost
    fisher[:, 0] = 0
    some = shortlist(fisher, cost, [np.ones(6, bool)], missed=0.0)
    prices = np.geomspace(1e-3, 1e2, 200)
    best = np.array([optimum(fisher, cost, p, list(range(6))) for p in prices])
    for smaller in combinations(some, len(some) - 1):
        if 0 in smaller:
            reached = [optimum(fisher, cost, p, list(smaller)) for p in prices]
            assert (np.array(reached) > best * (1 + 1e-12)).any()


def test_what_is_not_offered_anywhere_leaves() -> None:
    cost = np.array([1.0, 0.1, 0.2])
    fisher = np.array([[0.0, 1, np.inf], [0.0, 2, np.inf]])
    assert shortlist(fisher, cost, [np.ones(3, bool)]) == [0, 1]
    assert len(BUDGETS) > 8
