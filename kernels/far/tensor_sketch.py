"""Tensor Sketch: hashed products, for the square of 1 + y.x/2.

(a.c)^p is a product of two p-fold tensors. A count sketch C adds entry i of a, with a random sign,
to one of `features` buckets; the sketch of a p-fold tensor is the circular convolution of p count
sketches, which Fourier transforms turn into products:

    g(a) = F^-1 (F C_1 a * ... * F C_p a)     E <g(a), g(c)> = (a.c)^p     a = [1, y/sqrt(p)]

Estimates are signed, so some rows may come out without a positive mass.

Source: Pham and Pagh, Tensor Sketch, https://arxiv.org/abs/2505.08146, section 3. The kernel
(1 + y.x/p)^p, which follows the exponential of the centred, balanced score, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil, log2
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.approximation import Inputs
from attnplan.kernels.feature_map import FeatureMap, Side, random_signs, with_constant


@dataclass(frozen=True)
class TensorSketch(FeatureMap):
    """Sum over far keys by `features` buckets of products of `degree` entries."""

    name: ClassVar[str] = "tensor_sketch"

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
        buckets, signs = hashes(self.degree, rows.shape[-1] + 1, self.features, self.seed)
        buckets, signs = buckets.to(rows.device), signs.to(rows)
        signed = with_constant(rows * self.degree**-0.5)
        product = torch.ones((), dtype=rows.dtype, device=rows.device)
        for bucket, sign in zip(buckets, signs, strict=True):
            sketch = signed.new_zeros(*signed.shape[:-1], self.features)
            sketch.index_add_(-1, bucket, signed * sign)
            product = product * torch.fft.rfft(sketch)
        return torch.fft.irfft(product, n=self.features)

    def count(self, head_dim: int) -> int:
        return self.features

    def feature_macs(self, head_dim: int) -> float:
        transforms = (self.degree + 1) * self.features * ceil(log2(self.features + 1))
        return float(self.degree * (head_dim + 1 + self.features) + transforms)


@cache
def hashes(degree: int, columns: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """The bucket int64 and the sign of every column, [degree, columns] each."""
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randint(features, (degree, columns), generator=generator)
    return buckets, random_signs(1, degree, columns, seed + 1)[0]
