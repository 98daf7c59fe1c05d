"""Antidiagonal scoring: blocks are judged by the scores on every `stride`-th antidiagonal.

Keys are summed by residue: with groups of `stride` keys and `stride` queries, the sum of the scores
on the antidiagonal of a group pair is one product of the concatenated keys with the concatenated
queries in reverse. Each query group takes the softmax over its group scores, divided by `stride`; a
block's score is the mass of its groups, summed over the block's query groups.

Source: Xu et al., XAttention: Block Sparse Attention with Antidiagonal Scoring,
https://arxiv.org/abs/2503.16428, section 3.1. Unlike the paper, which keeps blocks up to a
cumulated mass, the `top` best are kept: their number is then known beforehand. Only groups before
the query block compete. Scores are computed in float32; ties go to the earlier block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.approximation import AttentionShape, Inputs
from attnplan.kernels.block_pattern import BlockGrid, ScoredBlocks
from attnplan.kernels.indexing import heads_of, numbers_on
from attnplan.kernels.tile_list import BLOCK

SCORES = 1 << 22
"""Group scores that are held at a time."""


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

    def scores(self, inputs: Inputs, blocks: Tensor) -> Tensor:
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        keys, groups = inputs.key.shape[2], BLOCK // self.stride
        start = numbers_on(inputs.start, blocks.device)
        real = torch.arange(keys, device=blocks.device) >= start[:, None]
        key = inputs.key.to(wide) * real[:, None, :, None]
        key = torch.nn.functional.pad(key, (0, 0, 0, -keys % BLOCK))
        key = key.unflatten(2, (-1, self.stride)).flatten(3)  # [batch, kv_heads, groups, stride d]
        query = inputs.rows(blocks).to(wide).unflatten(2, (-1, self.stride)).flip(3).flatten(3)
        candidates = BlockGrid.of(inputs, blocks).candidates(self.local)[:, 0]
        out = query.new_zeros(*query.shape[:2], len(blocks), key.shape[2] // groups)
        at_once = max(1, SCORES // (query.shape[0] * query.shape[1] * groups * key.shape[2]))
        for first in range(0, len(blocks), at_once):
            part = slice(first, first + at_once)
            rows = query[:, :, first * groups : (first + at_once) * groups]
            logits = rows @ heads_of(key, inputs.kv_head).mT * (inputs.scale / self.stride)
            allowed = candidates[:, part].repeat_interleave(groups, 1)
            allowed = allowed.repeat_interleave(groups, 2)[:, None]
            mass = torch.softmax(logits.masked_fill(~allowed, float("-inf")), -1).nan_to_num()
            mass = mass.unflatten(3, (-1, groups)).sum(4).unflatten(2, (-1, groups)).sum(3)
            out[:, :, part] = mass
        return out

    def score_macs(self, shape: AttentionShape, candidates: int) -> float:
        return float(candidates) * (BLOCK // self.stride) ** 2 * self.stride * shape.head_dim
