"""Linear attention with elu + 1 features, around the head's mean query and key.

    e^{y.x} ~ <f(y), f(x)>     f(x) = (elu(x) + 1) / sqrt(head_dim), entry by entry

which is 1 where both are at their means, and positive everywhere.

Source: Katharopoulos et al., https://arxiv.org/abs/2006.16236, section 3.2. Unlike there, queries
and keys are not trained for it, but centred and balanced, and the mean query weighs the keys. With
a `rank`, there are entries of so many of the strongest balanced directions alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.compressors._feature_map import FeatureMap, Side
from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.operands.inputs import Inputs


@dataclass(frozen=True)
class Linear(FeatureMap):
    """Sum over far keys by one positive feature per balanced direction."""

    name: ClassVar[str] = "linear"
    settings: ClassVar[tuple[Mapping[str, int], ...]] = (
        {},
        {"chunk": 64},
        {"chunk": 64, "rank": 32},
    )
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = ({"chunk": 64, "rank": 8},)

    rank: int = field(default=0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"rank must not be negative, got {self.rank}")

    def lift(self, rows: Tensor, side: Side, inputs: Inputs) -> Tensor:
        rows = rows[..., : self.directions(rows.shape[-1])]
        return (torch.nn.functional.elu(rows) + 1) * rows.shape[-1] ** -0.5

    def directions(self, head_dim: int) -> int:
        return min(self.rank or head_dim, head_dim)

    def count(self, head_dim: int) -> int:
        return self.directions(head_dim)

    def feature_macs(self, head_dim: int) -> float:
        return float(self.directions(head_dim))
