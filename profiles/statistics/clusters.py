"""How well keys fall into clusters: k-means, a few steps, for all kv heads at once."""

from __future__ import annotations

import torch
from torch import Tensor


def cluster_inertia(
    points: Tensor, *, clusters: int, steps: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Sums of squared distances to the centres of k-means, and to the mean.

    Args:
        points: [kv_heads, tokens, head_dim].
        clusters: centres; they start at distinct random points.
        steps: of Lloyd's algorithm.
        seed: of the start.

    Returns:
        Within-cluster and total sums, float64 [kv_heads].
    """
    points = points.double() if points.dtype == torch.float64 else points.float()
    points = points - points.mean(1, keepdim=True)
    heads, tokens, head_dim = points.shape
    total = points.square().sum((1, 2), dtype=torch.float64)
    start = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:clusters]
    centres = points[:, start.to(points.device)]
    norm = points.square().sum(2)
    nearest = points.new_zeros(heads, tokens)
    for step in range(steps + 1):
        distance = centres.square().sum(2)[:, None] - 2 * points @ centres.mT
        nearest, label = distance.min(2)
        if step == steps:
            break
        sums = torch.zeros_like(centres)
        sums.scatter_add_(1, label[:, :, None].expand(-1, -1, head_dim), points)
        count = torch.zeros_like(centres[:, :, 0]).scatter_add_(1, label, torch.ones_like(norm))
        empty = (count == 0)[:, :, None]
        centres = torch.where(empty, centres, sums / count.clamp(min=1)[:, :, None])
    within = (nearest + norm).clamp(min=0).sum(1, dtype=torch.float64)
    return within, total
