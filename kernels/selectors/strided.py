"""Strided and dilated windows: a local window, and every `stride`-th key before it.

    keep(i, j) = j <= i and (i - j < window or j < sinks
                             or ((i - j) mod stride == 0 and i - j < span))

Sources: Child et al., Generating Long Sequences with Sparse Transformers,
https://arxiv.org/abs/1904.10509, section 4.2, equation 6 (strided: span = the whole text);
Beltagy et al., Longformer, https://arxiv.org/abs/2004.05150, section 3.1 (dilated: a short span).
Unlike the Sparse Transformer, both patterns belong to one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.selectors._static_pattern import StaticPattern, window_pairs


@dataclass(frozen=True)
class Strided(StaticPattern):
    """Keep sinks, a window, and every `stride`-th key among the last `span`."""

    name: ClassVar[str] = "strided"
    predictor: ClassVar[str] = "slash_mass"

    window: int
    stride: int
    span: int
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1 key, got {self.window}")
        if self.stride < 2:
            raise ValueError(f"stride must be at least 2 keys, got {self.stride}")
        if self.span < self.window:
            raise ValueError(f"span must be at least the window {self.window}, got {self.span}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for window, stride, span in (
            *((64, 4, 1024), (32, 16, shape.keys), (64, 16, shape.keys)),
            *((128, 8, shape.keys), (256, 8, shape.keys)),
        ):
            if window < span <= shape.keys:
                yield cls(window, stride, span)

    def cost(self, shape: AttentionShape) -> Cost:
        i = torch.arange(shape.keys - shape.queries, shape.keys)
        furthest = torch.minimum(i - self.sinks, torch.tensor(self.span - 1))
        strided = furthest.div(self.stride, rounding_mode="floor")
        strided = strided - (self.window - 1) // self.stride
        pairs = window_pairs(shape, self.window, self.sinks) + int(strided.clamp(min=0).sum())
        return Cost(2.0 * shape.head_dim * pairs)

    def rule(self, i: Tensor, j: Tensor) -> Tensor:
        distance = i - j
        strided = (distance % self.stride == 0) & (distance < self.span)
        return (distance < self.window) | (j < self.sinks) | strided

    def reach(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(0, self.sinks), (first - self.span + 1, last + 1)]
