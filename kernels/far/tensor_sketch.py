"""Tensor Sketch: hashed products, for the square of 1 + y.x/2.

(a.c)^p is a product of two p-fold tensors. A count sketch C adds entry i of a, with a random sign,
to one of `features` buckets; the sketch of a p-fold tensor is the circular convolution of p count
sketches, which Fourier transforms turn into products:

    g(a) = F^-1 (F C_1 a * ... * F C_p a)     E <g(a), g(c)> = (a.c)^p     a = [1, y/sqrt(p)]

Inner products are the same before F^-1 (Parseval), so the frequencies are the features.
Estimates are signed, so some rows may come out without a positive mass.

Source: Pham and Pagh, Tensor Sketch, https://arxiv.org/abs/2505.08146. The kernel
(1 + y.x/p)^p, which follows the exponential of the centred, balanced score, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.approximation import Inputs
from attnplan.kernels.feature_map import FeatureMap, Side, random_signs, with_constant
from attnplan.kernels.indexing import alike


@dataclass(frozen=True)
class TensorSketch(FeatureMap):
    """Sum over far keys by `features` buckets of products of `degree` entries."""

    name: ClassVar[str] = "tensor_sketch"
    tried: ClassVar[Mapping[str, int]] = {"features": 128}

    features: int = 256
    degree: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features < 1:
            raise ValueError(f"features must be at least 1, got {self.features}")
        if not 1 <= self.degree <= 4:
            raise ValueError(f"degree must be 1 to 4, got {self.degree}")

    def lift(self, rows: Tensor, side: Side, inputs: Inputs) -> Tensor:
        maps = sketch_maps(self.degree, rows.shape[-1] + 1, self.features, self.seed)
        maps = alike(maps, rows)
        signed = with_constant(rows * self.degree**-0.5)
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

    def count(self, head_dim: int) -> int:
        return self.features

    def feature_macs(self, head_dim: int) -> float:
        columns = self.features + 2
        return float(self.degree * columns * (head_dim + 1) + 2 * (self.degree - 1) * columns)


@cache
def sketch_maps(degree: int, columns: int, features: int, seed: int) -> Tensor:
    """The count sketches in frequencies, [degree, columns, real and imaginary parts].

    The first holds the weights of the frequencies in an inner product (Parseval).
    """
    buckets, signs = hashes(degree, columns, features, seed)
    sketch = torch.zeros(degree, columns, features, dtype=torch.float64)
    sketch.scatter_(2, buckets[..., None], signs[..., None])
    frequencies = torch.fft.rfft(sketch)
    weight = torch.full((frequencies.shape[-1],), 2.0 / features, dtype=torch.float64)
    weight[0] /= 2
    if features % 2 == 0:
        weight[-1] /= 2
    frequencies[0] *= weight.sqrt()
    return torch.cat([frequencies.real, frequencies.imag], -1)


@cache
def hashes(degree: int, columns: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """The bucket int64 and the sign of every column, [degree, columns] each."""
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randint(features, (degree, columns), generator=generator)
    return buckets, random_signs(1, degree, columns, seed + 1)[0]
