"""Selectors of single keys, alone and beside a far field.

Beside a far field they keep every key since the floor and the sinks, and choose among the keys
between; the far field stands in for the others, and what is chosen leaves it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.selector import Selector
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.tile_list import BLOCK, TileList
from attnplan.kernels.selectors._static_pattern import StaticPattern, window_pairs


class SingleKeys(Selector):
    """A selector that reads single keys of the past, and recent keys."""

    picks_keys: ClassVar[bool] = True
    sinks: int

    @abstractmethod
    def chosen(self, inputs: Inputs, blocks: Tensor, floor: Tensor) -> Tensor: ...

    @abstractmethod
    def chosen_macs(self, shape: AttentionShape, candidates: Tensor) -> float:
        """Multiply-adds of choosing, where every query chooses among `candidates` keys."""

    @abstractmethod
    def picked(self, candidates: Tensor) -> Tensor: ...

    def beside(
        self, inputs: Inputs, blocks: Tensor, floor: Tensor, chunk: int
    ) -> tuple[TileList, Tensor | None]:
        return SinceFloor(self.sinks).near(inputs, blocks, floor), None

    def chosen_cost(self, shape: AttentionShape, candidates: Tensor) -> Cost:
        pairs = int(self.picked(candidates).sum())
        return Cost(2.0 * shape.head_dim * pairs, self.chosen_macs(shape, candidates))

    def cost_beside(self, shape: AttentionShape) -> Cost:
        return Cost(2.0 * shape.head_dim * window_pairs(shape, self.recent, self.sinks))


@dataclass(frozen=True)
class SinceFloor(StaticPattern):
    """Sinks, and every key since the floor."""

    name: ClassVar[str] = "since_floor"
    predictor: ClassVar[str] = "sink_local_mass"

    sinks: int

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        """None: it is a part of other methods."""
        return iter(())

    def rule(self, i: Tensor, j: Tensor) -> Tensor:
        return (j == i) | (j < self.sinks)

    def reach(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(0, self.sinks), (first, last + 1)]

    def cost(self, shape: AttentionShape) -> Cost:
        return Cost(2.0 * shape.head_dim * window_pairs(shape, 1, self.sinks))


def row_floor(inputs: Inputs, blocks: Tensor, floor: Tensor) -> Tensor:
    """The floor of every row of some blocks, int64 [batch, 64 * n]; -1 past the last query."""
    position = inputs.positions(blocks).flatten()
    return torch.where(position >= 0, floor.repeat_interleave(BLOCK, 1), -1)
