"""Block-granular patterns: which key blocks of 64 each query block reads.

Key blocks are runs [64 J, 64 J + 64) of absolute positions. With padding, the first block of a
sequence is the one that holds its first real token.

Beside a far field, its chunks are chosen instead of blocks: a chunk is near as a whole, or left to
the far field as a whole. The first chunk begins with the first block and is always near, so that no
summary holds padding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels import tile_list
from attnplan.kernels.approximation import AttentionShape, Cost, Inputs, Selector
from attnplan.kernels.indexing import heads_of, numbers_on
from attnplan.kernels.pattern import causal, window_pairs
from attnplan.kernels.tile_list import BLOCK, CONTIGUOUS, FULL, TileList
from attnplan.kernels.token_selection import best


@dataclass(frozen=True)
class BlockGrid:
    """Where query blocks stand among key blocks.

    Attributes:
        key_block: int64 [key blocks], 0, 1, 2, ...
        first: int64 [blocks, 1], key block of each query block's first query.
        last: int64 [blocks, 1], key block of its last query.
        sink: int64 [batch, 1, 1, 1], key block of the first real token.
    """

    key_block: Tensor
    first: Tensor
    last: Tensor
    sink: Tensor

    @classmethod
    def of(cls, inputs: Inputs, blocks: Tensor, device: torch.device | None = None) -> Self:
        device = inputs.query.device if device is None else device
        queries, keys = inputs.query.shape[2], inputs.key.shape[2]
        begin = blocks * BLOCK + inputs.offset
        end = torch.clamp(begin + BLOCK, max=inputs.offset + queries) - 1
        return cls(
            torch.arange(-(-keys // BLOCK), device=device),
            (begin // BLOCK)[:, None],
            (end // BLOCK)[:, None],
            numbers_on(inputs.start, device)[:, None, None, None] // BLOCK,
        )

    def always(self, local: int) -> Tensor:
        """The sink block and `local` recent blocks, bool [batch, 1, blocks, key blocks]."""
        recent = (self.key_block > self.first - local) & (self.key_block <= self.last)
        sink = (self.key_block == self.sink) & (self.key_block <= self.last)
        return (recent & (self.key_block >= self.sink)) | sink

    def candidates(self, local: int) -> Tensor:
        """Blocks between the sink block and the recent ones, same shape as `always`."""
        return (self.key_block > self.sink) & (self.key_block <= self.first - local)

    def by_chunk(self, scores: Tensor, blocks: int) -> Tensor:
        """The best score of every chunk of `blocks` key blocks, [..., key blocks] to [..., chunks].

        Chunks begin at the sink block; the last may be cut off, and its score means nothing then.
        """
        count = len(self.key_block)
        index = self.sink + torch.arange(-(-count // blocks) * blocks, device=scores.device)
        index = index.clamp(max=count - 1).expand(*scores.shape[:3], -1)
        return scores.gather(3, index).unflatten(3, (-1, blocks)).amax(4)

    def by_block(self, chunks: Tensor, blocks: int) -> Tensor:
        """Chosen chunks as chosen key blocks, bool [..., chunks] to [..., key blocks]."""
        after = self.key_block - self.sink
        index = (after.clamp(min=0) // blocks).expand(*chunks.shape[:3], -1)
        return chunks.gather(3, index) & (after >= 0)

    def pairs(self, inputs: Inputs, chosen: Tensor) -> Tensor:
        """Block choices as a mask [batch, heads, queries, keys]: tests only."""
        queries, keys = inputs.query.shape[2], inputs.key.shape[2]
        wide = chosen.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
        return wide[:, :, :queries, :keys] & causal(inputs)


def block_tiles(inputs: Inputs, blocks: Tensor, grid: BlockGrid, chosen: Tensor) -> TileList:
    """Tile list of chosen key blocks, bool [batch, heads, blocks, key blocks].

    Three blocks of a row may be cut by the diagonal, the end of the text or padding: those of its
    first and last query, and the sink block. They get causal masks, all others are full tiles.
    """
    chosen = chosen.expand(-1, inputs.query.shape[1], -1, -1)
    batch, heads, count, _ = chosen.shape
    b, h, row, tile = torch.nonzero(chosen, as_tuple=True)
    cut = torch.stack(
        [
            grid.first.T.expand(batch, count),
            grid.last.T.expand(batch, count),
            grid.sink[:, 0, 0].expand(batch, count),
        ],
        dim=-1,
    )  # [batch, blocks, 3]
    is_cut = tile[:, None] == cut[b, row]  # [tiles, 3]
    mask = (b * count + row) * 3 + is_cut.int().argmax(1)
    mask = torch.where(is_cut.any(1), mask, FULL)
    tiles = torch.stack([torch.full_like(tile, CONTIGUOUS), tile, mask], dim=1)
    rows = (b * heads + h) * count + row
    gather = torch.zeros(0, BLOCK, dtype=torch.int32, device=chosen.device)
    masks = block_words(inputs, blocks, cut)
    return tile_list.from_rows(batch, heads, count, rows, tiles, gather, masks)


def block_words(inputs: Inputs, blocks: Tensor, tiles: Tensor) -> Tensor:
    """Causal mask words of some key blocks per row, int64 [batch * blocks * n, 64]."""
    within = torch.arange(BLOCK, device=tiles.device)
    i = (blocks[:, None] * BLOCK + within)[None, :, None, :, None] + inputs.offset
    j = tiles[..., None, None] * BLOCK + within  # [batch, blocks, n, 1, 64]
    start = numbers_on(inputs.start, tiles.device)[:, None, None, None, None]
    keep = (j <= i) & (j >= start) & (i < inputs.key.shape[2])
    return tile_list.pack_bits(keep).flatten(0, 2)


def pooled_keys(inputs: Inputs) -> Tensor:
    """Mean key of every key block, padding left out, [batch, kv_heads, key blocks, head_dim].

    float32, or float64 for float64 inputs.
    """
    keys = inputs.key.shape[2]
    position = torch.arange(keys, device=inputs.key.device)
    real = position >= numbers_on(inputs.start, position.device)[:, None]
    return _block_means(inputs.key, real[:, None, :, None])


def pooled_queries(inputs: Inputs, blocks: Tensor) -> Tensor:
    """Mean query of some query blocks, [batch, heads, len(blocks), head_dim]."""
    real = inputs.positions(blocks)  # [blocks, 64]
    start = numbers_on(inputs.start, blocks.device)[:, None, None]
    real = (real >= start).flatten(1)  # padding rows have position -1 or lie before start
    return _block_means(inputs.rows(blocks), real[:, None, :, None])


def _block_means(rows: Tensor, real: Tensor) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    rows, real = rows.to(wide) * real, real.to(wide).expand(rows.shape[0], 1, rows.shape[2], 1)
    pad = (0, 0, 0, -rows.shape[2] % BLOCK)
    rows = torch.nn.functional.pad(rows, pad).unflatten(2, (-1, BLOCK)).sum(3)
    count = torch.nn.functional.pad(real, pad).unflatten(2, (-1, BLOCK)).sum(3)
    return rows / count.clamp(min=1)


@dataclass(frozen=True)
class ScoredBlocks(Selector):
    """Keep the sink block, `local` recent key blocks, and the `top` best-scoring others.

    A subclass says how a query block scores a key block. Ties go to the earlier block. Beside a far
    field `top` is rounded up to whole chunks, and the score of a chunk is that of its best block.
    """

    keeps_chunks: ClassVar[bool] = True
    settings: ClassVar[tuple[tuple[int, int], ...]] = ((4, 2), (16, 4))
    """(top, local) worth trying."""
    settings_with_far: ClassVar[tuple[tuple[int, int], ...]] = ()
    """Those that are worth trying with a far field too."""

    top: int
    local: int = 2

    def __post_init__(self) -> None:
        if self.top < 0:
            raise ValueError(f"top must not be negative, got {self.top}")
        if self.local < 1:
            raise ValueError(f"local must be at least 1 block, got {self.local}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for top, local in cls.settings:
            if (top + local + 1) * BLOCK < shape.keys:
                yield cls(top, local)

    def tried_with_far(self, shape: AttentionShape) -> bool:
        return (self.top, self.local) in self.settings_with_far

    @abstractmethod
    def scores(self, inputs: Inputs, blocks: Tensor) -> Tensor:
        """Score of every key block, [batch, heads, len(blocks), key blocks], at least float32."""

    @classmethod
    def layer_scores(
        cls, selectors: Sequence[Self], inputs: Inputs, heads: tuple[int, ...]
    ) -> Tensor:
        """`scores` of some heads of `inputs` with a selector each, for all query blocks.

        A method whose scores do not depend on settings, or need no copy of queries, overrides this.
        """
        groups: dict[Self, list[int]] = {}
        for place, selector in enumerate(selectors):
            groups.setdefault(selector, []).append(place)
        order = [place for places in groups.values() for place in places]
        blocks = inputs.all_blocks
        parts = [
            selector.scores(inputs.heads(tuple(heads[place] for place in places)), blocks)
            for selector, places in groups.items()
        ]
        return heads_of(torch.cat(parts, 1), [order.index(place) for place in range(len(order))])

    @abstractmethod
    def score_macs(self, shape: AttentionShape, candidates: int) -> float:
        """Multiply-adds of the scores of one head, over `candidates` (query, key) block pairs."""

    def near(self, inputs: Inputs, blocks: Tensor, floor: Tensor | None = None) -> TileList:
        grid = BlockGrid.of(inputs, blocks)
        chosen = self._chosen(inputs, blocks, grid)
        return block_tiles(inputs, blocks, grid, chosen | grid.always(self.local))

    @property
    def recent(self) -> int:
        return (self.local - 1) * BLOCK + 1

    def beside(
        self, inputs: Inputs, blocks: Tensor, floor: Tensor, chunk: int
    ) -> tuple[TileList, Tensor | None]:
        grid = BlockGrid.of(inputs, blocks)
        each = chunk // BLOCK
        scores = grid.by_chunk(self.scores(inputs, blocks), each)
        number = torch.arange(scores.shape[3], device=scores.device)
        end = floor[:, None, :, None] // BLOCK
        is_far = number < (end - grid.sink) // each
        kept = best(scores, is_far & (number > 0), -(-self.top // each))
        kept = kept | (is_far & (number == 0))
        local = (grid.key_block >= end) & (grid.key_block <= grid.last)
        return block_tiles(inputs, blocks, grid, grid.by_block(kept, each) | local), kept

    def kept_chunks(self, chunks: Tensor, chunk: int) -> Tensor:
        return chunks.clamp(max=1 + -(-self.top * BLOCK // chunk))

    def keep(self, inputs: Inputs) -> Tensor:
        blocks = torch.arange(inputs.blocks, device=inputs.query.device)
        grid = BlockGrid.of(inputs, blocks)
        return grid.pairs(inputs, self._chosen(inputs, blocks, grid) | grid.always(self.local))

    def cost(self, shape: AttentionShape) -> Cost:
        candidates = self._candidates(shape)
        rows = (shape.queries - torch.arange(len(candidates)) * BLOCK).clamp(max=BLOCK)
        far = int(((candidates.clamp(max=self.top)) * rows).sum()) * BLOCK
        i = torch.arange(shape.keys - shape.queries, shape.keys)
        first = (i + shape.queries - shape.keys) // BLOCK * BLOCK + shape.keys - shape.queries
        local_start = (first // BLOCK - self.local + 1).clamp(min=0) * BLOCK
        near = int((i + 1 - local_start + (local_start > 0) * BLOCK).sum())
        selection = self.score_macs(shape, int(candidates.sum()))
        return Cost(2.0 * shape.head_dim * (near + far), selection)

    def cost_beside(self, shape: AttentionShape) -> Cost:
        near = window_pairs(shape, self.recent, 0)
        selection = self.score_macs(shape, int(self._candidates(shape).sum()))
        return Cost(2.0 * shape.head_dim * near, selection)

    def _candidates(self, shape: AttentionShape) -> Tensor:
        """How many key blocks every query block chooses from."""
        query_block = torch.arange(-(-shape.queries // BLOCK))
        own = (shape.keys - shape.queries + query_block * BLOCK) // BLOCK
        return (own - self.local).clamp(min=0)

    def _chosen(self, inputs: Inputs, blocks: Tensor, grid: BlockGrid) -> Tensor:
        """Bool [batch, heads, len(blocks), key blocks]."""
        return best(self.scores(inputs, blocks), grid.candidates(self.local), self.top)
