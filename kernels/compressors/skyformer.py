"""Skyformer landmarks: keys of the chunk and queries to come, under a filtered inverse.

Landmarks are keys at equal distances and, for `drawn` per cent of the slots, fixed draws from the
head's queries in balanced coordinates. The keys are combinations of the landmarks in the feature
space of the exponential kernel (`_landmark_slots`), with a regularised inverse of their kernel:

    G = g_CC + r I      D = diag(G 1)      a = D^-1/2 Z D^-1/2 g_CX      Z ~ (D^-1/2 G D^-1/2)^-1

The eigenvalues of the normalised kernel are in (0, 1], so Newton-Schulz steps that begin at the
identity converge. Six of them raise a small eigenvalue by 3.25^6 only: Z is a filter that leaves
out directions that the landmarks hardly span, not an inverse.

Source: Chen et al., Skyformer, https://arxiv.org/abs/2111.00035, section 4.2 (the completion over
queries and keys, the normalisation by row sums, the iteration). Unlike the paper, softmax attention
is approximated rather than replaced by a Gaussian kernel; landmarks are earlier keys and calibrated
draws instead of a sample of all queries and keys, so that the form is causal; and a slot of
negative mass is left out. The ridge r = 10^-ridge is 0.1, that of the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.compressors._chunk_slots import ChunkCompressor, Chunks, Summary
from attnplan.kernels.compressors._landmark_slots import lifted, points
from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.numerics import balance, query_draws
from attnplan.kernels.numerics.gaussian import gaussian
from attnplan.kernels.operands.inputs import Inputs, Moments

DRAWS = 32
STEPS = 6


@dataclass(frozen=True)
class Skyformer(ChunkCompressor):
    """Replace every far chunk of `chunk` keys by `slots` landmarks, `drawn` per cent of queries."""

    name: ClassVar[str] = "skyformer"
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

    drawn: int = 50
    ridge: int = 1
    rank: int = field(default=0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drawn <= 100:
            raise ValueError(f"drawn must be 0 to 100 per cent, got {self.drawn}")
        if not 0 <= self.ridge <= 12:
            raise ValueError(f"ridge is 10^-ridge, 0 to 12, got {self.ridge}")
        if self.rank < 0:
            raise ValueError(f"rank must not be negative, got {self.rank}")

    def summarise(self, chunks: Chunks, inputs: Inputs) -> Summary:
        landmarks = self._landmarks(chunks, inputs)
        x, at = (points(rows, chunks, inputs, self.rank) for rows in (chunks.key, landmarks))
        corner = gaussian(at, at)
        ridge = max(10.0**-self.ridge, 8 * torch.finfo(corner.dtype).eps)
        corner = corner + ridge * torch.eye(self.slots, dtype=corner.dtype, device=corner.device)
        root = corner.sum(-1, keepdim=True).rsqrt()
        inverse = newton_schulz(corner * root * root.mT, STEPS)
        return lifted(chunks, x, landmarks, at, root * (inverse @ (root * gaussian(at, x))))

    def _landmarks(self, chunks: Chunks, inputs: Inputs) -> Tensor:
        """Keys at equal distances, then drawn queries as keys, [..., slots, head_dim]."""
        draws = min(self.slots * self.drawn // 100, DRAWS)
        count = self.slots - draws
        where = (torch.arange(count, device=chunks.key.device) * 2 + 1) * self.chunk // (2 * count)
        keys = chunks.key[..., where, :]
        drawn = inputs.fitted_heads("skyformer.draws", chunks.head)[:, :draws]
        mean = inputs.fitted_heads("balanced.key_mean", chunks.head)[:, None]
        drawn = (mean + drawn).to(keys.dtype)
        return torch.cat([keys, drawn[:, None].expand(*keys.shape[:3], -1, -1)], -2)

    def build_macs(self, head_dim: int) -> float:
        rank = min(self.rank or head_dim, head_dim)
        metric = (self.chunk + self.slots) * head_dim * rank
        kernel = (self.chunk + self.slots) * self.slots * rank
        inverse = STEPS * 4 * self.slots**3 + self.chunk * self.slots**2
        values = self.chunk * self.slots * head_dim
        return float(metric + kernel + inverse + values)

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        fitted = balance.fit(moments) | balance.fit_directions(moments) | query_draws.fit(moments)
        query_map = fitted["balanced.query_map"].double()
        mean = fitted["balanced.query_mean"].double()[:, None]
        draws = query_draws.draw(moments, DRAWS) - mean
        # a query y in balanced coordinates is the key that has the coordinates y
        return fitted | {"skyformer.draws": (draws @ query_map @ query_map).float()}

    def reads(self, fitted: frozenset[str]) -> frozenset[str]:
        names = super().reads(fitted)
        return names if self.rank else balance.without_directions(names)


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """Approximate inverse of symmetric matrices [..., n, n] with eigenvalues in (0, 1].

    One step takes an eigenvalue x of matrix @ result to 1 - (3 (1 - x)^3 + (1 - x)^4) / 4.
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    result = eye.expand_as(matrix)
    for _ in range(steps):
        both = matrix @ result
        result = result @ (13 * eye - both @ (15 * eye - both @ (7 * eye - both))) / 4
    return result
