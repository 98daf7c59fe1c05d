"""Static patterns: from a rule keep(i, j) on positions to a tile list.

A static selector says with `keep(i, j)` which pairs it computes and with `reach(first, last)`
which runs of keys may hold such pairs for the queries first..last. Only the tiles in those runs are
evaluated, so no N x N mask appears. Positions count from the first token that is no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from attnplan.kernels import tile_list
from attnplan.kernels.approximation import AttentionShape, Inputs
from attnplan.kernels.tile_list import BLOCK, CONTIGUOUS, FULL, TileList

Rule = Callable[[Tensor, Tensor], Tensor]
Reach = Callable[[int, int], Iterable[tuple[int, int]]]


def causal(inputs: Inputs) -> Tensor:
    """Bool [batch, heads, queries, keys]: keys up to the query, left padding left out."""
    i, j = relative_positions(inputs)
    return ((j <= i) & (j >= 0)).expand(-1, inputs.query.shape[1], -1, -1)


def relative_positions(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Positions from the first real token: i [batch, 1, queries, 1], j [batch, 1, 1, keys]."""
    device = inputs.query.device
    start = torch.tensor(inputs.start, device=device)[:, None, None, None]
    i = torch.arange(inputs.query.shape[2], device=device)[:, None] + inputs.offset - start
    j = torch.arange(inputs.key.shape[2], device=device) - start
    return i, j


def dense_mask(inputs: Inputs, rule: Rule) -> Tensor:
    """The rule as a mask [batch, heads, queries, keys]: the definition, for oracles."""
    i, j = relative_positions(inputs)
    return causal(inputs) & rule(i, j)


def static_tiles(
    inputs: Inputs, blocks: Tensor, rule: Rule, reach: Reach, floor: Tensor | None = None
) -> TileList:
    """Tile list of a static pattern, the same for all heads.

    Args:
        inputs: the call; only sizes and padding are read.
        blocks: indices of query blocks.
        rule: keep(i, j) for broadcastable positions; causality is added here.
        reach: runs [low, high) of keys to look at for the queries first..last.
        floor: [batch, blocks], keys from here on are kept besides what the rule keeps.
    """
    parts: dict[tuple[int, tuple[int, ...]], TileList] = {}
    rows = []
    for b, start in enumerate(inputs.start):
        floors = tuple(floor[b].tolist()) if floor is not None else ()
        if (start, floors) not in parts:
            parts[start, floors] = _one_sequence(inputs, blocks.cpu(), rule, reach, start, floors)
        rows.append(parts[start, floors])
    return tile_list.stack_batch(rows).expand_heads(inputs.query.shape[1]).to(inputs.query.device)


def _one_sequence(
    inputs: Inputs, blocks: Tensor, rule: Rule, reach: Reach, start: int, floors: tuple[int, ...]
) -> TileList:
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    pairs = []  # (row, key block, floor)
    for index, block in enumerate(blocks.tolist()):
        first = inputs.offset + block * BLOCK - start
        last = min(first + BLOCK, inputs.offset + queries - start) - 1
        if last < 0:
            continue
        runs = list(reach(max(first, 0), last))
        if floors:
            runs.append((floors[index] - start, last + 1))
        wanted: set[int] = set()
        for low, high in runs:
            low, high = max(low, 0) + start, min(high, last + 1) + start
            if low < high:
                wanted.update(range(low // BLOCK, (high - 1) // BLOCK + 1))
        low_key = floors[index] if floors else keys
        pairs += [(index, tile, low_key) for tile in sorted(wanted)]
    if not pairs:
        return tile_list.empty(1, 1, len(blocks), torch.device("cpu"))
    row, tile, low = torch.tensor(pairs).unbind(1)

    within = torch.arange(BLOCK)
    query = blocks[row][:, None] * BLOCK + within  # [tiles, 64]
    i = (query + inputs.offset - start)[:, :, None]
    position = tile[:, None] * BLOCK + within
    j = (position - start)[:, None, :]
    keep = rule(i, j) | (position >= low[:, None])[:, None, :]
    keep = keep & (j <= i) & (j >= 0)
    real = query < queries
    words = tile_list.pack_bits(keep & real[:, :, None])  # [tiles, 64]
    # rows past the last query do not matter, so they do not spoil a full tile
    full = ((keep & (position < keys)[:, None, :]) | ~real[:, :, None]).flatten(1).all(1)
    some = words.ne(0).any(1)
    masks, inverse = torch.unique(words[some & ~full], dim=0, return_inverse=True)
    mask = torch.full_like(tile, FULL)
    mask[some & ~full] = inverse
    tiles = torch.stack([torch.full_like(tile, CONTIGUOUS), tile, mask], dim=1)
    gather = torch.zeros(0, BLOCK, dtype=torch.int32)
    return tile_list.from_rows(1, 1, len(blocks), row[some], tiles[some], gather, masks)


def window_pairs(shape: AttentionShape, window: int, sinks: int) -> int:
    """Pairs of a causal window with sinks, summed over the queries of one head."""
    i = torch.arange(shape.keys - shape.queries, shape.keys)
    local = torch.clamp(i + 1, max=window)
    return int((local + torch.clamp(i + 1 - window, min=0, max=sinks)).sum())
