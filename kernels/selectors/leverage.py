"""Leverage scores: the keys that point where few others do (LevAttention's universal set).

    score(j) = k_j^T (K^T K + r I)^-1 k_j

over the keys before a segment, or, `online`, over those before the end of the key's own segment:
it is then scored once and for all. Every key that holds a share of at least e of some query's
squared scores has a score of at least e (without r), and scores sum to at most head_dim: a set of
head_dim / e keys serves every query. The `top` keys stay for the whole segment, beside sinks and
the recent keys (`_segment_columns`).

Sources: Kannan et al., LevAttention, https://arxiv.org/abs/2410.05462, section 3; Cohen et al.,
Online row sampling, https://arxiv.org/abs/1604.05448 (scores over the rows so far). The guarantee
is for squared scores; for the exponential ones of pretrained heads there is none, and the entry
loses to nearly everything. r is 1e-6 of the mean energy of a direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors._segment_columns import SegmentColumns, best_columns
from attnplan.kernels.selectors._segment_tokens import Past, Picker

RIDGE = 1e-6


@dataclass(frozen=True)
class Leverage(SegmentColumns):
    """Keep recent keys, sinks, and the `top` keys of the largest leverage."""

    name: ClassVar[str] = "leverage"
    predictor: ClassVar[str] = "key_norm_ratio"

    settings: ClassVar[tuple[tuple[int, int, int], ...]] = (
        (8, 16, 64),
        (64, 32, 128),
        (64, 64, 256),
    )

    online: int = field(default=0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.online not in (0, 1):
            raise ValueError(f"online must be 0 or 1, got {self.online}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for setting in super().choices(shape):
            yield replace(setting, online=1)
        if 128 + 2 * 256 < shape.keys:
            yield cls(128)

    def picker(self, inputs: Inputs, blocks: Tensor) -> Picker:
        if not self.online:
            return super().picker(inputs, blocks)
        wide = torch.promote_types(inputs.key.dtype, torch.float32)
        scores = [
            online_scores(inputs.key[row, :, start:].to(wide), self.segment)[list(inputs.kv_head)]
            for row, start in enumerate(inputs.start)
        ]

        def pick(past: Past) -> Tensor:
            seen = scores[past.row][:, self.sinks : past.high - past.start]
            return best_columns(seen, self.top, len(past.queries)) + past.low

        return pick

    def column_scores(self, query: Tensor, key: Tensor, inputs: Inputs) -> Tensor:
        return leverage_scores(key)[list(inputs.kv_head)]

    def score_macs(self, shape: AttentionShape, seen: int) -> float:
        return 0.0 if self.online else self._leverage_macs(shape, seen + self.window, 1)

    def once_macs(self, shape: AttentionShape) -> float:
        if not self.online:
            return 0.0
        return self._leverage_macs(shape, shape.keys, shape.keys // self.segment)

    def _leverage_macs(self, shape: AttentionShape, keys: int, factors: int) -> float:
        d = shape.head_dim
        # products and triangular solves, factors
        return float(1.5 * keys * d * d + factors * d**3 / 6) / shape.group


def leverage_scores(key: Tensor) -> Tensor:
    """Leverage of every row of [..., keys, head_dim], [..., keys], in [0, 1]."""
    return _scores(key, key.mT @ key)


def online_scores(key: Tensor, segment: int) -> Tensor:
    """Leverage of every row of [..., keys, head_dim] among the rows up to its segment's end.

    Rows of complete segments alone.
    """
    complete = key.shape[-2] // segment
    rows = key[..., : complete * segment, :].unflatten(-2, (complete, segment))
    return _scores(rows, (rows.mT @ rows).cumsum(-3)).flatten(-2)


def _scores(key: Tensor, gram: Tensor) -> Tensor:
    energy = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    eye = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)
    factor = torch.linalg.cholesky(gram + RIDGE * energy * eye)
    half = torch.linalg.solve_triangular(factor, key.mT, upper=False)
    return half.square().sum(-2)
