"""Nystrom landmarks: the far keys as combinations of their segment means.

Every chunk is cut into `slots` runs; the mean key of a run is a landmark, and the keys are written
as combinations of the landmarks in the feature space of the exponential kernel (`_landmark_slots`):

    a = (g_CC + r I)^-1 g_CX        with the ridge r = 10^-ridge

Exact with one landmark per key and no ridge to speak of.

Sources: Xiong et al., Nystromformer, https://arxiv.org/abs/2102.03902, section 3.2 (segment means
as landmarks); Chen et al., Skyformer, https://arxiv.org/abs/2111.00035, section 4 (the positive
definite form on a Gaussian kernel). Unlike both, landmarks are taken from earlier keys only, so
that the form is causal; the kernel is not normalised by rows, so that the far field has a mass; and
the pseudo-inverse is a ridge solve, whose ridge is a knob, because converging it is harmful.
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


@dataclass(frozen=True)
class Nystrom(ChunkCompressor):
    """Replace every far chunk of `chunk` keys by `slots` segment means, weighted."""

    name: ClassVar[str] = "nystrom"
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

    ridge: int = 1
    rank: int = field(default=0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ridge <= 12:
            raise ValueError(f"ridge is 10^-ridge, 0 to 12, got {self.ridge}")
        if self.rank < 0:
            raise ValueError(f"rank must not be negative, got {self.rank}")

    def summarise(self, chunks: Chunks, inputs: Inputs) -> Summary:
        place = torch.arange(self.chunk, device=chunks.key.device)
        run = place[: self.slots]
        member = (place[:, None] * self.slots // self.chunk == run).to(chunks.key.dtype)
        landmarks = (member / member.sum(0)).mT @ chunks.key
        x, at = (points(rows, chunks, inputs, self.rank) for rows in (chunks.key, landmarks))
        corner = gaussian(at, at)
        eye = torch.eye(self.slots, dtype=corner.dtype, device=corner.device)
        ridge = max(10.0**-self.ridge, 8 * torch.finfo(corner.dtype).eps)
        # waits for no answer: where rounding left nothing to factor, a chunk has no slots
        factor, failed = torch.linalg.cholesky_ex(corner + ridge * eye)
        factor = factor.masked_fill((failed != 0)[..., None, None], float("nan"))
        return lifted(chunks, x, landmarks, at, torch.cholesky_solve(gaussian(at, x), factor))

    def build_macs(self, head_dim: int) -> float:
        rank = min(self.rank or head_dim, head_dim)
        metric = (self.chunk + self.slots) * head_dim * rank
        kernel = (self.chunk + self.slots) * self.slots * rank
        solve = self.slots**3 / 3 + self.chunk * self.slots**2
        values = self.chunk * self.slots * head_dim
        return float(metric + kernel + solve + values)

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        return balance.fit(moments) | balance.fit_directions(moments) | query_draws.fit(moments)

    def reads(self, fitted: frozenset[str]) -> frozenset[str]:
        names = super().reads(fitted)
        return names if self.rank else balance.without_directions(names)
