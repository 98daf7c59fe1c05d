"""Queries drawn from what calibration knows of a head, the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor

from attnplan.kernels.approximation import Moments
from attnplan.kernels.balance import root

SEED = 0


def draw(moments: Moments, count: int) -> Tensor:
    """Normal queries with a head's mean and covariance, float64 [heads, count, head_dim].

    All heads and layers share the underlying numbers, whose mean is taken out.
    """
    mean = moments.query_mean.double()
    covariance = moments.query_gram.double() - mean[:, :, None] * mean[:, None, :]
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(count, mean.shape[1], generator=generator, dtype=torch.float64)
    noise = noise - noise.mean(0)
    return mean[:, None] + noise @ root(covariance)
