"""Selectors of single keys, alone and beside a far field.

Beside a far field they keep every key since the floor and the sinks, and choose among the keys
between; the far field stands in for the others, and what is chosen leaves it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.approximation import AttentionShape, Cost, Inputs, Selector
from attnplan.kernels.near.window import Window
from attnplan.kernels.pattern import window_pairs
from attnplan.kernels.tile_list import BLOCK, TileList

LEAST = 2048
"""Keys from which a far field beside single keys is worth trying."""


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
        return Window(1, self.sinks).near(inputs, blocks, floor), None

    def chosen_cost(self, shape: AttentionShape, candidates: Tensor) -> Cost:
        pairs = int(self.picked(candidates).sum())
        return Cost(2.0 * shape.head_dim * pairs, self.chosen_macs(shape, candidates))

    def cost_beside(self, shape: AttentionShape) -> Cost:
        return Cost(2.0 * shape.head_dim * window_pairs(shape, self.recent, self.sinks))


def row_floor(inputs: Inputs, blocks: Tensor, floor: Tensor) -> Tensor:
    """The floor of every row of some blocks, int64 [batch, 64 * n]; -1 past the last query."""
    position = inputs.positions(blocks).flatten()
    return torch.where(position >= 0, floor.repeat_interleave(BLOCK, 1), -1)
