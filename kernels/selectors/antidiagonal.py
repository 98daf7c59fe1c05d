"""Antidiagonal scoring: blocks are judged by the scores on every `stride`-th antidiagonal.

The keys of a block make groups of `stride`, and so do the last `stride` queries up to the query
block's first. The sum of the scores on the antidiagonal of a group pair is one product of the
concatenated keys with the concatenated queries in reverse. The query group takes the softmax over
its group scores, divided by `stride`; a block's score is the mass of its groups, and the mass that
the block's first query gives to it exactly: of the block's own queries only that one is known to
all its rows.

Source: Xu et al., XAttention: Block Sparse Attention with Antidiagonal Scoring,
https://arxiv.org/abs/2503.16428, section 3.1. Unlike the paper, which scores with all query groups
of the block, so that a row depends on later ones, no query after the block's first has a say; and
unlike the paper, which keeps blocks up to a cumulated mass, the `top` best are kept: their number
is then known beforehand. Only blocks before the `local` ones, without the sink block, compete.
Scores are computed in float32; ties go to the earlier block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK
from attnplan.kernels.selectors._scored_blocks import (
    BlockGrid,
    ScoredBlocks,
    asking_queries,
    block_masses,
    first_masses,
)


@dataclass(frozen=True)
class Antidiagonal(ScoredBlocks):
    """Keep the sink block, `local` recent blocks, and the `top` with most antidiagonal mass."""

    name: ClassVar[str] = "antidiagonal"
    predictor: ClassVar[str] = "top_block_mass_4"

    stride: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1 or BLOCK % self.stride:
            raise ValueError(f"stride must divide {BLOCK}, got {self.stride}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for setting in super().choices(shape):
            cheap = setting.sink_keys < BLOCK
            yield replace(setting, stride=2 * setting.stride) if cheap else setting

    def scores(self, inputs: Inputs, blocks: Tensor) -> Tensor:
        asking, _ = asking_queries(inputs, blocks, self.stride)
        backwards = asking.flip(3).flatten(3) * (inputs.scale / self.stride)
        key = inputs.key[:, :, : inputs.key.shape[2] // BLOCK * BLOCK].to(asking.dtype)
        grouped = key.unflatten(2, (-1, self.stride)).flatten(3)  # [batch, kv_heads, groups, dim]
        sums = block_masses(backwards, grouped, inputs.kv_head, BLOCK // self.stride)
        exact = first_masses(inputs, blocks)
        candidates = BlockGrid.of(inputs, blocks).candidates(self.local)
        sums = torch.nn.functional.pad(sums, (0, exact.shape[3] - sums.shape[3]))
        return _shares(sums, candidates) + _shares(exact, candidates)

    def score_macs(self, shape: AttentionShape, candidates: int) -> float:
        return 2.0 * candidates * BLOCK * shape.head_dim


def _shares(masses: Tensor, candidates: Tensor) -> Tensor:
    """Logarithms of masses of key blocks as shares of all candidates; 0 for other blocks."""
    return torch.softmax(masses.masked_fill(~candidates, float("-inf")), -1).nan_to_num()
