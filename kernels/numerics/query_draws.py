"""Queries drawn from what calibration knows of a head, the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor

from attnplan.kernels.numerics.balance import root
from attnplan.kernels.operands.inputs import Moments

SEED = 0
NAME = "drawn.queries"
KEPT = 16
"""Queries that methods have in common."""


def fit(moments: Moments) -> dict[str, Tensor]:
    """Draws that stand for the queries to come, float32 [heads, 16, head_dim]."""
    # others than those that methods are fitted to, which tell nothing of how these err
    return {NAME: draw(moments, KEPT, SEED + 1).float()}


def draw(moments: Moments, count: int, seed: int = SEED) -> Tensor:
    """Normal queries with a head's mean and covariance, float64 [heads, count, head_dim].

    All heads and layers share the underlying numbers, whose mean is taken out.
    """
    mean = moments.query_mean.double()
    covariance = moments.query_gram.double() - mean[:, :, None] * mean[:, None, :]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, mean.shape[1], generator=generator, dtype=torch.float64)
    noise = noise - noise.mean(0)
    return mean[:, None] + noise @ root(covariance)
