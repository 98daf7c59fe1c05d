"""Taylor features: the exponential of the centred score up to its square.

In balanced, centred coordinates scores are small, and on the `rank` strongest directions

    e^{y.x} ~ 1 + y.x + (y.x)^2 / 2  =  <f(y), f(x)>     f(x) = [1, x, products x_a x_b of pairs]

which is positive for all y and x, so the mass is. A query far from the mean undervalues keys that
score high: these should be near.

Sources: Taylor features of the exponential as in Arora et al., Based,
https://arxiv.org/abs/2402.18668. Unlike there, queries and keys are not trained for it, but
centred, balanced and projected, and the mean query weighs the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnplan.kernels.compressors._feature_map import FeatureMap, Side, products, with_constant
from attnplan.kernels.operands.inputs import Inputs


@dataclass(frozen=True)
class Taylor(FeatureMap):
    """Sum over far keys by the second-degree polynomial of their scores in `rank` directions."""

    name: ClassVar[str] = "taylor"
    least_keys: ClassVar[int] = 1024
    settings: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"rank": 16},
        {"chunk": 128, "rank": 8},
        {"chunk": 64, "rank": 8},
    )
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = ({"chunk": 64, "rank": 3},)

    rank: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1 direction, got {self.rank}")

    def lift(self, rows: Tensor, side: Side, inputs: Inputs) -> Tensor:
        # 1 + s + s^2/2 = 1/2 + (1 + s)^2/2
        features = products(with_constant(rows[..., : self.rank]) * 2**-0.25)
        features.select(-1, 0).fill_(1)
        return features

    def directions(self, head_dim: int) -> int:
        return min(self.rank, head_dim)

    def count(self, head_dim: int) -> int:
        rank = self.directions(head_dim)
        return 1 + rank + rank * (rank + 1) // 2

    def feature_macs(self, head_dim: int) -> float:
        return float(self.count(head_dim))
