"""Tensor Sketch: hashed products, for the square of 1 + y.x/2.

(a.c)^p is a product of two p-fold tensors. A count sketch C adds entry i of a, with a random sign,
to one of `features` buckets; the sketch of a p-fold tensor is the circular convolution of p count
sketches, which Fourier transforms turn into products:

    g(a) = F^-1 (F C_1 a * ... * F C_p a)     E <g(a), g(c)> = (a.c)^p     a = [1, y/sqrt(p)]

Inner products are the same before F^-1 (Parseval), so the frequencies are the features. On a CPU
rows are scattered and transformed where their number is a power of two (`native.features`);
elsewhere F C is a matrix. Estimates are signed, so some rows may come out without a positive mass.
With a `rank`, a holds so many of the strongest balanced directions.

Source: Pham and Pagh, Tensor Sketch, https://arxiv.org/abs/2505.08146. The kernel
(1 + y.x/p)^p, which follows the exponential of the centred, balanced score, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import log2
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.compressors._feature_map import FeatureMap, Side, random_signs, with_constant
from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.native import features as native_features
from attnplan.kernels.operands.indexing import alike
from attnplan.kernels.operands.inputs import Inputs


@dataclass(frozen=True)
class TensorSketch(FeatureMap):
    """Sum over far keys by `features` buckets of products of `degree` entries."""

    name: ClassVar[str] = "tensor_sketch"
    settings: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"features": 128},
        {"features": 128, "rank": 16},
        {"chunk": 64, "features": 64, "rank": 16},
    )
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = ({"chunk": 64, "features": 8, "rank": 8},)

    features: int = 256
    degree: int = 2
    seed: int = 0
    rank: int = field(default=0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features < 1:
            raise ValueError(f"features must be at least 1, got {self.features}")
        if not 1 <= self.degree <= 4:
            raise ValueError(f"degree must be 1 to 4, got {self.degree}")
        if self.rank < 0:
            raise ValueError(f"rank must not be negative, got {self.rank}")

    def lift(self, rows: Tensor, side: Side, inputs: Inputs) -> Tensor:
        rows = rows[..., : self.directions(rows.shape[-1])]
        buckets, signs = hashes(self.degree, rows.shape[-1] + 1, self.features, self.seed)
        scale = self.degree**-0.5
        if native_features.sketches(rows, self.degree, self.features):
            return native_features.sketch(rows, scale, buckets, signs, parseval(self.features))
        maps = alike(sketch_maps(self.degree, rows.shape[-1] + 1, self.features, self.seed), rows)
        signed = with_constant(rows * scale)
        parts = [(signed @ m).unflatten(-1, (2, -1)).unbind(-2) for m in maps]
        real, imaginary = parts[0]
        for more, more_imaginary in parts[1:]:
            real, imaginary = (
                real * more - imaginary * more_imaginary,
                real * more_imaginary + imaginary * more,
            )
        last = (
            self.features - 1
        ) // 2  # the zeroth frequency is real, and of an even count the last
        return torch.cat([real, imaginary[..., 1 : last + 1]], -1)

    def directions(self, head_dim: int) -> int:
        return min(self.rank or head_dim, head_dim)

    def count(self, head_dim: int) -> int:
        return self.features

    def feature_macs(self, head_dim: int) -> float:
        columns, frequencies = self.directions(head_dim) + 1, self.features + 2
        if native_features.is_fast(self.degree, self.features):
            # scattered into two sketches, one complex transform of four products per butterfly
            return 2.0 * columns + 2 * self.features * log2(self.features) + 4 * self.features
        return float(self.degree * frequencies * columns + 2 * (self.degree - 1) * frequencies)


@cache
def sketch_maps(degree: int, columns: int, features: int, seed: int) -> Tensor:
    """The count sketches in frequencies, [degree, columns, real and imaginary parts].

    The first holds the weights of the frequencies in an inner product (Parseval).
    """
    buckets, signs = hashes(degree, columns, features, seed)
    sketch = torch.zeros(degree, columns, features, dtype=torch.float64)
    sketch.scatter_(2, buckets[..., None], signs[..., None])
    frequencies = torch.fft.rfft(sketch)
    frequencies[0] *= parseval(features)
    return torch.cat([frequencies.real, frequencies.imag], -1)


@cache
def hashes(degree: int, columns: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """The bucket int64 and the sign of every column, [degree, columns] each."""
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randint(features, (degree, columns), generator=generator)
    return buckets, random_signs(1, degree, columns, seed + 1)[0]


@cache
def parseval(features: int) -> Tensor:
    """Weights of the frequencies whose squares are those of an inner product, float64."""
    weight = torch.full((features // 2 + 1,), 2.0 / features, dtype=torch.float64)
    weight[0] /= 2
    if features % 2 == 0:
        weight[-1] /= 2
    return weight.sqrt()
