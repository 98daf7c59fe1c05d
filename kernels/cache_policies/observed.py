"""Keep the keys that recent queries attend to.

A row is worth the attention that the queries of its group paid to it, averaged over the queries
that could see it, recent ones counting for more. The worth of a key is spread to its neighbours,
so that what belongs together stays together.

Sources: Li et al., SnapKV, https://arxiv.org/abs/2404.14469, sections 4.1 and 4.2 (the last queries
of the prompt vote, with pooling); Zhang et al., H2O, https://arxiv.org/abs/2306.14048, section 4
(accumulated attention while generating). Unlike H2O, attention is averaged over the queries that
could see a key, so that old keys have no advantage, and decays with a half-life of 128 queries;
unlike SnapKV, the choice is made anew as the text grows, and by the whole group of query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.cache_policy import BoundedKeeper, Past


@dataclass(frozen=True)
class Observed(BoundedKeeper):
    """Keep `keys` attended keys beside the first `sinks` and the last `window`."""

    name: ClassVar[str] = "observed"
    family: ClassVar[str] = "sparse"
    observes: ClassVar[bool] = True

    keys: int = 128
    pool: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys < 1:
            raise ValueError(f"keys must be at least 1, got {self.keys}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool must be odd, got {self.pool}")

    @property
    def more(self) -> int:
        return self.keys

    @classmethod
    def of(cls, rows: int) -> Self | None:
        window = max(32, rows // 4)
        keys = rows - window - cls.sinks
        return cls(window=window, keys=keys) if keys >= 32 else None

    def worth(self, old: Past) -> Tensor:
        flat = old.attention.flatten(0, 1)
        pooled = torch.nn.functional.max_pool1d(flat, self.pool, 1, self.pool // 2)
        return pooled.view_as(old.attention)
