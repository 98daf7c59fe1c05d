"""Dense causal attention: every key up to the query. The exact choice, always offered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.selectors._static_pattern import StaticPattern


@dataclass(frozen=True)
class Dense(StaticPattern):
    """Keep every key up to the query's own position."""

    name: ClassVar[str] = "dense"
    family: ClassVar[str] = "dense"
    predictor: ClassVar[str] = "entropy"

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        yield cls()

    def cost(self, shape: AttentionShape) -> Cost:
        return Cost(shape.dense_macs)

    def rule(self, i: Tensor, j: Tensor) -> Tensor:
        return torch.ones_like(i + j, dtype=torch.bool)

    def reach(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(0, last + 1)]

    def whole(self, first: int, last: int) -> tuple[int, int]:
        return 0, first + 1
