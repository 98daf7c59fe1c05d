"""Positive random features of the exponential (FAVOR+).

For a Gaussian vector w, e^{y.x} is the mean of e^{w.y - |y|^2/2} e^{w.x - |x|^2/2}. `features`
vectors, orthogonal in groups of head_dim, estimate that mean without bias; for independent vectors
the relative variance is (e^{|y + x|^2} - 1) / features, so queries and keys have to be short.

Source: Choromanski et al., https://arxiv.org/abs/2009.14794, sections 2.3 and 2.4. Unlike in the
reference code, the orthogonal vectors have uniform directions (signs of the QR factors), nothing is
added to the features, and they are carried as logarithms, so that none over- or underflows. All
heads share the vectors. With a `rank`, products are taken in so many of the strongest balanced
directions: rows are shorter, and the variance is smaller, but what lies in the others is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from attnplan.kernels.compressors._feature_map import FeatureMap, Logarithms, Side, orthogonal_rows
from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.operands.indexing import alike
from attnplan.kernels.operands.inputs import Inputs


@dataclass(frozen=True)
class Performer(FeatureMap):
    """Sum over far keys by `features` positive random features."""

    name: ClassVar[str] = "performer"
    logarithmic: ClassVar[bool] = True
    tried_beside_keys: ClassVar[tuple[Mapping[str, int], ...]] = ({"chunk": 64, "features": 32},)

    settings: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"features": 128},
        {"features": 128, "rank": 16},
        {"chunk": 64, "features": 48, "rank": 16},
    )
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = ({"chunk": 64, "features": 8, "rank": 8},)

    features: int = 128
    seed: int = 0
    rank: int = field(default=0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features < 1:
            raise ValueError(f"features must be at least 1, got {self.features}")
        if self.rank < 0:
            raise ValueError(f"rank must not be negative, got {self.rank}")

    def lift(self, rows: Tensor, side: Side, inputs: Inputs) -> Tensor:
        rows = rows[..., : self.directions(rows.shape[-1])]
        vectors = alike(orthogonal_rows(self.features, rows.shape[-1], self.seed), rows)
        half = rows.square().sum(-1, keepdim=True) / 2
        return rows @ vectors.mT - (half + math.log(self.features) / 2)

    def logarithms(self, inputs: Inputs) -> Logarithms:
        directions = self.directions(inputs.query.shape[-1])
        vectors = orthogonal_rows(self.features, directions, self.seed)
        vectors = vectors[None].to(inputs.query.device)
        constant = vectors.new_full((1, self.features), -math.log(self.features) / 2)
        return Logarithms(vectors, vectors, constant, constant, squares=True)

    def directions(self, head_dim: int) -> int:
        return min(self.rank or head_dim, head_dim)

    def count(self, head_dim: int) -> int:
        return self.features

    def feature_macs(self, head_dim: int) -> float:
        return float(self.features * self.directions(head_dim))
