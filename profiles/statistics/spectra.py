"""Ranks and effective ranks of spectra: which dimensions hold the energy.

Spectra are numpy float64 vectors, descending.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def eigenvalues(gram: Array) -> Array:
    """Eigenvalues of a symmetric positive semi-definite matrix, descending, none below zero."""
    values: Array = np.linalg.eigvalsh(gram)[::-1].clip(min=0.0)
    return values


def energy_rank(energy: Array, share: float) -> float:
    """How many leading numbers of `energy` hold `share` of its sum; 0 if the sum is 0."""
    total = float(energy.sum())
    if total <= 0:
        return 0.0
    held = np.cumsum(energy) / total
    first = int(np.searchsorted(held, share * (1 - 1e-12)))
    return float(min(first + 1, len(energy)))


def effective_rank(weights: Array) -> float:
    """exp(-sum p log p) of `weights` over their sum; 0 if the sum is 0.

    Source: Roy, Vetterli, The effective rank, EUSIPCO 2007.
    """
    total = float(weights.sum())
    if total <= 0:
        return 0.0
    p = weights[weights > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def truncated_effective_rank(energy: Array, total: float, size: float) -> float:
    """Effective rank of singular values of which only the leading ones are known.

    What `total` leaves for the others is laid into as few of them as their size allows: none may
    exceed the last known one. The true effective rank of such a spectrum is at least this.

    Args:
        energy: squares of the leading singular values, descending.
        total: sum of the squares of all, the squared Frobenius norm.
        size: how many there are in all.
    """
    rest, others = total - float(energy.sum()), size - len(energy)
    sigma = np.sqrt(energy)
    if others <= 0 or rest <= 1e-9 * total:
        return effective_rank(sigma)
    count = min(rest / max(float(energy[-1]), 1e-300), others)
    tail = np.sqrt(rest / count)
    mass = float(sigma.sum()) + count * tail
    p, q = sigma[sigma > 0] / mass, tail / mass
    return float(np.exp(-(p * np.log(p)).sum() - count * q * np.log(q)))


def decay_exponent(sigma: Array) -> float:
    """a of the least-squares fit sigma_i ~ i^-a over those above 1e-6 of the largest, else 0."""
    known = sigma[sigma > 1e-6 * sigma[0]]
    if len(known) < 2:
        return 0.0
    x, y = np.log(np.arange(1, len(known) + 1)), np.log(known)
    x = x - x.mean()
    return float(-(x * (y - y.mean())).sum() / (x * x).sum())


def square_root(matrix: Array) -> Array:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root: Array = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    return root


def balanced_scores(query_cov: Array, key_cov: Array) -> Array:
    """Singular values s of Cov(q)^1/2 Cov(k)^1/2, descending.

    Scores q.k of independent centred queries and keys have variance sum s^2, and the best r
    dimensions for them keep the r largest s^2. Scaling queries and keys against each other
    (q.k = (A q).(A^-T k)) brings E|A q|^2 + E|A^-T k|^2 down to 2 sum s, no further.
    """
    root = square_root(query_cov)
    values: Array = np.sqrt(eigenvalues(root @ key_cov @ root))
    return values


def histogram_quantile(counts: Array, edges: Array, share: float) -> float:
    """Where a histogram reaches `share` of its counts, linear within a bin; NaN if it is empty."""
    total = float(counts.sum())
    if total <= 0:
        return float("nan")
    reached = np.cumsum(counts)
    place = int(np.searchsorted(reached, share * total))
    place = min(place, len(counts) - 1)
    before = float(reached[place] - counts[place])
    part = (share * total - before) / max(float(counts[place]), 1e-300)
    return float(edges[place] + min(max(part, 0.0), 1.0) * (edges[place + 1] - edges[place]))
