"""Routing: keys are clustered, and queries read the members of the clusters that suit them best.

When a segment is complete, its keys are clustered by k-means in balanced, centred coordinates
(`balance`), about one cluster per `PER_CLUSTER` keys. A query scores the mean key of every cluster
before its own segment by its product with it, and reads the members of the clusters in the order of
their scores until it has `top` keys; of the last cluster it reads the earliest ones. With a `rank`,
clusters and scores are of so many of the strongest balanced directions.

Source: Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers,
https://arxiv.org/abs/2003.05997, section 4. Unlike the paper, clusters come from the keys
themselves instead of training, and are made segment by segment, so that they never change and their
cost is linear; a query reads several clusters; vectors are balanced instead of put on a sphere.
Lloyd's algorithm runs `STEPS` times, from keys at equal distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.numerics import balance
from attnplan.kernels.numerics.clustering import lloyd
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors._segment_tokens import Past, Picker, SegmentTokens

PER_CLUSTER = 16
STEPS = 3


@dataclass(frozen=True)
class Routing(SegmentTokens):
    """Keep recent keys, sinks, and `top` keys of the clusters of the best mean keys."""

    name: ClassVar[str] = "routing"
    family: ClassVar[str] = "clustered"
    predictor: ClassVar[str] = "cluster_inertia"

    rank: int = field(default=0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"rank must not be negative, got {self.rank}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for setting in super().choices(shape):
            yield setting if setting.segment == 256 else replace(setting, rank=16)

    def picker(self, inputs: Inputs, blocks: Tensor) -> Picker:
        query, key = balance.coordinates(inputs, inputs.rows(blocks), rank=self.rank)
        clusters = [self._clusters(key[row, :, start:]) for row, start in enumerate(inputs.start)]

        def pick(past: Past) -> Tensor:
            cluster, means = clusters[past.row]
            known = (past.end - past.start) // self.segment * self._per_segment
            scores = query[past.row][:, past.queries] @ means[:, :known].mT
            candidates = cluster[:, past.low - past.start : past.high - past.start]
            return past.low + best_members(scores, candidates, self.top)

        return pick

    def segment_macs(self, shape: AttentionShape, seen: int, queries: int) -> float:
        clusters = seen // self.segment * self._per_segment
        return float(queries * clusters * self._rank(shape))

    def once_macs(self, shape: AttentionShape) -> float:
        mapping = (shape.queries + shape.keys) * shape.head_dim
        clustering = 2 * STEPS * shape.keys * self._per_segment
        return float((mapping + clustering) * self._rank(shape))

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        return balance.fit(moments) | balance.fit_directions(moments)

    def reads(self, fitted: frozenset[str]) -> frozenset[str]:
        return fitted if self.rank else balance.without_directions(fitted)

    def _rank(self, shape: AttentionShape) -> int:
        return min(self.rank or shape.head_dim, shape.head_dim)

    @property
    def _per_segment(self) -> int:
        return max(1, self.segment // PER_CLUSTER)

    def _clusters(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Of keys [heads, keys, d]: the cluster of each key and the mean of each cluster.

        Keys of complete segments alone: int64 [heads, complete], [heads, clusters, d].
        """
        complete, each = key.shape[1] // self.segment, self._per_segment
        points = key[:, : complete * self.segment].unflatten(1, (complete, self.segment))
        position = torch.arange(complete * self.segment, device=key.device)
        weight = (position >= self.sinks).to(key.dtype).view(complete, self.segment)
        weight = weight.expand(points.shape[:3])
        first = (torch.arange(each, device=key.device) * 2 + 1) * self.segment // (2 * each)
        member = lloyd(points, weight, points[:, :, first], STEPS)
        share = member * weight[..., None]
        means = share.mT @ points / share.sum(2).clamp(min=1)[..., None]
        cluster = member.argmax(-1) + torch.arange(complete, device=key.device)[:, None] * each
        return cluster.flatten(1), means.flatten(1, 2)


def best_members(scores: Tensor, cluster: Tensor, top: int) -> Tensor:
    """The first `top` keys of the clusters in the order of their scores, int64 [heads, n, top].

    Args:
        scores: [heads, n, clusters].
        cluster: of every key, int64 [heads, keys]; there are at least `top` keys.
        top: keys to take; those of a cluster are taken in their own order.
    """
    size = torch.zeros_like(scores[:, 0], dtype=torch.int64)
    size.scatter_add_(1, cluster, torch.ones_like(cluster))
    scores = scores.masked_fill(size[:, None] == 0, float("-inf"))
    best = scores.topk(min(top, scores.shape[2]), dim=-1).indices  # no cluster in it is empty
    by_cluster = cluster.argsort(dim=-1, stable=True)
    begin = size.cumsum(-1) - size
    some = size[:, None].expand_as(scores).gather(2, best)
    after = some.cumsum(-1)  # keys of the clusters up to each
    place = torch.arange(top, device=scores.device).expand(*scores.shape[:2], top).contiguous()
    which = torch.searchsorted(after, place, right=True)
    begin = begin[:, None].expand_as(scores).gather(2, best)
    index = begin.gather(2, which) + place - (after - some).gather(2, which)
    return by_cluster.gather(1, index.flatten(1)).view(index.shape)
