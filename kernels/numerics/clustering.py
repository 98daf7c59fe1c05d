"""Keys of chunks by clusters: sampled centres, Lloyd's algorithm, and sums over members."""

from __future__ import annotations

import torch
from torch import Tensor


def pick(
    weight: Tensor, count: int, uniform: float, quantile: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`count` keys of every chunk by systematic sampling, and the chance of each.

    A key's chance per draw is its share of the weight, mixed with `uniform` equal chances. The
    draws stand at equal distances in the cumulated chances; a key may be drawn more than once.

    Args:
        weight: [..., chunk].
        count: of draws.
        uniform: share of the equal chances.
        quantile: where the draws stand, ascending, [..., count]; in the middles of `count` equal
            parts if None. Where one random offset moves all of them from the beginnings of the
            parts, a key is drawn `count` times its chance on average.

    Returns:
        int64 [..., count], ascending, and the chances per draw [..., count].
    """
    chunk = weight.shape[-1]
    share = weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
    chance = (1 - uniform) * share + uniform / chunk
    cumulative = chance.cumsum(-1)
    if quantile is None:
        quantile = (torch.arange(count, device=weight.device) + 0.5) / count
    quantile = quantile.to(cumulative.dtype).expand(*cumulative.shape[:-1], count)
    picked = torch.searchsorted(cumulative, quantile.contiguous()).clamp(max=chunk - 1)
    return picked, chance.gather(-1, picked)


def spread(picked: Tensor, chunk: int) -> Tensor:
    """Ascending places in a chunk [..., count] moved apart: no two are the same.

    A place that is taken goes to the next one behind it that is free, or before the end of the
    chunk. `count` is at most `chunk`.
    """
    count = picked.shape[-1]
    rank = torch.arange(count, device=picked.device)
    apart = (picked - rank).cummax(-1).values + rank
    return torch.minimum(apart, chunk - count + rank)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [..., chunk, dim] at index [..., count], [..., count, dim]."""
    return torch.gather(rows, -2, index[..., None].expand(*index.shape, rows.shape[-1]))


def lloyd(points: Tensor, weight: Tensor, centre: Tensor, steps: int) -> Tensor:
    """`nearest` as one-hot membership, [..., points, clusters]."""
    cluster = nearest(points, weight, centre, steps)
    member = points.new_zeros(*weight.shape, centre.shape[-2])
    return member.scatter_(-1, cluster[..., None], 1.0)


def nearest(points: Tensor, weight: Tensor, centre: Tensor, steps: int) -> Tensor:
    """The cluster of every point after weighted Lloyd steps, int64 [..., points].

    Args:
        points: [..., points, dim].
        weight: [..., points].
        centre: [..., clusters, dim], where the clusters begin.
        steps: at least 1.
    """
    while True:
        cluster = _nearest_centres(points, centre)
        steps -= 1
        if steps == 0:
            return cluster
        total = gathered(weight[..., None], cluster, centre.shape[-2])
        moved = gathered(points * weight[..., None], cluster, centre.shape[-2])
        # an empty cluster stays where it is
        moved = moved / total.clamp(min=torch.finfo(points.dtype).tiny)
        centre = torch.where(total > 0, moved, centre)


def _nearest_centres(points: Tensor, centre: Tensor) -> Tensor:
    """The nearest centre of every point, the first of equally near ones."""
    if points.is_cuda and points.dtype != torch.float64:
        from attnplan.kernels.engines.gpu import nearest as gpu_nearest

        return gpu_nearest.nearest_centres(points, centre)
    # |x - c|^2 / 2 without |x|^2, which is the same for all centres
    distance = 0.5 * (centre * centre).sum(-1)[..., None, :] - points @ centre.mT
    return distance.argmin(-1)


def gathered(rows: Tensor, cluster: Tensor, clusters: int) -> Tensor:
    """Sums of the rows [..., rows, dim] of every cluster, [..., clusters, dim]."""
    sums = rows.new_zeros(*rows.shape[:-2], clusters, rows.shape[-1])
    offset = clusters * torch.arange(sums[..., 0, 0].numel(), device=rows.device)
    place = cluster + offset.view(*rows.shape[:-2], 1)
    sums.flatten(0, -2).index_add_(0, place.flatten(), rows.flatten(0, -2))
    return sums
