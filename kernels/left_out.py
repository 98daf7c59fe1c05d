"""Single keys beside slots: a key that a query reads by itself leaves its slot, for this query.

A slot of a partition knows each key's share of its weight and value. Where a row reads key j
exactly, the slot's term e^{q.k_c + b_c} (w_c, u_c) loses share_j e^{q.k_c + b_c} (1, v_j). A slot
all of whose keys are read is not read at all, so nothing is left of it, not even rounding; from
others the engines subtract (tiles of kind `TAKEN`). Slots at a mean key never weigh more than their
keys do (Jensen), so what is subtracted is never much more than what is read.

Source: the overlap of a sparse and a low-rank part, Chen et al., Scatterbrain,
https://arxiv.org/abs/2110.15343, section 4.1; the exact shares are ours.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnplan.kernels import tile_list
from attnplan.kernels.approximation import Slots
from attnplan.kernels.tile_list import BLOCK, FULL, SLOTS, TAKEN, TileList
from attnplan.kernels.token_selection import pack_tokens

NUMBERS = 1 << 24  # counts that are held at a time


def without(slots: Slots, words: Tensor, tokens: Tensor) -> TileList:
    """Tiles of slots and single keys, no key counted twice.

    Args:
        slots: with members and shares.
        words: int64 [batch, heads, blocks, slot tiles], which slots a query block reads.
        tokens: int32 [batch, heads, 64 * blocks, most], -1 for none, distinct in a row.
    """
    keys = _of_heads(slots.member, slots).shape[2]
    read, alone = [], []
    heads = tokens.shape[1]
    step = max(1, NUMBERS // max(1, tokens.shape[0] * tokens.shape[2] * slots.key.shape[2]))
    for first in range(0, heads, step):
        some = slice(first, first + step)
        found = _split(slots, words[:, some], tokens[:, some], some)
        read.append(found[0])
        alone.append(found[1])
    is_alone = torch.cat(alone, 1)
    parts = [row_tiles(torch.cat(read, 1))]
    parts.append(pack_tokens(torch.where(is_alone, tokens, -1), keys))
    if not bool(is_alone.all()):
        taken = pack_tokens(torch.where(is_alone, -1, tokens), keys)
        kind = torch.full_like(taken.tiles[:, :1], TAKEN)
        parts.append(replace(taken, tiles=torch.cat([kind, taken.tiles[:, 1:]], 1)))
    return tile_list.concat(parts)


def _split(slots: Slots, words: Tensor, tokens: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
    """Of some heads: the slots that every row reads, and which tokens need no subtraction.

    Returns:
        int64 [batch, heads, 64 * blocks, slot tiles] and bool like `tokens`.
    """
    member, share = (_of_heads(t, slots)[:, heads] for t in (slots.member, slots.share))
    count = slots.key.shape[2]
    member = torch.where(share > 0, member, -1).long()
    held = torch.where(member < 0, count, member)
    size = torch.zeros(*held.shape[:2], count + 1, dtype=torch.int16, device=held.device)
    size.scatter_add_(2, held, torch.ones_like(held, dtype=torch.int16))
    index = tokens.long().clamp(min=0)
    slot = held.gather(2, index.flatten(2)).view(tokens.shape)
    slot = torch.where(tokens < 0, count, slot)
    taken = torch.zeros(*tokens.shape[:3], count + 1, dtype=torch.int16, device=held.device)
    taken.scatter_add_(3, slot, torch.ones_like(slot, dtype=torch.int16))
    gone = taken == size[:, :, None]  # a slot without keys too
    gone[..., count] = True
    alone = gone.gather(3, slot)
    unread = tile_list.pack_bits(gone[..., :count].unflatten(3, (-1, BLOCK)))
    return words.repeat_interleave(BLOCK, 2) & ~unread, alone


def _of_heads(rows: Tensor, slots: Slots) -> Tensor:
    """Members or shares of every head, [batch, heads, keys]."""
    return rows[:, slots.head.long()]


def row_tiles(words: Tensor) -> TileList:
    """Slot tiles: which slots rows read, int64 words [batch, heads, 64 * blocks, tiles]."""
    batch, heads, rows, _ = words.shape
    words = words.unflatten(2, (-1, BLOCK)).transpose(3, 4)  # [..., blocks, tiles, 64]
    b, h, row, index = torch.nonzero(words.ne(0).any(4), as_tuple=True)
    masks = words[b, h, row, index]
    is_full = masks.eq(-1).all(1)
    mask = torch.where(is_full, FULL, torch.arange(len(index), device=words.device))
    tiles = torch.stack([torch.full_like(index, SLOTS), index, mask], dim=1)
    gather = torch.zeros(0, BLOCK, dtype=torch.int32, device=words.device)
    at = (b * heads + h) * (rows // BLOCK) + row
    return tile_list.from_rows(batch, heads, rows // BLOCK, at, tiles, gather, masks.contiguous())
