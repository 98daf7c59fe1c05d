"""Landmark attention: queries as mixtures of a few landmark queries.

`landmarks` queries L_c are drawn from the head's calibrated query distribution. Each attends to the
far keys exactly, and a query mixes them by how near it is to each:

    e^{y.x} ~ sum_c a_c(y) e^{L_c.x}     a(y) = softmax(temperature (y.L - |L|^2/2))

so a query reads a convex mixture of the landmarks' sums, with their masses. A query that is a
landmark is exact in the limit of a high temperature.

Source: Chen et al., Compact Self-Attention with Low-Rank Approximation, IJCAI 2020 (landmark
attention and combination coefficients); paired query landmarks as in Agent Attention,
https://arxiv.org/abs/2312.08874, section 3.2. Unlike both, landmarks are drawn from calibration and
not pooled from the text, so that they are causal; queries are centred and balanced; long landmarks
are not preferred (the term |L|^2/2); and the masses of the landmarks are kept. With a `rank`, all
this is done in so many of the strongest balanced directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.compressors._feature_map import FeatureMap, Logarithms, Side, orthogonal_rows
from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.operands.indexing import alike
from attnplan.kernels.operands.inputs import Inputs


@dataclass(frozen=True)
class CSALR(FeatureMap):
    """Sum over far keys once for each of `landmarks` queries, and mix the sums."""

    name: ClassVar[str] = "csalr"
    logarithmic: ClassVar[bool] = True

    settings: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"landmarks": 64},
        {"landmarks": 128, "rank": 16},
        {"chunk": 64, "landmarks": 48, "rank": 16},
    )
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = ({"chunk": 64, "landmarks": 8, "rank": 8},)

    landmarks: int = 64
    temperature: int = 2
    rank: int = field(default=0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.landmarks < 1:
            raise ValueError(f"landmarks must be at least 1, got {self.landmarks}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.rank < 0:
            raise ValueError(f"rank must not be negative, got {self.rank}")

    def lift(self, rows: Tensor, side: Side, inputs: Inputs) -> Tensor:
        landmarks = self.drawn(inputs).to(rows).unflatten(0, (-1, *[1] * (rows.ndim - 4)))
        scores = rows[..., : landmarks.shape[-1]] @ landmarks.mT
        if side == "key":
            return scores
        half = landmarks.square().sum(-1)[..., None, :] / 2
        return torch.log_softmax(self.temperature * (scores - half), -1)

    def logarithms(self, inputs: Inputs) -> Logarithms:
        landmarks = self.drawn(inputs).double()
        half = landmarks.square().sum(-1) / 2
        return Logarithms(
            self.temperature * landmarks,
            landmarks,
            -self.temperature * half,
            torch.zeros_like(half),
            squares=False,
        )

    def drawn(self, inputs: Inputs) -> Tensor:
        """The landmarks as rows y, [heads, landmarks, directions]."""
        spread = inputs.fitted_heads("balanced.spread", inputs.head)
        spread = spread[:, : self.directions(spread.shape[-1])]
        vectors = alike(orthogonal_rows(self.landmarks, spread.shape[-1], 0), spread)
        return vectors * spread[:, None] * inputs.scale**0.5

    def directions(self, head_dim: int) -> int:
        return min(self.rank or head_dim, head_dim)

    def count(self, head_dim: int) -> int:
        return self.landmarks

    def feature_macs(self, head_dim: int) -> float:
        return float(self.landmarks * self.directions(head_dim))
