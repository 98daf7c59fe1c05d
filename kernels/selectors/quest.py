"""Quest: every query block reads the key blocks that could hold its largest scores.

Of every key block the smallest and the largest value of each channel are known; no key of the block
can score more with a query q than

    score(J) = sum_c max(q_c min_J,c, q_c max_J,c)

Source: Tang et al., Quest: Query-Aware Sparsity, https://arxiv.org/abs/2406.10774, section 3.2.
Unlike the paper, which selects for one decoded query, q is the mean of the 16 queries up to the
first of a block of 64, so that no row depends on a later one; key blocks hold 64 keys. Scores are
computed in float32; ties go to the earlier block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.operands.indexing import heads_of, numbers_on
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK
from attnplan.kernels.selectors._scored_blocks import ASKING, ScoredBlocks, pooled_queries


@dataclass(frozen=True)
class Quest(ScoredBlocks):
    """Keep the sink block, `local` recent blocks, and the `top` blocks of the largest bounds."""

    name: ClassVar[str] = "quest"
    predictor: ClassVar[str] = "top_block_mass_4"
    settings_with_far: ClassVar[tuple[tuple[int, int], ...]] = ((4, 2),)

    def scores(self, inputs: Inputs, blocks: Tensor) -> Tensor:
        low, high = (heads_of(bound, inputs.kv_head).mT for bound in _bounds(inputs))
        query = pooled_queries(inputs, blocks)
        return query.clamp(min=0) @ high + query.clamp(max=0) @ low

    def score_macs(self, shape: AttentionShape, candidates: int) -> float:
        asking = shape.queries * ASKING / BLOCK
        pooling = (asking + 2 * shape.keys / shape.group) * shape.head_dim
        return 2.0 * candidates * shape.head_dim + pooling


def _bounds(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Smallest and largest key channels, [batch, kv_heads, key blocks, head_dim].

    Padding is left out; a block of padding alone has bounds 0.
    """
    keys = inputs.key.shape[2]
    wide = torch.promote_types(inputs.key.dtype, torch.float32)
    start = numbers_on(inputs.start, inputs.key.device)[:, None]
    real = (torch.arange(keys, device=start.device) >= start)[:, None, :, None]
    bounds = []
    for fill, largest in ((float("inf"), False), (float("-inf"), True)):
        rows = inputs.key.to(wide).masked_fill(~real, fill)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -keys % BLOCK), value=fill)
        rows = rows.unflatten(2, (-1, BLOCK))
        bound = rows.amax(3) if largest else rows.amin(3)
        bounds.append(torch.where(bound.isfinite(), bound, 0.0))
    return bounds[0], bounds[1]
