"""WILDCAT: a weighted coreset of the far keys by randomly pivoted Cholesky.

In every chunk, `slots` keys are drawn one after the other, each with a chance proportional to what
the keys drawn before leave unexplained of it; the others are then written as combinations of them,
in the feature space of the exponential kernel (`_landmark_slots`):

    repeat:  s ~ c_j^2 d_j    f = (g(X, x_s) - F F_s^T) / sqrt(d_s)    F = [F, f]    d = d - f^2
    a = F_S^-T F^T            (F_S, the rows of the drawn keys, is triangular)

c_j is the weight of key j for a mean query, times e^{s|x_j|^2/2}. Exact with as many slots as
there are distinct keys.

Sources: Schroeder and Mackey, WILDCAT: Near-linear attention in theory and practice, 2026 (the
coreset, key centring, bins, which here are the chunks); Chen et al., Randomly pivoted Cholesky,
https://arxiv.org/abs/2207.06503, algorithm 1. Unlike the former, the temperature is replaced by
balanced coordinates, the mean query weighs the keys, and a slot of negative mass is left out
instead of clipping outputs. The draws follow a golden-ratio sequence, the same in every chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.compressors._chunk_slots import ChunkCompressor, Chunks, Summary
from attnplan.kernels.compressors._landmark_slots import lifted, log_shares, points
from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.numerics import balance, query_draws
from attnplan.kernels.numerics.clustering import take
from attnplan.kernels.numerics.gaussian import gaussian
from attnplan.kernels.operands.inputs import Inputs, Moments

GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Wildcat(ChunkCompressor):
    """Replace every far chunk of `chunk` keys by `slots` of them, weighted."""

    name: ClassVar[str] = "wildcat"
    predictor: ClassVar[str] = "random_feature_exponent"
    mean_name: ClassVar[str | None] = "balanced.query_mean"
    settings: ClassVar[tuple[tuple[int, int], ...]] = ((128, 16),)
    matched: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"chunk": 128, "slots": 16, "rank": 16, "references": 16},
    )
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"chunk": 64, "slots": 1, "rank": 8, "references": 4},
        {"chunk": 64, "slots": 4, "rank": 16, "references": 16},
    )

    rank: int = field(default=0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"rank must not be negative, got {self.rank}")

    def summarise(self, chunks: Chunks, inputs: Inputs) -> Summary:
        x = points(chunks.key, chunks, inputs, self.rank)
        drawn, factor = _pivots(x, (2 * log_shares(chunks, x)[0]).exp(), self.slots)
        corner = take(factor, drawn)  # [..., slots, slots], lower triangular
        unused = corner.diagonal(dim1=-2, dim2=-1) == 0
        corner = torch.where(unused[..., None], torch.zeros_like(corner), corner)
        corner = corner + torch.diag_embed(unused.to(corner.dtype))
        coefficients = torch.linalg.solve_triangular(corner.mT, factor.mT, upper=True)
        return lifted(chunks, x, take(chunks.key, drawn), take(x, drawn), coefficients)

    def build_macs(self, head_dim: int) -> float:
        rank = min(self.rank or head_dim, head_dim)
        draws = self.slots * (rank + self.slots / 2)  # distances to a pivot, and the update
        values = self.slots * (self.slots / 2 + head_dim)
        return float(self.chunk * (head_dim * rank + draws + values))

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        return balance.fit(moments) | balance.fit_directions(moments) | query_draws.fit(moments)

    def reads(self, fitted: frozenset[str]) -> frozenset[str]:
        names = super().reads(fitted)
        return names if self.rank else balance.without_directions(names)


def _pivots(x: Tensor, share: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Drawn keys int64 [..., slots], and the factor [..., chunk, slots] with F F^T ~ g(X, X)."""
    left = torch.ones_like(share)
    factor = x.new_zeros(*share.shape, slots)
    drawn = torch.zeros(*share.shape[:-1], slots, dtype=torch.int64, device=x.device)
    tolerance = 8 * share.shape[-1] * torch.finfo(x.dtype).eps
    for step in range(slots):
        chance = (share * left).cumsum(-1)
        total = chance[..., -1:]
        at = torch.searchsorted(chance, total * ((0.5 + step * GOLDEN) % 1.0), right=True)
        at = at.clamp(max=share.shape[-1] - 1)
        rest = left.gather(-1, at)
        usable = (total > 0) & (rest > tolerance)
        column = gaussian(x, take(x, at))[..., 0] - (factor @ take(factor, at).mT)[..., 0]
        column = torch.where(usable, column / rest.clamp(min=tolerance).sqrt(), 0.0)
        factor[..., step] = column
        left = (left - column.square()).clamp(min=0)
        left = torch.where(usable, left.scatter(-1, at, 0.0), left)
        drawn[..., step] = at[..., 0]
    return drawn, factor
