"""Static patterns: from a rule keep(i, j) on positions to a tile list.

A static selector says with `rule(i, j)` which pairs it computes and with `reach(first, last)` which
runs of keys may hold such pairs for the queries first..last. Only the tiles in those runs are
evaluated, so no N x N mask appears, and each list is built once; what `whole(first, last)` names
need not even be evaluated. Positions count from the first token that is no padding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.contracts.selector import Selector
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.indexing import numbers_on
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK, CONTIGUOUS, FULL, TileList


class StaticPattern(Selector):
    """A selector whose tile list depends on sizes and padding alone."""

    static: ClassVar[bool] = True

    @abstractmethod
    def rule(self, i: Tensor, j: Tensor) -> Tensor:
        """keep(i, j) for broadcastable positions; causality is added elsewhere."""

    @abstractmethod
    def reach(self, first: int, last: int) -> Iterable[tuple[int, int]]:
        """Runs [low, high) of keys that hold every pair the queries first..last may keep."""

    def whole(self, first: int, last: int) -> tuple[int, int]:
        """A run [low, high) of keys that all of the queries first..last keep, by the rule alone."""
        return 0, 0

    def one_head(
        self,
        queries: int,
        keys: int,
        start: Sequence[int],
        blocks: tuple[int, ...],
        floor: Tensor | None = None,
    ) -> TileList:
        """The list of one head, on the CPU.

        Args:
            queries, keys: sizes of the call.
            start: for each batch row, the first key that is no left padding.
            blocks: which blocks of 64 query rows to answer for.
            floor: as in `near`.
        """
        floors = [()] * len(start) if floor is None else [tuple(row) for row in floor.tolist()]
        rows = [
            _one_sequence(self, queries, keys, first, blocks, ends)
            for first, ends in zip(start, floors, strict=True)
        ]
        return tile_list.stack_batch(rows)

    def near(self, inputs: Inputs, blocks: Tensor, floor: Tensor | None = None) -> TileList:
        queries, keys = inputs.query.shape[2], inputs.key.shape[2]
        one = self.one_head(queries, keys, inputs.start, tuple(blocks.tolist()), floor)
        return one.expand_heads(inputs.query.shape[1]).to(inputs.query.device)

    def keep(self, inputs: Inputs) -> Tensor:
        return causal(inputs) & self.rule(*relative_positions(inputs))


def causal(inputs: Inputs) -> Tensor:
    """Bool [batch, heads, queries, keys]: keys up to the query, left padding left out."""
    i, j = relative_positions(inputs)
    return ((j <= i) & (j >= 0)).expand(-1, inputs.query.shape[1], -1, -1)


def relative_positions(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Positions from the first real token: i [batch, 1, queries, 1], j [batch, 1, 1, keys]."""
    device = inputs.query.device
    start = numbers_on(inputs.start, device)[:, None, None, None]
    i = torch.arange(inputs.query.shape[2], device=device)[:, None] + inputs.offset - start
    j = torch.arange(inputs.key.shape[2], device=device) - start
    return i, j


@lru_cache(maxsize=512)
def _one_sequence(
    pattern: StaticPattern,
    queries: int,
    keys: int,
    start: int,
    blocks: tuple[int, ...],
    floors: tuple[int, ...],
) -> TileList:
    """The list of one head of one sequence; only tiles in reach are evaluated."""
    offset = keys - queries
    pairs: list[tuple[int, int, int]] = []  # (row, key block, first key that is kept anyway)
    sure = [torch.zeros(0, 2, dtype=torch.int64)]  # (row, key block) of tiles without a mask
    for index, block in enumerate(blocks):
        first = offset + block * BLOCK - start
        last = min(first + BLOCK, keys - start) - 1
        if last < 0:
            continue
        runs = list(pattern.reach(max(first, 0), last))
        if floors:
            runs.append((floors[index] - start, last + 1))
        begin, end = pattern.whole(max(first, 0), last)
        low = -(-(max(begin, 0) + start) // BLOCK)
        high = (min(end, first + 1) + start) // BLOCK
        if low < high:
            tiles = torch.arange(low, high)
            sure.append(torch.stack([torch.full_like(tiles, index), tiles], dim=1))
        wanted: set[int] = set()
        for begin, end in runs:
            begin, end = max(begin, 0) + start, min(end, last + 1) + start
            if begin < end:
                begin, end = begin // BLOCK, (end - 1) // BLOCK + 1
                wanted.update(range(begin, min(end, low) if low < high else end))
                if low < high:
                    wanted.update(range(max(begin, high), end))
        low_key = floors[index] if floors else keys
        pairs += [(index, tile, low_key) for tile in sorted(wanted)]
    sure_row, sure_tile = torch.cat(sure).unbind(1)
    if not pairs and not len(sure_row):
        return tile_list.empty(1, 1, len(blocks), torch.device("cpu"))
    row, tile, kept_from = torch.tensor(pairs, dtype=torch.int64).view(-1, 3).unbind(1)

    within = torch.arange(BLOCK)
    query = torch.tensor(blocks)[row][:, None] * BLOCK + within  # [tiles, 64]
    i = (query + offset - start)[:, :, None]
    position = tile[:, None] * BLOCK + within
    j = (position - start)[:, None, :]
    keep = pattern.rule(i, j) | (position >= kept_from[:, None])[:, None, :]
    keep = keep & (j <= i) & (j >= 0)
    real = query < queries
    words = tile_list.pack_bits(keep & real[:, :, None])  # [tiles, 64]
    # rows past the last query do not matter, so they do not spoil a full tile
    full = ((keep & (position < keys)[:, None, :]) | ~real[:, :, None]).flatten(1).all(1)
    some = words.ne(0).any(1)
    masks, inverse = torch.unique(words[some & ~full], dim=0, return_inverse=True)
    mask = torch.full_like(tile, FULL)
    mask[some & ~full] = inverse
    row, tile = torch.cat([row[some], sure_row]), torch.cat([tile[some], sure_tile])
    mask = torch.cat([mask[some], torch.full_like(sure_tile, FULL)])
    ascending = (row * -(-keys // BLOCK) + tile).argsort()
    tiles = torch.stack([torch.full_like(tile, CONTIGUOUS), tile, mask], dim=1)[ascending]
    gather = torch.zeros(0, BLOCK, dtype=torch.int32)
    return tile_list.from_rows(1, 1, len(blocks), row[ascending], tiles, gather, masks)


def window_pairs(shape: AttentionShape, window: int, sinks: int) -> int:
    """Pairs of a causal window with sinks, summed over the queries of one head."""
    i = torch.arange(shape.keys - shape.queries, shape.keys)
    local = torch.clamp(i + 1, max=window)
    return int((local + torch.clamp(i + 1 - window, min=0, max=sinks)).sum())
