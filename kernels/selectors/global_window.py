"""Sliding window with sinks and global tokens at regular distances.

    keep(i, j) = j <= i and (i - j < window or j < sinks or j mod every < width)

Sources: Child et al., Generating Long Sequences with Sparse Transformers,
https://arxiv.org/abs/1904.10509, section 4.2, equation 7 (fixed attention: the summary columns);
Beltagy et al., Longformer, https://arxiv.org/abs/2004.05150, section 3.1 (global tokens). Unlike
the former, the local part slides with the query and the columns open their segment instead of
closing it; unlike the latter, global tokens are seen by all queries but see no more than others do.
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
class GlobalWindow(StaticPattern):
    """Keep sinks, a window, and the first `width` keys of every run of `every` keys."""

    name: ClassVar[str] = "global_window"
    predictor: ClassVar[str] = "vertical_mass"

    window: int
    every: int
    width: int = 8
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1 key, got {self.window}")
        if self.every < 2:
            raise ValueError(f"every must be at least 2 keys, got {self.every}")
        if not 1 <= self.width < self.every:
            raise ValueError(f"width must be 1 to {self.every - 1}, got {self.width}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for window, every in ((32, 128), (64, 128), (128, 256), (128, 64), (256, 64)):
            if 2 * max(window, every) < shape.keys:
                yield cls(window, every)

    def cost(self, shape: AttentionShape) -> Cost:
        beyond = torch.arange(shape.keys - shape.queries, shape.keys) + 1 - self.window
        seen = self._globals(beyond.clamp(min=0))
        seen = seen - self._globals(beyond.clamp(min=0, max=self.sinks))
        pairs = window_pairs(shape, self.window, self.sinks) + int(seen.sum())
        return Cost(2.0 * shape.head_dim * pairs)

    def rule(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j < self.window) | (j < self.sinks) | (j % self.every < self.width)

    def reach(self, first: int, last: int) -> list[tuple[int, int]]:
        runs = [(start, start + self.width) for start in range(0, last + 1, self.every)]
        return [(0, self.sinks), *runs, (first - self.window + 1, last + 1)]

    def _globals(self, keys: Tensor) -> Tensor:
        """Global tokens among the first `keys` keys."""
        whole = keys.div(self.every, rounding_mode="floor")
        return whole * self.width + (keys % self.every).clamp(max=self.width)
