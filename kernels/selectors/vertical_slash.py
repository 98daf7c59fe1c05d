"""Vertical-slash: single keys that everybody reads, and block diagonals.

Queries are cut into segments of `segment`. The last `probes` queries before a segment are attended
to exactly; the segment then keeps, besides the sink block (or its `sink_keys` first keys, as
vertical lines) and `local` recent key blocks, the `columns` keys with the largest total probability
(vertical lines, gather tiles) and the `diagonals` block distances with the largest total
probability (slash lines, key blocks). The first segment is dense.

Source: Jiang et al., MInference 1.0, https://arxiv.org/abs/2407.02490, section 3.2 and algorithm 2.
Unlike the paper, which estimates once from the last 64 queries of the prompt, every segment is
estimated from queries before it: nothing of the future leaks into an earlier query. Probabilities
are computed in float32; ties go to the earlier key and the shorter distance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.contracts.selector import Selector
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.indexing import numbers_on
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.tile_list import BLOCK, FULL, GATHER, TileList
from attnplan.kernels.selectors._scored_blocks import BlockGrid, block_tiles
from attnplan.kernels.selectors._static_pattern import causal


@dataclass(frozen=True)
class VerticalSlash(Selector):
    """Keep `columns` single keys and `diagonals` block diagonals, chosen per segment."""

    name: ClassVar[str] = "vertical_slash"
    predictor: ClassVar[str] = "vertical_mass"
    cost_is_bound: ClassVar[bool] = True

    columns: int
    diagonals: int
    local: int = 2
    segment: int = 512
    probes: int = field(default=BLOCK, kw_only=True, metadata=LATER)
    sink_keys: int = field(default=BLOCK, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ValueError(f"columns must be at least 1 key, got {self.columns}")
        if self.diagonals < 0:
            raise ValueError(f"diagonals must not be negative, got {self.diagonals}")
        if self.local < 1:
            raise ValueError(f"local must be at least 1 block, got {self.local}")
        if self.segment < BLOCK or self.segment % BLOCK:
            raise ValueError(f"segment must be a multiple of {BLOCK}, got {self.segment}")
        if not 1 <= self.probes <= self.segment:
            raise ValueError(f"probes must be 1 to segment {self.segment}, got {self.probes}")
        if not 1 <= self.sink_keys <= BLOCK:
            raise ValueError(f"sink_keys must be 1 to {BLOCK} keys, got {self.sink_keys}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for columns, diagonals in ((64, 1), (128, 4)):
            if columns + (diagonals + 3) * BLOCK < shape.keys:
                yield cls(columns, diagonals)
        for columns, diagonals, segment in ((28, 0, 256), (60, 1, 256), (124, 3, 512)):
            if columns + (diagonals + 1) * BLOCK + segment < shape.keys:
                yield cls(columns, diagonals, 1, segment, probes=16, sink_keys=4)

    def near(self, inputs: Inputs, blocks: Tensor, floor: Tensor | None = None) -> TileList:
        grid = BlockGrid.of(inputs, blocks)
        chosen, column = self._choose(inputs, blocks, grid)
        parts = [block_tiles(inputs, blocks, grid, chosen), self._column_tiles(chosen, column)]
        return tile_list.concat(parts)

    def keep(self, inputs: Inputs) -> Tensor:
        blocks = torch.arange(inputs.blocks, device=inputs.query.device)
        grid = BlockGrid.of(inputs, blocks)
        chosen, column = self._choose(inputs, blocks, grid)
        keys = inputs.key.shape[2]
        one_hot = torch.zeros(*column.shape[:3], keys + 1, dtype=torch.bool)
        one_hot.scatter_(-1, torch.where(column < 0, keys, column).cpu(), True)
        wide = one_hot[..., :keys].to(column.device).repeat_interleave(BLOCK, 2)
        lines = wide[:, :, : inputs.query.shape[2]] & causal(inputs)
        return grid.pairs(inputs, chosen) | lines

    def cost(self, shape: AttentionShape) -> Cost:
        """An upper bound where columns fall into kept blocks or diagonals leave the text."""
        row = torch.arange(shape.queries)
        i = row + shape.keys - shape.queries
        first = row // BLOCK * BLOCK + shape.keys - shape.queries
        recent = i + 1 - (first // BLOCK - self.local + 1).clamp(min=0) * BLOCK
        kept = recent + self.diagonals * BLOCK + self.columns + self.sink_keys
        pairs = torch.where(row < self.segment, i + 1, torch.minimum(i + 1, kept))
        segments = range(self.segment, shape.queries, self.segment)
        seen = sum(self.probes * (shape.keys - shape.queries + row) for row in segments)
        return Cost(2.0 * shape.head_dim * float(pairs.sum()), float(seen * shape.head_dim))

    def _choose(self, inputs: Inputs, blocks: Tensor, grid: BlockGrid) -> tuple[Tensor, Tensor]:
        """Key blocks, bool [batch, heads, blocks, key blocks], and single keys, int64
        [batch, heads, blocks, columns], -1 for none; a key is in only one of them."""
        segment = blocks * BLOCK // self.segment
        # padded sequences begin later: they are dense up to the segment of their first token
        begun = numbers_on(inputs.start, blocks.device)[:, None] - inputs.offset
        dense = (segment <= begun.clamp(min=0) // self.segment)[:, None, :, None]
        always = grid.always(self.local)
        if self.sink_keys < BLOCK:
            always = always & ((grid.key_block != grid.sink) | grid.is_recent(self.local))
        chosen = (dense & (grid.key_block <= grid.last) & (grid.key_block >= grid.sink)) | always
        batch, heads = inputs.query.shape[:2]
        chosen = chosen.expand(batch, heads, -1, -1).clone()
        width = self.columns + self.sink_keys % BLOCK
        column = torch.full((batch, heads, len(blocks), width), -1, device=blocks.device)
        for s in sorted(set(segment.tolist()) - {0}):
            here = torch.nonzero(segment == s)[:, 0]
            lines, distance = self._estimate(inputs, s)
            diagonal = grid.first[here].T[:, :, None] - distance[:, :, None, :]  # [b, h, n, D]
            ok = ((diagonal > grid.sink) & ~dense[:, :, here]).to(torch.bool)
            marks = torch.zeros_like(chosen[:, :, here], dtype=torch.int32)
            marks.scatter_add_(-1, diagonal.clamp(min=0), ok.expand_as(diagonal).int())
            chosen[:, :, here] |= marks > 0
            column[:, :, here] = lines[:, :, None].masked_fill(dense[:, :, here], -1)
        covered = torch.gather(chosen, 3, column.clamp(min=0) // BLOCK)
        return chosen, torch.where(covered, -1, column)

    def _estimate(self, inputs: Inputs, segment: int) -> tuple[Tensor, Tensor]:
        """Best keys and sinks [batch, heads, lines], and distances [batch, heads, diagonals]."""
        end = segment * self.segment  # row after the last probe
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        probe = inputs.query[:, :, end - self.probes : end].to(wide)
        seen = inputs.offset + end
        key = inputs.key[:, list(inputs.kv_head), :seen].to(wide)
        i = torch.arange(seen - self.probes, seen, device=key.device)[:, None]
        j = torch.arange(seen, device=key.device)
        start = numbers_on(inputs.start, key.device)[:, None, None, None]
        logits = probe @ key.mT * inputs.scale
        logits = logits.masked_fill(~((j <= i) & (j >= start)), float("-inf"))
        mass = torch.softmax(logits, -1).nan_to_num().sum(2)  # [batch, heads, seen]
        mass = mass.masked_fill(j < start[:, 0], -1.0)
        sinks = start[:, 0] + torch.arange(self.sink_keys % BLOCK, device=key.device)
        first = start[:, 0] + self.sink_keys % BLOCK
        order = torch.sort(mass.masked_fill(j < first, -1.0), descending=True, stable=True).indices
        lines = order[..., : self.columns]
        lines = torch.where(lines < first, -1, lines)
        lines = torch.nn.functional.pad(lines, (0, self.columns - lines.shape[-1]), value=-1)
        lines = torch.cat([lines, sinks.expand(*lines.shape[:2], -1)], -1)
        blocks = torch.nn.functional.pad(mass.clamp(min=0), (0, -seen % BLOCK))
        blocks = blocks.unflatten(-1, (-1, BLOCK)).sum(-1)
        distance = torch.arange(blocks.shape[-1], device=key.device)
        far = blocks.flip(-1).masked_fill(distance < self.local, -1.0)
        best = torch.sort(far, dim=-1, descending=True, stable=True).indices
        return lines, best[..., : self.diagonals]

    def _column_tiles(self, chosen: Tensor, column: Tensor) -> TileList:
        """Gather tiles of the single keys of every query block."""
        batch, heads, count, width = column.shape
        device = column.device
        padded = torch.nn.functional.pad(column, (0, -width % BLOCK), value=-1)
        gather = padded.view(-1, BLOCK)
        words = tile_list.pack_bits(gather >= 0)[:, None].expand(-1, BLOCK)
        used = (gather >= 0).any(1)
        full = (gather >= 0).all(1)
        per_row = padded.shape[-1] // BLOCK
        row = torch.arange(batch * heads * count, device=device).repeat_interleave(per_row)[used]
        index = torch.arange(int(used.sum()), device=device)
        mask = torch.where(full[used], torch.full_like(index, FULL), index)
        tiles = torch.stack([torch.full_like(index, GATHER), index, mask], dim=1)
        return tile_list.from_rows(
            batch, heads, count, row, tiles, gather[used].int(), words[used].contiguous()
        )
