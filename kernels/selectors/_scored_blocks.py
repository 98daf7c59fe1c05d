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
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.contracts.selector import Selector
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.indexing import heads_of, numbers_on
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.tile_list import BLOCK, CONTIGUOUS, FULL, TileList
from attnplan.kernels.selectors._static_pattern import causal, relative_positions, window_pairs
from attnplan.kernels.selectors._top_tokens import best

SCORES = 1 << 24
"""Scores of single keys that are held at a time."""
ASKING = 16
"""Queries that choose for a query block: those up to its first, which no later query changes."""


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
        sink = (self.key_block == self.sink) & (self.key_block <= self.last)
        return (self.is_recent(local) & (self.key_block >= self.sink)) | sink

    def is_recent(self, local: int) -> Tensor:
        """The `local` recent blocks, bool [blocks, key blocks]."""
        return (self.key_block > self.first - local) & (self.key_block <= self.last)

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

    def pairs(self, inputs: Inputs, chosen: Tensor, sinks: Sinks | None = None) -> Tensor:
        """Block choices as a mask [batch, heads, queries, keys]: tests only."""

        def wide(choice: Tensor) -> Tensor:
            pairs = choice.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
            return pairs[:, :, : inputs.query.shape[2], : inputs.key.shape[2]]

        kept = wide(chosen) & causal(inputs)
        if sinks is None:
            return kept
        cut = wide((self.key_block == self.sink) & sinks.are_old(self))
        return kept & ~(cut & (relative_positions(inputs)[1] >= sinks.keys))


@dataclass(frozen=True)
class Sinks:
    """How much of the sink block is read where it is not recent.

    Attributes:
        keys: its first keys, those of the sequence.
        local: recent blocks.
    """

    keys: int
    local: int

    def are_old(self, grid: BlockGrid) -> Tensor:
        """Query blocks whose sink block is not recent, bool [batch, 1, blocks, 1]."""
        return grid.sink <= grid.first - self.local

    def words(self, inputs: Inputs, grid: BlockGrid) -> Tensor:
        """Bits of the sink block that are read, int64 [batch, blocks]."""
        first = numbers_on(inputs.start, grid.sink.device)[:, None] % BLOCK
        within = torch.arange(BLOCK, device=first.device)
        read = (within >= first) & (within < first + self.keys)
        old = self.are_old(grid)[:, 0, :, 0]
        return torch.where(old, tile_list.pack_bits(read)[:, None], -1)


def block_tiles(
    inputs: Inputs, blocks: Tensor, grid: BlockGrid, chosen: Tensor, sinks: Sinks | None = None
) -> TileList:
    """Tile list of chosen key blocks, bool [batch, heads, blocks, key blocks].

    Three blocks of a row may be cut by the diagonal, the end of the text or padding: those of its
    first and last query, and the sink block, of which `sinks` may leave some keys out. They get
    causal masks, all others are full tiles.
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
    if sinks is not None:
        masks.view(batch, count, 3, BLOCK)[:, :, 2] &= sinks.words(inputs, grid)[..., None]
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
    real = real[:, None, :, None]
    wide = torch.promote_types(inputs.key.dtype, torch.float32)
    rows, pad = inputs.key.to(wide) * real, (0, 0, 0, -keys % BLOCK)
    sums, counts = (
        torch.nn.functional.pad(t, pad).unflatten(2, (-1, BLOCK)).sum(3)
        for t in (rows, real.to(wide))
    )
    return sums / counts.clamp(min=1)


def asking_queries(inputs: Inputs, blocks: Tensor, count: int = ASKING) -> tuple[Tensor, Tensor]:
    """The last `count` queries up to the first of some query blocks: all their rows may know these.

    Padding, and what lies before the call, is left out: zero, and said not to be real.

    Returns:
        Queries [batch, heads, len(blocks), count, head_dim], at least float32, the first of the
        block last, and bool [batch, len(blocks), count], which are real.
    """
    row = blocks[:, None] * BLOCK + torch.arange(1 - count, 1, device=blocks.device)
    start = numbers_on(inputs.start, blocks.device)[:, None, None]
    real = (row >= 0) & (row + inputs.offset >= start)
    queries = inputs.query[:, :, row.clamp(min=0)]
    wide = torch.promote_types(queries.dtype, torch.float32)
    return queries.to(wide) * real[:, None, :, :, None], real


def pooled_queries(inputs: Inputs, blocks: Tensor) -> Tensor:
    """Mean of the `asking_queries` of some blocks, [batch, heads, len(blocks), head_dim]."""
    queries, real = asking_queries(inputs, blocks)
    return queries.sum(3) / real.sum(2).clamp(min=1)[:, None, :, None]


def followed(scores: Tensor, grid: BlockGrid) -> Tensor:
    """log(e^a + e^b) of the score of a key block and of the one before it, unless that is a sink.

    Args:
        scores: [batch, heads, blocks, key blocks], logarithms.
        grid: of these blocks.
    """
    before = scores[..., :-1].masked_fill(grid.key_block[:-1] <= grid.sink, float("-inf"))
    return torch.cat([scores[..., :1], torch.logaddexp(scores[..., 1:], before)], dim=-1)


def first_masses(inputs: Inputs, blocks: Tensor) -> Tensor:
    """What the first query of some blocks gives to every key block: log sum_j e^{s q.k_j}.

    All rows of a query block may know its first query, which no later one changes.

    Returns:
        As `block_masses`.
    """
    wide = torch.promote_types(inputs.query.dtype, torch.float32)
    first = inputs.query[:, :, blocks * BLOCK].to(wide) * inputs.scale
    return block_masses(first, inputs.key.to(wide), inputs.kv_head, BLOCK)


def block_masses(query: Tensor, key: Tensor, kv_head: tuple[int, ...], each: int) -> Tensor:
    """log sum e^{q.k} over the rows k of every key block.

    Args:
        query: [batch, heads, rows, dim].
        key: [batch, kv_heads, keys, dim].
        kv_head: for each of `heads`, the kv head it reads.
        each: rows of `key` per key block.

    Returns:
        [batch, heads, rows, key blocks]; -inf for a block that is not complete. Blocks with padding
        are nobody's choice, and theirs means nothing.
    """
    blocks = key.shape[2] // each
    more = -(-key.shape[2] // each) - blocks
    at_once = max(1, SCORES // max(1, query.shape[0] * query.shape[1] * key.shape[2]))
    made = []
    for part in query.split(at_once, 2):
        scores = _products(part, key[:, :, : blocks * each], kv_head).unflatten(3, (blocks, each))
        top = scores.amax(4, keepdim=True)
        mass = (scores - top).exp_().sum(4).log_() + top[..., 0]
        made.append(torch.nn.functional.pad(mass, (0, more), value=float("-inf")))
    return torch.cat(made, 2)


def _products(query: Tensor, key: Tensor, kv_head: tuple[int, ...]) -> Tensor:
    """Of queries [batch, heads, rows, dim] with the keys that heads read, [..., rows, keys]."""
    used = tuple(dict.fromkeys(kv_head))
    each = len(kv_head) // len(used)
    if kv_head != tuple(kv for kv in used for _ in range(each)):
        return query @ heads_of(key, kv_head).mT
    # heads of a group stand side by side: their keys are not copied
    grouped = query.unflatten(1, (len(used), each)).flatten(2, 3)
    return (grouped @ heads_of(key, used).mT).view(*query.shape[:3], -1)


@dataclass(frozen=True)
class ScoredBlocks(Selector):
    """Keep the sink block, `local` recent key blocks, and the `top` best-scoring others.

    A subclass says how a query block scores a key block, from no query after the block's first: all
    rows of a block read the same blocks, and none may depend on a later row. Ties go to the earlier
    block. Of a sink block that is not recent the first `sink_keys` keys are kept. Beside a far
    field it is kept as a whole, `top` is rounded up to whole chunks, and the score of a chunk is
    that of its best block.
    """

    keeps_chunks: ClassVar[bool] = True
    follows: ClassVar[bool] = False
    """Scores are logarithms, and a block is worth what the block before it scores too: what is read
    often moves along with the text, and the queries that choose stand before the others."""
    settings: ClassVar[tuple[tuple[int, int, int], ...]] = (
        (1, 1, 4),
        (3, 1, 4),
        (4, 2, BLOCK),
        (8, 2, BLOCK),
        (16, 4, BLOCK),
    )
    """(top, local, sink_keys) worth trying."""
    settings_with_far: ClassVar[tuple[tuple[int, int], ...]] = ()
    """Those that are worth trying with a far field too."""

    top: int
    local: int = 2
    sink_keys: int = field(default=BLOCK, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        if self.top < 0:
            raise ValueError(f"top must not be negative, got {self.top}")
        if self.local < 1:
            raise ValueError(f"local must be at least 1 block, got {self.local}")
        if not 1 <= self.sink_keys <= BLOCK:
            raise ValueError(f"sink_keys must be 1 to {BLOCK} keys, got {self.sink_keys}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for top, local, sink_keys in cls.settings:
            if (top + local + 1) * BLOCK < shape.keys:
                yield cls(top, local, sink_keys=sink_keys)

    def tried_with_far(self, shape: AttentionShape) -> bool:
        return self.sink_keys == BLOCK and (self.top, self.local) in self.settings_with_far

    @abstractmethod
    def scores(self, inputs: Inputs, blocks: Tensor) -> Tensor:
        """Score of every key block, [batch, heads, len(blocks), key blocks], at least float32."""

    def worth(self, inputs: Inputs, blocks: Tensor, grid: BlockGrid) -> Tensor:
        """What blocks are chosen by: `scores`, `followed` where the method says so."""
        scores = self.scores(inputs, blocks)
        return followed(scores, grid) if self.follows else scores

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
        chosen = chosen | grid.always(self.local)
        return block_tiles(inputs, blocks, grid, chosen, self._sinks)

    @property
    def recent(self) -> int:
        return (self.local - 1) * BLOCK + 1

    def beside(
        self, inputs: Inputs, blocks: Tensor, floor: Tensor, chunk: int
    ) -> tuple[TileList, Tensor | None]:
        grid = BlockGrid.of(inputs, blocks)
        each = chunk // BLOCK
        scores = grid.by_chunk(self.worth(inputs, blocks, grid), each)
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
        chosen = self._chosen(inputs, blocks, grid) | grid.always(self.local)
        return grid.pairs(inputs, chosen, self._sinks)

    def cost(self, shape: AttentionShape) -> Cost:
        candidates = self._candidates(shape)
        rows = (shape.queries - torch.arange(len(candidates)) * BLOCK).clamp(max=BLOCK)
        far = int(((candidates.clamp(max=self.top)) * rows).sum()) * BLOCK
        i = torch.arange(shape.keys - shape.queries, shape.keys)
        first = (i + shape.queries - shape.keys) // BLOCK * BLOCK + shape.keys - shape.queries
        local_start = (first // BLOCK - self.local + 1).clamp(min=0) * BLOCK
        near = int((i + 1 - local_start + (local_start > 0) * self.sink_keys).sum())
        selection = self.score_macs(shape, int(candidates.sum()))
        return Cost(2.0 * shape.head_dim * (near + far), selection)

    def cost_beside(self, shape: AttentionShape) -> Cost:
        near = window_pairs(shape, self.recent, 0)
        selection = self.score_macs(shape, int(self._candidates(shape).sum()))
        return Cost(2.0 * shape.head_dim * near, selection)

    @property
    def counts_tiles(self) -> bool:
        return self.whole_blocks

    @property
    def whole_blocks(self) -> bool:
        """Masks are those of the diagonal and of padding alone, the same for all settings."""
        return self.sink_keys == BLOCK

    @property
    def _sinks(self) -> Sinks | None:
        return None if self.whole_blocks else Sinks(self.sink_keys, self.local)

    def _candidates(self, shape: AttentionShape) -> Tensor:
        """How many key blocks every query block chooses from."""
        query_block = torch.arange(-(-shape.queries // BLOCK))
        own = (shape.keys - shape.queries + query_block * BLOCK) // BLOCK
        return (own - self.local).clamp(min=0)

    def _chosen(self, inputs: Inputs, blocks: Tensor, grid: BlockGrid) -> Tensor:
        """Bool [batch, heads, len(blocks), key blocks]."""
        return best(self.worth(inputs, blocks, grid), grid.candidates(self.local), self.top)
