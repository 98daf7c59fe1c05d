"""Sliding window with sinks (initial global tokens).

    keep(i, j) = j <= i and (i - j < window or j < sinks)

Sources: Xiao et al., Efficient Streaming Language Models with Attention Sinks,
https://arxiv.org/abs/2309.17453, section 3.2 (window and sinks); Beltagy et al., Longformer,
https://arxiv.org/abs/2004.05150, section 3.1 (global tokens). Unlike StreamingLLM, keys keep their
original rotary positions; unlike Longformer, global keys are seen by all queries but no query sees
all keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.selectors._static_pattern import StaticPattern, window_pairs


@dataclass(frozen=True)
class Window(StaticPattern):
    """Keep the first `sinks` keys and the last `window` keys of every query."""

    name: ClassVar[str] = "window"
    far_compatible: ClassVar[bool] = True
    predictor: ClassVar[str] = "sink_local_mass"

    window: int
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1 key, got {self.window}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for window in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            if window < shape.keys:
                yield cls(window)
        if shape.keys > 256:
            yield cls(128, 64)

    def tried_with_far(self, shape: AttentionShape) -> bool:
        """As long as it leaves most of the text to the far field."""
        return self.sinks == 4 and 8 * self.window <= shape.keys

    def cost(self, shape: AttentionShape) -> Cost:
        return Cost(2.0 * shape.head_dim * window_pairs(shape, self.window, self.sinks))

    def rule(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j < self.window) | (j < self.sinks)

    def reach(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(0, self.sinks), (first - self.window + 1, last + 1)]

    def whole(self, first: int, last: int) -> tuple[int, int]:
        return last - self.window + 1, first + 1
