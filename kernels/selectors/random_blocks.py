"""Random blocks beside a window and sinks.

    keep(i, j) = j <= i and (i - j < window or j < sinks or block(j) in R(block(i)))

R(I) holds up to `blocks` key blocks before block I, drawn once and for all from the seed and I.

Source: Zaheer et al., Big Bird, https://arxiv.org/abs/2007.14062, section 2. Unlike the paper, keys
after the query are never read, global tokens are the sinks, and the window counts keys. A model
that was not trained with it gains little from random blocks: the entry shows how little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.operands.indexing import generator
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.tile_list import BLOCK
from attnplan.kernels.selectors._static_pattern import StaticPattern


@dataclass(frozen=True)
class RandomBlocks(StaticPattern):
    """Keep sinks, a window, and up to `blocks` random earlier key blocks per query block."""

    name: ClassVar[str] = "random_blocks"
    predictor: ClassVar[str] = "sink_local_mass"

    window: int
    blocks: int
    sinks: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1 key, got {self.window}")
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for window, blocks in ((32, 1), (128, 1), (128, 3), (128, 6), (256, 11)):
            if window + 2 * blocks * BLOCK < shape.keys:
                yield cls(window, blocks)

    def rule(self, i: Tensor, j: Tensor) -> Tensor:
        count = int(i.max().clamp(min=0)) // BLOCK + 1
        table = torch.zeros(count, count, dtype=torch.bool)
        for block in range(count):
            table[block, list(_drawn(block, self.blocks, self.seed))] = True
        table = table.to(i.device)
        # negative positions are padding, later ones not causal: what is said of them is not used
        query, key = (p.clamp(min=0, max=count * BLOCK - 1) // BLOCK for p in (i, j))
        return (i - j < self.window) | (j < self.sinks) | table[query, key]

    def reach(self, first: int, last: int) -> list[tuple[int, int]]:
        runs = [(0, self.sinks), (first - self.window + 1, last + 1)]
        for block in range(first // BLOCK, last // BLOCK + 1):
            drawn = _drawn(block, self.blocks, self.seed)
            runs += [(key * BLOCK, (key + 1) * BLOCK) for key in drawn]
        return runs

    def cost(self, shape: AttentionShape) -> Cost:
        pairs = 0
        for i in range(shape.keys - shape.queries, shape.keys):
            near = max(i - self.window + 1, 0)  # first key of the window
            pairs += i + 1 - near + min(self.sinks, near)
            for block in _drawn(i // BLOCK, self.blocks, self.seed):
                low, high = max(block * BLOCK, self.sinks), min((block + 1) * BLOCK, near)
                pairs += max(high - low, 0)
        return Cost(2.0 * shape.head_dim * pairs)


@lru_cache(maxsize=65536)
def _drawn(block: int, count: int, seed: int) -> tuple[int, ...]:
    """Up to `count` different blocks before `block`."""
    drawn = torch.randperm(block, generator=generator(seed, block))[:count]
    return tuple(sorted(drawn.tolist()))
