"""Mixture of block attention: every query reads the key blocks whose mean key it agrees with most.

A query keeps its own key block up to itself, the sinks, and of the blocks before its own the `top`
blocks J with the largest q . mean(K_J). Blocks are runs of 64 absolute positions; a query block
reads the union of what its rows chose, and masks say which row reads what.

Source: Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs,
https://arxiv.org/abs/2502.13189, section 2.2. Unlike the paper, where `top` counts the own block,
models are not trained with it, which is why the sinks are always kept (`sinks: 0` is the paper's
form). Scores are computed in float32; ties go to the earlier block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.knobs import LEAST
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.indexing import numbers_on
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.tile_list import BLOCK, CONTIGUOUS, FULL, TileList
from attnplan.kernels.selectors._scored_blocks import pooled_keys
from attnplan.kernels.selectors._single_keys import SingleKeys, row_floor
from attnplan.kernels.selectors._static_pattern import causal, relative_positions
from attnplan.kernels.selectors._top_tokens import top_tokens


@dataclass(frozen=True)
class MoBA(SingleKeys):
    """Keep sinks, the query's own key block, and its `top` best-scoring earlier blocks."""

    name: ClassVar[str] = "moba"
    predictor: ClassVar[str] = "top_block_mass_4"
    cost_is_bound: ClassVar[bool] = True

    top: int
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top must be at least 1 block, got {self.top}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for top in (1, 2, 4, 7, 14):
            if (top + 2) * BLOCK < shape.keys:
                yield cls(top)

    def near(self, inputs: Inputs, blocks: Tensor, floor: Tensor | None = None) -> TileList:
        own = inputs.positions(blocks).flatten() // BLOCK
        best = self._chosen(inputs, blocks, own.expand(len(inputs.start), -1))
        chosen = best.unflatten(2, (len(blocks), BLOCK))
        own = inputs.positions(blocks) // BLOCK  # [blocks, 64], -1 past the last query
        listed = self._listed(inputs, chosen, own)
        b, h, row, tile = torch.nonzero(listed, as_tuple=True)
        number = torch.full(listed.shape, -1, device=listed.device)
        number[b, h, row, tile] = torch.arange(len(tile), device=listed.device)
        reads = torch.zeros(len(tile), BLOCK, dtype=torch.bool, device=listed.device)
        in_b, in_h, in_row, query, _ = at = torch.nonzero(chosen >= 0, as_tuple=True)
        reads[number[in_b, in_h, in_row, chosen[at].long()], query] = True

        words = self._row_words(inputs, inputs.positions(blocks)[row], b, tile, reads)
        full = ((words == -1) | (own[row] < 0)).all(1)
        some = words.ne(0).any(1)
        mask = torch.where(full, FULL, (~full & some).cumsum(0) - 1)
        tiles = torch.stack([torch.full_like(mask, CONTIGUOUS), tile, mask], dim=1)
        batch, heads, count, _ = listed.shape
        rows = (b * heads + h) * count + row
        gather = torch.zeros(0, BLOCK, dtype=torch.int32, device=mask.device)
        masks = words[~full & some]
        return tile_list.from_rows(batch, heads, count, rows[some], tiles[some], gather, masks)

    @property
    def recent(self) -> int:
        return 1  # beside a far field, which ends where a chunk does

    def chosen(self, inputs: Inputs, blocks: Tensor, floor: Tensor) -> Tensor:
        end = row_floor(inputs, blocks, floor)
        best = self._chosen(inputs, blocks, end.clamp(min=0) // BLOCK)
        tokens = best[..., None] * BLOCK + torch.arange(BLOCK, device=best.device)
        first = numbers_on(inputs.start, best.device)[:, None, None, None, None] + self.sinks
        there = (best[..., None] >= 0) & (tokens >= first)
        return torch.where(there, tokens, -1).flatten(3).to(torch.int32)

    def keep(self, inputs: Inputs) -> Tensor:
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        means = pooled_keys(inputs)[:, list(inputs.kv_head)]
        scores = inputs.query.to(wide) @ means.mT
        i, j = (x.flatten(1) for x in relative_positions(inputs))
        start = numbers_on(inputs.start, i.device)[:, None]
        own = (i + start) // BLOCK  # [batch, queries]
        block = torch.arange(means.shape[2], device=i.device)
        earlier = (block >= start[:, :, None] // BLOCK) & (block < own[:, :, None])
        scores = scores.masked_fill(~earlier[:, None], float("-inf"))
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., : self.top]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
        chosen = (chosen & earlier[:, None]) | (block == own[:, :, None])[:, None]
        wide_blocks = chosen.repeat_interleave(BLOCK, -1)[..., : inputs.key.shape[2]]
        return (wide_blocks | (j < self.sinks)[:, None, None]) & causal(inputs)

    def cost(self, shape: AttentionShape) -> Cost:
        """An upper bound: the sinks may be in a chosen block."""
        i = torch.arange(shape.keys - shape.queries, shape.keys)
        earlier = i // BLOCK
        blocks = int(earlier.clamp(max=self.top).sum())
        sinks = int((earlier * BLOCK).clamp(max=self.sinks)[earlier > self.top].sum())
        pairs = blocks * BLOCK + int((i % BLOCK + 1).sum()) + sinks
        scoring = float(earlier.sum()) + shape.keys / shape.group
        return Cost(2.0 * shape.head_dim * pairs, scoring * shape.head_dim)

    def picked(self, candidates: Tensor) -> Tensor:
        return candidates.clamp(max=self.top * BLOCK)

    def chosen_macs(self, shape: AttentionShape, candidates: Tensor) -> float:
        scoring = float(candidates.sum()) / BLOCK + shape.keys / shape.group
        return scoring * shape.head_dim

    def tried_with_far(self, shape: AttentionShape) -> bool:
        return shape.keys >= LEAST and self.top in (2, 4)

    def _chosen(self, inputs: Inputs, blocks: Tensor, high: Tensor) -> Tensor:
        """The chosen key blocks of every row, int32 [batch, heads, 64 * len(blocks), top].

        A row chooses among the blocks before `high`, int64 [batch, 64 * len(blocks)].
        """
        first = numbers_on(inputs.start, high.device)[:, None] // BLOCK
        return top_tokens(
            inputs.rows(blocks),
            pooled_keys(inputs),
            kv_head=inputs.kv_head,
            low=first.expand_as(high),
            high=high,
            top=self.top,
        )

    def _listed(self, inputs: Inputs, chosen: Tensor, own: Tensor) -> Tensor:
        """The key blocks that some row of a query block may read.

        Args:
            inputs: the call.
            chosen: [batch, heads, blocks, 64, top], -1 for none.
            own: key block of every row, [blocks, 64], -1 past the last query.

        Returns:
            bool [batch, heads, blocks, key blocks].
        """
        _, sinks = self._words(inputs)
        count = sinks.shape[1]
        size = (*chosen.shape[:3], count + 1)  # the last column takes what is none
        listed = torch.zeros(size, dtype=torch.bool, device=own.device)
        for read in (chosen.flatten(3).long(), own.expand(*size[:2], -1, -1)):
            listed.scatter_(3, torch.where(read < 0, count, read), True)
        reached = torch.arange(count, device=own.device) <= own.amax(1, keepdim=True)
        return listed[..., :count] | ((sinks != 0)[:, None] & reached)[:, None]

    def _row_words(
        self, inputs: Inputs, position: Tensor, batch: Tensor, tile: Tensor, reads: Tensor
    ) -> Tensor:
        """What every row reads of its tiles, int64 [tiles, 64].

        Args:
            inputs: the call.
            position: of the rows, [tiles, 64], -1 past the last query.
            batch: batch row of each tile.
            tile: key block of each tile.
            reads: which rows chose the block, [tiles, 64].
        """
        real, sinks = (words[batch, tile][:, None] for words in self._words(inputs))
        ramp = torch.arange(BLOCK, device=tile.device)
        up_to = tile_list.pack_bits(ramp <= ramp[:, None])  # word n has the bits 0 to n set
        own, tile = position // BLOCK, tile[:, None]
        past = torch.where(reads, real, sinks)
        local = up_to[position % BLOCK] & real
        return torch.where(tile < own, past, torch.where(tile == own, local, 0))

    def _words(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Bits of the real keys and of the sinks of every key block, int64 [batch, key blocks]."""
        device = inputs.key.device
        start = numbers_on(inputs.start, device)[:, None]
        position = torch.arange(-(-inputs.key.shape[2] // BLOCK) * BLOCK, device=device)
        real = position >= start
        sinks = real & (position < start + self.sinks)
        pack = tile_list.pack_bits
        return pack(real.unflatten(1, (-1, BLOCK))), pack(sinks.unflatten(1, (-1, BLOCK)))
