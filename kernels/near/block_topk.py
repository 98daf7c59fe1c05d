"""Block top-k: every query block reads the key blocks whose mean key it agrees with most.

Queries and keys are pooled by blocks of 64. A query block keeps the first key block (sinks), its
own and the `local - 1` blocks before it, and of the rest the `top` blocks J with the largest
mean(q) . mean(K_J).

Sources: Jiang et al., MInference 1.0, https://arxiv.org/abs/2407.02490, section 3.2 (block-sparse
heads); Lu et al., MoBA, https://arxiv.org/abs/2502.13189, section 2.2 (its gate, per query). Scores
are computed in float32; ties go to the earlier block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.approximation import AttentionShape, Cost, Inputs, Selector
from attnplan.kernels.block_pattern import BlockGrid, block_tiles, pooled_keys, pooled_queries
from attnplan.kernels.tile_list import BLOCK, TileList


@dataclass(frozen=True)
class BlockTopK(Selector):
    """Keep the sink block, `local` recent key blocks, and the `top` best-scoring others."""

    name: ClassVar[str] = "block_topk"
    predictor: ClassVar[str] = "top_block_mass_4"

    top: int
    local: int = 2

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top must be at least 1 block, got {self.top}")
        if self.local < 1:
            raise ValueError(f"local must be at least 1 block, got {self.local}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for top, local in ((2, 2), (4, 2), (8, 2), (8, 4), (16, 4), (32, 4)):
            if (top + local + 1) * BLOCK < shape.keys:
                yield cls(top, local)

    def near(self, inputs: Inputs, blocks: Tensor, floor: Tensor | None = None) -> TileList:
        grid = BlockGrid.of(inputs, blocks)
        chosen = self._chosen(inputs, blocks, grid)
        return block_tiles(inputs, blocks, grid, chosen | grid.always(self.local))

    def keep(self, inputs: Inputs) -> Tensor:
        blocks = torch.arange(inputs.blocks, device=inputs.query.device)
        grid = BlockGrid.of(inputs, blocks)
        return grid.pairs(inputs, self._chosen(inputs, blocks, grid) | grid.always(self.local))

    def cost(self, shape: AttentionShape) -> Cost:
        query_block = torch.arange(-(-shape.queries // BLOCK))
        own = (shape.keys - shape.queries + query_block * BLOCK) // BLOCK
        candidates = (own - self.local).clamp(min=0)
        rows = (shape.queries - query_block * BLOCK).clamp(max=BLOCK)
        far = int(((candidates.clamp(max=self.top)) * rows).sum()) * BLOCK
        i = torch.arange(shape.keys - shape.queries, shape.keys)
        first = (i + shape.queries - shape.keys) // BLOCK * BLOCK + shape.keys - shape.queries
        local_start = (first // BLOCK - self.local + 1).clamp(min=0) * BLOCK
        near = int((i + 1 - local_start + (local_start > 0) * BLOCK).sum())
        scores = float(candidates.sum()) * shape.head_dim
        pooling = (shape.queries + shape.keys / shape.group) * shape.head_dim
        return Cost(2.0 * shape.head_dim * (near + far), scores + pooling)

    def _chosen(self, inputs: Inputs, blocks: Tensor, grid: BlockGrid) -> Tensor:
        """Bool [batch, heads, len(blocks), key blocks]."""
        keys = pooled_keys(inputs)[:, list(inputs.kv_head)]  # [batch, heads, key blocks, head_dim]
        scores = pooled_queries(inputs, blocks) @ keys.mT
        candidates = grid.candidates(self.local)
        scores = scores.masked_fill(~candidates, float("-inf"))
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., : self.top]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
        return chosen & candidates
