"""Single changes of an assignment, exactly priced, and a local search made of them.

A move changes one head, or replaces a whole layer by that of a neighbouring assignment (a layer
enters and leaves SDPA as a whole). Totals are vectors (kl, density, latency_ms, kv_share).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnplan.search.latency import LatencyModel, presence
from attnplan.search.problem import Assignment, Problem

Floats = NDArray[np.float64]

MAX_STEPS = 400
"""Single moves and exchanges of one local search: a stop for degenerate problems."""
PAIRS = 1500
"""Moves on either side of an exchange that are looked at together."""


@dataclass(frozen=True, eq=False)
class Moves:
    """Changes that lead away from one assignment.

    Attributes:
        delta: float64 [moves, 4], change of the totals.
        layer: int64 [moves].
        head: int64 [moves], -1 where the whole layer changes.
        choice: int64 [moves], the new candidate, or the neighbour that the layer is taken from.
    """

    delta: Floats
    layer: NDArray[np.int64]
    head: NDArray[np.int64]
    choice: NDArray[np.int64]

    def apply(self, assignment: Assignment, move: int, neighbours: Assignment) -> Assignment:
        """The assignment after one move."""
        changed = assignment.copy()
        layer, head, choice = self.layer[move], self.head[move], self.choice[move]
        if head < 0:
            changed[layer] = neighbours[choice, layer]
        else:
            changed[layer, head] = choice
        return changed


def find_moves(
    problem: Problem, fisher: Floats, assignment: Assignment, neighbours: Assignment
) -> Moves:
    """All single changes and their exact effect.

    Args:
        problem: costs.
        fisher: calibrated scores, [layers, heads, candidates]; +inf forbids.
        assignment: [layers, heads].
        neighbours: [n, layers, heads], where whole layers may be taken from.
    """
    layers, heads, candidates = fisher.shape
    totals = problem.layer_totals(assignment, fisher)
    delta = np.empty((layers, heads, candidates, 4))
    delta[..., 0] = fisher - np.take_along_axis(fisher, assignment[..., None], -1)
    own_density = problem.density[assignment][..., None]
    delta[..., 1] = (problem.density - own_density) / (layers * heads)
    delta[..., 2] = _latency_after(problem, assignment) - totals[:, 2, None, None]
    delta[..., 3] = _kv_after(problem, assignment) - totals[:, 3, None, None]
    possible = np.isfinite(fisher) & (np.arange(candidates) != assignment[..., None])
    layer, head, choice = np.nonzero(possible)

    swapped = problem.layer_totals(neighbours, fisher) - totals
    differs = (neighbours != assignment).any(-1) & np.isfinite(swapped[..., 0])
    which, swapped_layer = np.nonzero(differs)
    return Moves(
        np.concatenate([delta[possible], swapped[differs]]),
        np.concatenate([layer, swapped_layer]),
        np.concatenate([head, np.full(len(which), -1)]),
        np.concatenate([choice, which]),
    )


def _latency_after(problem: Problem, assignment: Assignment) -> Floats:
    """Time of the layer after each single change, [layers, heads, candidates]."""
    model = problem.latency
    own = model.head_ms[assignment]
    ms = model.overhead_ms + own.sum(-1)[:, None, None] - own[..., None] + model.head_ms
    if model.paths.any():
        ms = ms + _idle_after(model, assignment)
    if model.method_overhead_ms.any():
        method = model.methods[assignment]
        counts = np.stack([np.bincount(row, minlength=model.candidates) for row in method])
        present = presence(method, model.candidates)
        last = np.take_along_axis(counts, method, -1) == 1
        leaves = np.where(last, model.method_overhead_ms[method], 0.0)[..., None]
        enters = ((1 - present) * model.method_overhead_ms)[:, None, model.methods]
        stays = model.methods == method[..., None]
        once = (present @ model.method_overhead_ms)[:, None, None]
        ms = ms + once + np.where(stays, 0.0, enters - leaves)
    approximated = (assignment != 0).sum(-1)[:, None] - (assignment != 0)
    ms[..., 0] = np.where(approximated == 0, model.dense_layer_ms, ms[..., 0])
    return ms


def _idle_after(model: LatencyModel, assignment: Assignment) -> Floats:
    """How long slots wait for the longest row after each change, [layers, heads, candidates]."""
    path, work = model.paths[assignment], model.works[assignment]
    longest, place = path.max(-1), path.argmax(-1)[:, None]
    others = np.repeat(longest[:, None], path.shape[1], axis=1)
    rest = path.copy()
    np.put_along_axis(rest, place, 0.0, axis=-1)
    np.put_along_axis(others, place, rest.max(-1)[:, None], axis=-1)
    busy = work.sum(-1)[:, None, None] - work[..., None] + model.works
    return np.maximum(np.maximum(others[..., None], model.paths) - busy, 0.0)


def _kv_after(problem: Problem, assignment: Assignment) -> Floats:
    """Cache share of the layer after each single change, [layers, heads, candidates]."""
    layers, heads = assignment.shape
    stored = problem.kv_bytes[assignment].reshape(layers, -1, problem.group)
    group_max = stored.max(-1)
    others = np.empty_like(stored)
    for member in range(problem.group):
        rest = np.delete(stored, member, axis=-1)
        others[..., member] = rest.max(-1, initial=0.0)
    after = np.maximum(others.reshape(layers, heads, 1), problem.kv_bytes)
    own = np.repeat(group_max, problem.group, axis=-1)[..., None]
    kv_heads = heads // problem.group
    total = group_max.sum(-1)[:, None, None] - own + after
    return np.asarray(total / (kv_heads * layers))


def improve(
    problem: Problem,
    fisher: Floats,
    assignment: Assignment,
    neighbours: Assignment,
    limits: Floats,
    objective: int,
    prices: Floats,
) -> Assignment:
    """Spend what the budget leaves: best-ratio moves, then exchanges of two moves.

    Args:
        problem, fisher, neighbours: as for `find_moves`.
        assignment: within the limits.
        limits: [4], on the totals; +inf where unbounded.
        objective: which total to lower.
        prices: [4], what a unit of each total is worth in units of the objective.

    Returns:
        An assignment within the limits that no single move and no exchange found improves.
    """
    slack = np.where(np.isfinite(limits), np.abs(limits) * 1e-12, np.inf)
    start = problem.layer_totals(assignment, fisher).sum(0)
    tolerance = 1e-12 * max(abs(start[objective]), 1e-30)
    for _ in range(MAX_STEPS):
        totals = problem.layer_totals(assignment, fisher).sum(0)
        moves = find_moves(problem, fisher, assignment, neighbours)
        room = limits - totals + slack
        fits = (moves.delta <= room).all(-1)
        better = moves.delta[:, objective] < -tolerance
        single = np.flatnonzero(fits & better)
        if len(single):
            assignment = moves.apply(
                assignment, _best_ratio(moves, single, objective, prices), neighbours
            )
            continue
        exchanged = _exchange(
            problem, fisher, assignment, neighbours, moves, room, objective, prices, tolerance
        )
        if exchanged is None:
            break
        assignment = exchanged
    return assignment


def _best_ratio(moves: Moves, among: NDArray[np.int64], objective: int, prices: Floats) -> int:
    """The move that gains most per price of what it uses."""
    delta = moves.delta[among]
    gain = -delta[:, objective]
    spent = delta @ np.where(np.arange(4) == objective, 0.0, prices)
    ratio = gain / np.maximum(spent, 1e-9 * gain)
    return int(among[np.lexsort((-gain, -ratio))[0]])


def _exchange(
    problem: Problem,
    fisher: Floats,
    assignment: Assignment,
    neighbours: Assignment,
    moves: Moves,
    room: Floats,
    objective: int,
    prices: Floats,
    tolerance: float,
) -> Assignment | None:
    """The best pair of moves that only fit together, or None.

    At the prices of the relaxation a pair can gain at most the price of the room left over, less
    the reduced costs of its two moves: only moves of small reduced cost can take part.
    """
    weights = prices.copy()
    weights[objective] = 1.0
    reduced = moves.delta @ weights
    gains = moves.delta[:, objective] < -tolerance
    up = np.flatnonzero(gains)
    down = np.flatnonzero(~gains)
    up = up[np.argsort(reduced[up], kind="stable")[:PAIRS]]
    down = down[np.argsort(reduced[down], kind="stable")[:PAIRS]]
    if not len(up) or not len(down):
        return None
    gain = moves.delta[up, None, objective] + moves.delta[None, down, objective]
    promising = gain < -tolerance
    for k in np.flatnonzero(np.isfinite(room)):
        promising &= moves.delta[up, None, k] + moves.delta[None, down, k] <= room[k]
    whole = (moves.head[up, None] < 0) | (moves.head[None, down] < 0)
    same_head = whole | (moves.head[up, None] == moves.head[None, down])
    promising &= ~((moves.layer[up, None] == moves.layer[None, down]) & same_head)
    first, second = np.nonzero(promising)
    before = problem.layer_totals(assignment, fisher).sum(0)
    for pair in np.argsort(gain[first, second], kind="stable")[:16]:
        changed = moves.apply(assignment, int(up[first[pair]]), neighbours)
        changed = moves.apply(changed, int(down[second[pair]]), neighbours)
        delta = problem.layer_totals(changed, fisher).sum(0) - before
        # Two changes within a layer may share an overhead: only the exact effect counts.
        if delta[objective] < -tolerance and (delta <= room).all():
            return changed
    return None
