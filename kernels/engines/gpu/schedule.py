"""What the GPU kernel reads: the tiles of a layer in the order in which it reads them.

A row of work is answered by one program, which reads its tiles in four loops, so the tiles of a row
are grouped by loop:

    full      contiguous keys, all pairs
    masked    contiguous keys under a mask, and the ragged end of the text
    gather    64 keys from anywhere, and what they leave where they leave slots
    slots     pseudo-keys

Rows come longest first: the device takes them in this order, and fills evenly although heads differ
(longest processing time, Graham, https://doi.org/10.1137/0117039).

A schedule is made of a tile list, without waiting for the device; or, for heads whose tiles depend
on sizes alone, once per shape. There, a run of whole blocks is no list: it is a part of one list
0, 1, 2, ... that all runs share. The whole blocks of other rows may be chosen at every call
(`chosen`): how many they are is known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnplan.kernels.operands.tile_list import (
    BLOCK,
    CONTIGUOUS,
    FULL,
    GATHER,
    SLOTS,
    TAKEN,
    TileList,
)

FIELDS = 8
"""Numbers of a row of work."""
CHOSEN = 1 << 16
"""Added to the kv head of a row whose whole blocks are chosen at every call."""
LEAVES = 1 << 30
"""Added to the index of a gather tile whose keys leave their slots."""


@dataclass(frozen=True)
class Schedule:
    """The rows of a layer, longest first, and the tiles that they read.

    Attributes:
        work: int32 [rows, 8], each: the row's number in the output, (batch * heads + head) * blocks
            + block; first and end of its full tiles; first of its masked, gather and slot tiles;
            their end; its kv head, plus `CHOSEN` where its full tiles are places in `chosen`.
        index: int32 [tiles], what a tile reads: key block, row of `gather` (plus `LEAVES` where
            its keys leave their slots) or block of slots.
        mask: int32 [tiles], row of `masks`, or FULL.
        gather: int32 [gathers, 64].
        masks: int32 [masks, 64, 2], the words of `TileList.masks` in halves, low first.
        chosen: how many key blocks are chosen at every call.
    """

    work: Tensor
    index: Tensor
    mask: Tensor
    gather: Tensor
    masks: Tensor
    chosen: int = 0

    def to(self, device: torch.device) -> Schedule:
        tensors = (self.work, self.index, self.mask, self.gather, self.masks)
        work, index, mask, gather, masks = (t.to(device) for t in tensors)
        return Schedule(work, index, mask, gather, masks, self.chosen)


@dataclass(frozen=True)
class Rows:
    """The rows of some heads before they are put in order; all tensors are on the CPU.

    Attributes:
        work: int32 [batch, heads, blocks, 8] as in `Schedule`, without row numbers and kv heads.
            Tiles count from the beginning of `index`, full tiles of a run from key block 0, chosen
            ones from the first that these heads choose.
        is_run: bool, broadcastable to [batch, heads, blocks]: the full tiles of a row are
            consecutive key blocks.
        index, mask, masks: as in `Schedule`.
        chosen: key blocks that these heads choose at every call; 0 where nothing is chosen.
    """

    work: Tensor
    is_run: Tensor
    index: Tensor
    mask: Tensor
    masks: Tensor
    chosen: int = 0


def of_tiles(tiles: TileList, keys: int, kv_head: Sequence[int]) -> Schedule:
    """The schedule of a tile list, on its device and without waiting for it."""
    starts, order = _by_loop(tiles, keys)
    kind, index, _ = tiles.tiles.unbind(1)
    device = tiles.tiles.device
    rows = torch.arange(tiles.rows, device=device, dtype=torch.int32)
    head = rows // max(tiles.blocks, 1) % tiles.heads
    kv = torch.tensor(tuple(kv_head), dtype=torch.int32).to(device, non_blocking=True)[head]
    full, masked, gather, slots = starts[:-1].view(-1, 4).unbind(1)
    columns = [rows, full, masked, masked, gather, slots, starts[4::4], kv]
    longest_first = tiles.offsets.diff().argsort(descending=True, stable=True)
    return Schedule(
        torch.stack(columns, dim=1)[longest_first].contiguous(),
        (index + LEAVES * (kind == TAKEN)).to(torch.int32)[order].contiguous(),
        tiles.tiles[order, 2].contiguous(),
        tiles.gather.contiguous(),
        tiles.masks.contiguous().view(torch.int32),
    )


def _by_loop(tiles: TileList, keys: int) -> tuple[Tensor, Tensor]:
    """Where the tiles of each (row, loop) begin, int32 [4 * rows + 1], and their order."""
    device = tiles.tiles.device
    kind, index, mask = tiles.tiles.unbind(1)
    is_full = (mask == FULL) & ((index + 1) * BLOCK <= keys)
    others = torch.where(kind == SLOTS, 3, 2)
    loop = torch.where(kind == CONTIGUOUS, torch.where(is_full, 0, 1), others)
    rows = torch.arange(tiles.rows, device=device, dtype=torch.int32)
    row_of_tile = torch.repeat_interleave(
        rows, tiles.offsets.diff(), output_size=tiles.tiles.shape[0]
    )
    ordered, order = (row_of_tile * 4 + loop).to(torch.int32).sort(stable=True)
    loops = torch.arange(4 * tiles.rows + 1, device=device, dtype=torch.int32)
    return torch.searchsorted(ordered, loops, out_int32=True), order


def rows_of(tiles: TileList, keys: int, heads: int) -> Rows:
    """The rows of `heads` heads that all read what the one head of a tile list reads.

    Args:
        tiles: one head, contiguous and slot tiles alone, those of a row ascending.
        keys: keys of the text.
        heads: how many heads.
    """
    kinds = tiles.tiles[:, 0]
    if tiles.heads != 1 or bool(((kinds == GATHER) | (kinds == TAKEN)).any()):
        raise ValueError("rows_of needs a list of one head, without single keys")
    tiles = tiles.to(torch.device("cpu"))
    starts, order = _by_loop(tiles, keys)
    index, mask = tiles.tiles[order, 1], tiles.tiles[order, 2]
    full, masked, slots, end = (starts[n::4][: tiles.rows].long() for n in (0, 1, 3, 4))

    # a run skips no key block: skips[t] counts the skips before tile t
    padded = torch.cat([index, index.new_zeros(1)])
    skips = torch.zeros(len(padded), dtype=torch.int64)
    skips[1:] = padded.diff().ne(1).cumsum(0)
    is_run = (masked > full) & (skips[(masked - 1).clamp(min=0)] == skips[full])
    first = padded[full]

    # and needs no list
    row = torch.repeat_interleave(torch.arange(tiles.rows), tiles.offsets.long().diff())
    kept = ~(is_run[row] & (torch.arange(len(index)) < masked[row]))
    before = torch.zeros(len(padded), dtype=torch.int64)
    before[1:] = kept.cumsum(0)
    begin = torch.where(is_run, first, before[full])
    until = torch.where(is_run, first + masked - full, before[masked])
    none = torch.zeros_like(begin)
    lists = [before[place] for place in (masked, slots, slots, end)]
    columns = [none, begin, until, *lists, none]
    work = torch.stack(columns, dim=1).to(torch.int32).view(tiles.batch, 1, tiles.blocks, FIELDS)
    return Rows(
        work.expand(-1, heads, -1, -1),
        is_run.view(tiles.batch, 1, tiles.blocks),
        index[kept],
        mask[kept],
        tiles.masks,
    )


def join(
    parts: Sequence[tuple[Sequence[int], Rows]], keys: int, kv_head: Sequence[int]
) -> Schedule:
    """One schedule for a layer, from rows of some of its heads; on the CPU.

    Args:
        parts: (heads, rows); every head of the layer once.
        keys: keys of the text.
        kv_head: for each head of the layer, the kv head it reads.
    """
    run = torch.arange(-(-keys // BLOCK), dtype=torch.int32)
    indices, words_of, works, pool = [run], [torch.full_like(run, FULL)], [], []
    tiles, words, chosen = len(run), 0, 0
    kv = torch.tensor(tuple(kv_head), dtype=torch.int32)
    order = [head for heads, _ in parts for head in heads]
    for heads, rows in parts:
        batch, _, blocks, _ = rows.work.shape
        work = rows.work.clone()
        place = torch.where(rows.is_run, 0, chosen if rows.chosen else tiles)
        work[..., 1:3] += place[..., None].to(torch.int32)
        work[..., 3:7] += tiles
        named = torch.tensor(list(heads))
        row = torch.arange(batch)[:, None] * len(kv) + named
        work[..., 0] = row[..., None] * blocks + torch.arange(blocks)
        work[..., 7] = (kv[named] + (CHOSEN if rows.chosen else 0))[:, None]
        works.append(work)
        indices.append(rows.index)
        words_of.append(torch.where(rows.mask == FULL, FULL, rows.mask + words))
        pool.append(rows.masks)
        tiles, words, chosen = (
            tiles + len(rows.index),
            words + len(rows.masks),
            chosen + rows.chosen,
        )
    # heads side by side: those of a group read the same keys at the same time
    work = torch.cat(works, dim=1)[:, torch.tensor(order).argsort()]
    work = work.transpose(1, 2).reshape(-1, FIELDS)
    length = work[:, 2] - work[:, 1] + work[:, 6] - work[:, 3]
    return Schedule(
        work[length.argsort(descending=True, stable=True)].contiguous(),
        torch.cat(indices).to(torch.int32),
        torch.cat(words_of).to(torch.int32),
        torch.zeros(0, BLOCK, dtype=torch.int32),
        torch.cat(pool).contiguous().view(torch.int32),
        chosen,
    )
