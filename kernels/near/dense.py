"""Dense causal attention: every key up to the query. The exact choice, always offered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.approximation import AttentionShape, Cost, Inputs, Selector
from attnplan.kernels.pattern import causal, static_tiles
from attnplan.kernels.tile_list import TileList


@dataclass(frozen=True)
class Dense(Selector):
    """Keep every key up to the query's own position."""

    name: ClassVar[str] = "dense"
    family: ClassVar[str] = "dense"
    static: ClassVar[bool] = True
    predictor: ClassVar[str] = "entropy"

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        yield cls()

    def near(self, inputs: Inputs, blocks: Tensor, floor: Tensor | None = None) -> TileList:
        return static_tiles(inputs, blocks, _everything, lambda first, last: [(0, last + 1)])

    def keep(self, inputs: Inputs) -> Tensor:
        return causal(inputs)

    def cost(self, shape: AttentionShape) -> Cost:
        return Cost(shape.dense_macs)


def _everything(i: Tensor, j: Tensor) -> Tensor:
    return torch.ones_like(i + j, dtype=torch.bool)
