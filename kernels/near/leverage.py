"""Leverage scores: the keys that point where few others do (LevAttention's universal set).

    score(j) = k_j^T (K^T K + r I)^-1 k_j

over the keys before a segment. Every key that holds a share of at least e of some query's squared
scores has a score of at least e (without r), and scores sum to at most head_dim: a set of
head_dim / e keys serves every query. The `top` keys stay for the whole segment, beside sinks and
the recent keys (`segment_columns`).

Source: Kannan et al., LevAttention, https://arxiv.org/abs/2410.05462, section 3. The guarantee is
for squared scores; for the exponential ones of pretrained heads there is none, and the entry loses
to nearly everything. r is 1e-6 of the mean energy of a direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.approximation import AttentionShape, Inputs
from attnplan.kernels.segment_columns import SegmentColumns

RIDGE = 1e-6


@dataclass(frozen=True)
class Leverage(SegmentColumns):
    """Keep recent keys, sinks, and the `top` keys of the largest leverage."""

    name: ClassVar[str] = "leverage"
    predictor: ClassVar[str] = "key_norm_ratio"

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        if 128 + 2 * 256 < shape.keys:
            yield cls(128)

    def column_scores(self, query: Tensor, key: Tensor, inputs: Inputs) -> Tensor:
        return leverage_scores(key)[list(inputs.kv_head)]

    def score_macs(self, shape: AttentionShape, seen: int) -> float:
        d = shape.head_dim
        return float(2 * (seen + self.window) * d * d + d**3 / 3) / shape.group


def leverage_scores(key: Tensor) -> Tensor:
    """Leverage of every row of [..., keys, head_dim], [..., keys], in [0, 1]."""
    gram = key.mT @ key
    energy = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    eye = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)
    factor = torch.linalg.cholesky(gram + RIDGE * energy * eye)
    half = torch.linalg.solve_triangular(factor, key.mT, upper=False)
    return half.square().sum(-2)
