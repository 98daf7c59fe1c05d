"""Heavy hitters: the keys that recent queries paid most attention to.

Before every segment, the last `observers` queries are attended to exactly; a key's
score is the probability that they gave it in total, averaged over `POOL` neighbours. The `top` keys
stay for the whole segment, beside sinks and the recent keys (`segment_columns`).

Sources: Zhang et al., H2O, https://arxiv.org/abs/2306.14048, section 4 (accumulated attention); Li
et al., SnapKV, https://arxiv.org/abs/2404.14469, section 4 (an observation window, pooling). Unlike
both, nothing is evicted: the choice is made anew for every segment, from all keys before it. Where
no query stands before the segment (a continued cache), the latest keys are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.approximation import AttentionShape, Inputs
from attnplan.kernels.segment_columns import SegmentColumns

POOL = 5


@dataclass(frozen=True)
class HeavyHitters(SegmentColumns):
    """Keep recent keys, sinks, and the `top` keys that the last queries attended to most."""

    name: ClassVar[str] = "heavy_hitters"
    predictor: ClassVar[str] = "vertical_mass"

    observers: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observers < 1:
            raise ValueError(f"observers must be at least 1 query, got {self.observers}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for top, segment in ((64, 128), (128, 256)):
            if top + 2 * segment < shape.keys:
                yield cls(top, segment=segment)

    def column_scores(self, query: Tensor, key: Tensor, inputs: Inputs) -> Tensor:
        keys = torch.arange(key.shape[1], device=key.device)
        query = query[:, -self.observers :]
        if query.shape[1] == 0:
            return keys.to(key.dtype).expand(query.shape[0], -1)
        i = keys[-query.shape[1] :, None]
        logits = query @ key[list(inputs.kv_head)].mT * inputs.scale
        mass = torch.softmax(logits.masked_fill(keys > i, float("-inf")), -1).sum(1)
        return torch.nn.functional.avg_pool1d(mass, POOL, stride=1, padding=POOL // 2)

    def score_macs(self, shape: AttentionShape, seen: int) -> float:
        return float(self.observers * (seen + self.window) * shape.head_dim)
